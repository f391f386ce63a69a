"""Would int8 pay on this CPU? The linear layers of a step of the 0.6B, in bf16 and by what torch has for int8.

    python -m benchmarks.int8 [--tokens 1024] [--runs 20]

An activation is quantised token by token when it comes, a weight channel by channel before. Each shape's ways take
turns; the last line is one JSON document: milliseconds (medians), and errors against fp32 (root mean square).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sprint_core.weights import presets

GREATEST = 127


def layers(width: int, inner: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a block's products, and how they are called."""
    return {"attention": (width, width), "into Mix-FFN": (width, 2 * inner), "out of it": (inner, width)}


def by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [n, k] and the scale of each row [n, 1]."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / GREATEST
    return (x / scale).round().to(torch.int8), scale


def ways(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """x [n, k] @ weight [m, k].T, all from bf16 to bf16; "product alone" leaves out what int8 needs around it."""
    stored, scales = by_row(weight)
    turned, rounded = stored.T.contiguous(), by_row(x)[0]
    half_x, half = x.bfloat16(), weight.bfloat16()

    def dynamic() -> Tensor:
        q, scale = by_row(half_x)
        return (torch._int_mm(q, turned) * scale * scales.T).bfloat16()

    return {
        "bf16": lambda: torch.nn.functional.linear(half_x, half),
        "int8": dynamic,
        "int8, product alone": lambda: torch._int_mm(rounded, turned),
    }


def measure(shape: tuple[int, int], tokens: int, runs: int) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, shape[0], generator=generator) for n in (tokens, shape[1]))
    exact, each = x @ weight.T, ways(x, weight)
    times: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(runs + 2):  # the first two warm up
        for name, call in each.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    rows = {name: {"ms": round(statistics.median(values[2:]), 3)} for name, values in times.items()}
    for name in ("bf16", "int8"):
        off = (each[name]().float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        rows[name]["error"] = round(float(off), 4)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.int8", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024, help="of an image: 1024 for 1024 x 1024 pixels")
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args(argv)
    config = presets.PRESETS["sprint-0.6B"].transformer
    inner = int(config.width * config.mlp_ratio)
    shapes = layers(config.width, inner)
    with torch.inference_mode():
        rows = {name: measure(shape, args.tokens, args.runs) for name, shape in shapes.items()}
    for name, row in rows.items():
        print(f"{name:14}", ", ".join(f"{way} {one['ms']} ms" for way, one in row.items()))
    print(json.dumps({"layers": rows, "tokens": args.tokens, "threads": torch.get_num_threads()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
