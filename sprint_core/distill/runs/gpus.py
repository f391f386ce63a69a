"""Graphics cards by name, for the hours of a dry run."""

import re
from dataclasses import dataclass

# TFLOP/s of dense bf16 matrix products with sums in fp32, by the vendors' data sheets (which print twice as much, with
# sparsity): the SXM forms of the A100, H100 and H200, one GPU of an HGX B200, the GeForce at its boost clock.
# fmt: off
TFLOPS = {
    "a100":    312.0,
    "h100":    989.4,
    "h200":    989.4,
    "b200":    2250.0,
    "l40s":    362.0,
    "rtx4090": 165.2,
}
# fmt: on
UTILISATION = 0.35  # of them, that a training step is assumed to reach: an assumption, not a measurement


@dataclass(frozen=True)
class Gpus:
    """So many cards of one kind."""

    name: str
    count: int

    def hours(self, flops_per_step: float, steps: int) -> float:
        """flops_per_step: of one of them."""
        return flops_per_step * steps / (TFLOPS[self.name] * 1e12 * UTILISATION) / 3600

    def text(self, stage: str, hours: float) -> str:
        """For people."""
        return (
            f"{stage}: {hours:.3g} h on {self.count} x {self.name}, if steps reach {UTILISATION:.0%} of "
            f"{TFLOPS[self.name]:g} TFLOP/s (bf16, dense)"
        )


def parse(text: str) -> Gpus:
    """Of 'h100' or '8xh100'. Raises ValueError."""
    written = re.fullmatch(r"(?:(\d+)x)?(\w+)", text.lower(), re.ASCII)
    count, name = int(written[1] or 1) if written else 0, written[2] if written else ""
    if name not in TFLOPS or count < 1:
        raise ValueError(f"--gpu {text}: write it as h100 or 8xh100; known are {', '.join(TFLOPS)}")
    return Gpus(name, count)
