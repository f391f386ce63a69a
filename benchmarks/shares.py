"""Where the time of a part goes: shares of its kinds of operation, as torch's profiler sees them."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Call, Sides

# By what their names have in them, the first that fits.
KINDS = {
    "attention": ("attention", "softmax"),
    "convolutions": ("conv",),
    "norms": ("norm", "rsqrt", "pow"),
    "copies": ("copy", "cat", "stack", "pad", "fill", "zero", "clone"),
    "matrix products": ("mm", "matmul", "linear"),
    "activations and sums": ("lu", "add", "mul", "div", "sub", "clamp", "tanh", "sum", "mean"),
}
OTHER = "other"
UNSEEN = 10**6  # a seed that no round has, so that no prompt is kept from one
PREFIX = "aten::"  # of torch's operations; kernels that they launch are counted with them


@torch.inference_mode()
def shares(calls: Mapping[str, Sides]) -> dict[str, dict[str, float]]:
    """Of each of our parts: {kind of operation: its share of the time}, the largest first."""
    return {part: _of(sides["ours"]) for part, sides in calls.items()}


def _of(call: Call) -> dict[str, float]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, acc_events=True) as profiler:
        call(UNSEEN)
    events = [event for event in profiler.key_averages() if event.key.startswith(PREFIX)]
    on_device = any(event.self_device_time_total for event in events)
    times: dict[str, float] = defaultdict(float)
    for event in events:
        times[kind(event.key)] += event.self_device_time_total if on_device else event.self_cpu_time_total
    total = sum(times.values()) or 1.0
    return {name: time / total for name, time in sorted(times.items(), key=lambda item: -item[1])}


def kind(operation: str) -> str:
    """The kind of an operation by its name in torch: aten::addmm is a matrix product."""
    name = operation.removeprefix(PREFIX)
    return next((kind for kind, fragments in KINDS.items() if any(part in name for part in fragments)), OTHER)


def table(shares_of_parts: Mapping[str, Mapping[str, float]]) -> str:
    """For people: a line for each part."""
    lines = (", ".join(f"{kind} {share:.0%}" for kind, share in row.items()) for row in shares_of_parts.values())
    return "\n".join(f"{part:10}{line}" for part, line in zip(shares_of_parts, lines, strict=True))
