"""Seconds, memory, operations and errors of calls that take turns."""

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.networks import Ours
from sprint_core.models import prepacked
from sprint_core.models.compiled import compile_in_place, require_compiler

PEAK_SIZE = 4096  # of the square matrices whose product tells what the machine can do
MIB = 2**20
PACKED = {}  # formulas that torch's counter of operations lacks
if prepacked.is_of_use():
    PACKED[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]
UNCOUNTED = ("train",)  # torch's counter of operations stumbles over gradients inside no_grad


@dataclass
class Taken:
    """What the runs of one part took on one side."""

    seconds: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    flops: int | None = None  # unknown where they were not counted
    outputs: list[Tensor] = field(default_factory=list)  # of the first seeds, on the CPU

    def row(self) -> dict[str, float]:
        row = {
            "median_sec": statistics.median(self.seconds),
            "min_sec": min(self.seconds),
            "max_sec": max(self.seconds),
        }
        if self.peak_mib:
            row["peak_mib"] = max(self.peak_mib)
        return row if self.flops is None else row | {"tflop": self.flops / 1e12}


class PeakMemory:
    """What a call needs at most beyond what was there before it, in MiB; None where nobody counts.

    On a GPU as torch counts it, on Linux as the kernel counts the process's resident pages.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / MIB
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is the present again
            self.before = resident_mib("VmRSS")

    def used(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB - self.before
        peak = resident_mib("VmHWM")
        return None if peak is None or self.before is None else peak - self.before


def resident_mib(name: str) -> float | None:
    """VmRSS (resident now) or VmHWM (at most so far) of this process, mapped files included."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(name)), None)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Call = Callable[[int], Tensor]
Sides = dict[str, Call]  # "ours" and, perhaps, "theirs"


@torch.inference_mode()
def measure(
    calls: dict[str, Sides],
    runs: int,
    device: torch.device,
    kept: int = 1,
    warm: bool = True,
    count: bool = True,
    compiled: Sequence[nn.Module] = (),
) -> dict[str, dict[str, Taken]]:
    """Every part of every side in turn, `runs` times. With `warm`, a round before them warms up, and with `count`
    counts operations of ours.

    A round has one seed, and the sides change their order from one to the next. The outputs of `kept` rounds stay.
    `compiled`: networks to compile, after operations were counted, as nothing is compiled meanwhile.
    """
    taken = {part: {side: Taken() for side in sides} for part, sides in calls.items()}
    if warm:
        for part, side, call in _turns(calls, "operations"):
            if part in UNCOUNTED or not count or side != "ours":  # what converts itself first cannot be looked into
                call(0)
                continue
            with FlopCounterMode(display=False, custom_mapping=PACKED) as counter:
                call(0)
            taken[part][side].flops = counter.get_total_flops()
    if compiled:
        require_compiler(device.type)
        compile_in_place(*compiled)
        for _, _, call in _turns(calls, "compiling"):
            call(0)
    memory = PeakMemory(device)
    for seed in tqdm(range(1, runs + 1), desc="rounds", leave=False):
        for part, side, call in _turns(calls, "parts", flip=seed % 2 == 1):
            record = taken[part][side]
            wait(device)
            memory.start()
            started = time.perf_counter()
            output = call(seed)
            wait(device)
            record.seconds.append(time.perf_counter() - started)
            used = memory.used()
            record.peak_mib += [] if used is None else [used]
            if seed <= kept:
                record.outputs.append(output.cpu())
            del output
    return taken


def _turns(calls: dict[str, Sides], doing: str, flip: bool = False) -> Iterator[tuple[str, str, Call]]:
    """(part, side, call) one after the other, with a progress bar."""
    turns = [(part, side, sides[side]) for part, sides in calls.items() for side in list(sides)[:: -1 if flip else 1]]
    yield from tqdm(turns, desc=doing, leave=False)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the best of some large matrix products: what 100 % of this machine is."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        best = max(best, 2 * PEAK_SIZE**3 / (time.perf_counter() - started))
    return best


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference over the largest value."""
    return max(float((x.float() - y.float()).abs().max() / y.float().abs().max()) for x, y in zip(a, b, strict=True))


def errors(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Median over seeds of the relative error in the root mean square."""
    return statistics.median(float((x.float() - y).norm() / y.norm()) for x, y in zip(outputs, exact, strict=True))


NETWORK_OF = {
    "text": "text_encoder",
    "long_text": "text_encoder",
    "step": "transformer",
    "encode": "autoencoder",
    "decode": "autoencoder",
}  # the parts that one network makes, so that their exact results are at hand


@torch.inference_mode()
def exact(ours: Ours, part: str, seeds: Sequence[int]) -> list[Tensor]:
    """What a part gives in fp32, of the same weights and inputs."""
    name, double = NETWORK_OF[part], copy.copy(ours)
    made = getattr(ours, name)
    network = copy.deepcopy(made.gemma if name == "text_encoder" else made).float()
    if name == "text_encoder":
        network = type(made)(network, made.prompts.tokenizer, made.prompts.preset)
    setattr(double, name, network)
    double.cast = lambda x: ours.cast(x).float()
    return [getattr(double, part)(seed).cpu() for seed in seeds]
