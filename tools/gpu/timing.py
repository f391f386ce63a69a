"""Milliseconds on a device, the same call as a CUDA graph, and what makes the processor wait for the device."""

import contextlib
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import wait

ROOT = Path(__file__).resolve().parents[2]
WARM_UPS = 3
SYNCHRONISES = "synchronizing CUDA operation"  # in the warning of torch.cuda.set_sync_debug_mode
SHOWN = 12  # lines and kernels of a list

Row = dict[str, Any]


def milliseconds(call: Callable[[], Any], device: torch.device, runs: int = 7, warm_ups: int = WARM_UPS) -> Row:
    """Medians of one call at a time: on the device by its events, and until the call returned (host).

    On the CPU both are the same. Where host is nearly as long as ms, the device waits for its kernels' launches.
    """
    for _ in range(warm_ups):
        call()
    wait(device)
    whole, host = [], []
    for _ in range(runs):
        events = _events(device)
        started = time.perf_counter()
        if events:
            events[0].record()
        call()
        if events:
            events[1].record()
        host.append(1e3 * (time.perf_counter() - started))
        wait(device)
        whole.append(events[0].elapsed_time(events[1]) if events else host[-1])
    return {"ms": rounded(statistics.median(whole)), "host_ms": rounded(statistics.median(host))}


def _events(device: torch.device) -> "tuple[torch.cuda.Event, torch.cuda.Event] | None":
    if device.type != "cuda":
        return None
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def graphed(call: Callable[[], Tensor], device: torch.device, runs: int = 7) -> Row:
    """The same call captured once and replayed, and the largest difference of its result; {} on the CPU."""
    if device.type != "cuda":
        return {}
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            expected = call()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph, usual = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            output = call()
    finally:
        torch.cuda.set_stream(usual)  # a capture that fails leaves its own
    measured = milliseconds(graph.replay, device, runs)
    return measured | {"difference": rounded(float((output.float() - expected.float()).abs().max()))}


def attempt(work: Callable[[], Row]) -> Row:
    """What it measured, or its traceback, so that what comes after it goes on."""
    try:
        return work()
    except Exception:
        return {"error": traceback.format_exc()[-1500:]}


def rounded(value: float) -> float:
    """To four digits, for the lines of output."""
    return float(f"{value:.4g}")


def finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def repository_line() -> str:
    """'file:line' of the innermost caller in this repository, but for these tools and what run.py installs in it."""
    for frame in reversed(traceback.extract_stack(sys._getframe(1))):
        if (path := Path(frame.filename)).is_relative_to(ROOT):
            place = path.relative_to(ROOT).as_posix()
            if not place.startswith((".", "tools/gpu/")):
                return f"{place}:{frame.lineno}"
    return "elsewhere"


@contextlib.contextmanager
def synchronisations(device: torch.device) -> Iterator[Counter[str]]:
    """Counts what makes the processor wait for the device while this is open, by the line that did."""
    lines: Counter[str] = Counter()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if SYNCHRONISES in str(message):
            lines[repository_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


class Casts(TorchDispatchMode):
    """Counts operations, and copies to another dtype or device by the line that asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.lines: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operations += 1
        out = func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to):  # the second in inference mode
            before, after = args[0], out
            changes = [f"{a}>{b}" for a, b in ((before.dtype, after.dtype), (before.device, after.device)) if a != b]
            if changes:
                self.lines[f"{repository_line()} {' '.join(changes).replace('torch.', '')}"] += 1
        return out


def kernels(call: Callable[[], Any], device: torch.device) -> Row:
    """How many kernels a call launches, how long they run, and the longest by name; {} on the CPU."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        call()
        wait(device)
        wall_ms = 1e3 * (time.perf_counter() - started)
    launched = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy: Counter[str] = Counter()
    for event in launched:
        busy[event.name[:90]] += event.time_range.elapsed_us() / 1e3
    longest = {name: rounded(ms) for name, ms in busy.most_common(SHOWN)}
    total = {"kernels": len(launched), "busy_ms": rounded(sum(busy.values())), "profiled_ms": rounded(wall_ms)}
    return total | {"longest_ms": longest}


def most_common(lines: Counter[str]) -> dict[str, int]:
    return dict(lines.most_common(SHOWN))
