"""Everything to know about one GPU, in a few minutes on a bare machine: right, suspicious, fast?

    python -m tools.gpu_check [--only card,right,...] [--wheels DIR] [--out FILE]
    python -m tools.gpu_check --device cpu --tiny            a rehearsal of the same code

Needs torch, transformers, einops and safetensors, and no network; host and nodes take ComfyUI out of a pack, which
tools/gpu_pack.py makes. All weights but the bundled model's are random, made on the device. Every section prints one
line of JSON when it ends, or its time is up, or it fails: then the line has its traceback, and the next section goes
on, in a new process where this one is lost. Sections, in order:

    card        names, versions, memory's and matrix products' speed
    right       each network and the bundled model's images against the CPU in fp32
    suspicious  what waits for the device, casts, kernels, and the most memory, of one image
    parts       milliseconds of each part, eager and as a CUDA graph
    kernels     the same parts with our kernels in Triton and without: do they agree, which is faster
    end         from a prompt to an image; images a second
    train       every stage of the distillation: does it run, does it agree with the CPU, samples a second
    diffusers   the same parts beside diffusers, eager; --wheels DIR holds its wheel
    compiled    torch.compile of the transformer and the decoder, ours and theirs
    host        the tests inside ComfyUI on this device, plain and with dynamic VRAM: takes minutes, and --total with it
    nodes       milliseconds of ComfyUI's nodes with the 1.6B: prompt kept, new prompt, with a ControlNet
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from tools.gpu_pack import PACK

ROOT = Path(__file__).resolve().parents[1]
# Seconds that a section may take at most; on an H100 all of them up to host are to take less than TOTAL_SEC together.
LIMITS_SEC = {
    "card": 15,
    "right": 40,
    "suspicious": 30,
    "parts": 40,
    "kernels": 60,
    "end": 30,
    "train": 50,
    "diffusers": 40,
    "compiled": 75,
    "host": 300,
    "nodes": 90,
}
TOTAL_SEC = 150
GRACE_SEC = 30  # beyond a section's limit, for imports and what cannot be interrupted, before its process is ended
LEAST_SEC = 2  # a section is not begun with less
LOST = 75  # exit status of a process whose device no longer answers


class OutOfTime(BaseException):
    """A section's limit; no Exception, so that what it measures does not catch it."""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default=",".join(LIMITS_SEC), help="sections, with commas")
    add("--device", default="cuda")
    add("--tiny", action="store_true", help="networks of a few layers, to rehearse")
    add("--limit", type=float, help="seconds a section (default: each its own)")
    add("--total", type=float, default=TOTAL_SEC, help="seconds of all sections (default: %(default)s)")
    add("--wheels", type=Path, help="folder with wheels to install for this run, such as diffusers'")
    add("--pack", type=Path, default=PACK, help="of host and nodes (default: .gpu/pack)")
    add("--out", type=Path, help="also append the lines to this file")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.only = [name for name in LIMITS_SEC if name in args.only.split(",")] or parser.error("--only: no such section")
    return args


# --- the process that runs sections -----------------------------------------------------------------------


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_section(name: str, work: Callable[[dict], object], seconds: float) -> dict:
    """The line of one section: what it measured so far, its seconds, and what stopped it, if anything did."""
    row: dict = {"section": name}
    started = time.perf_counter()
    try:
        with _limit(seconds):
            work(row)
    except OutOfTime:
        row["error"] = f"stopped after {seconds:.0f} s: {' < '.join(reversed(_where(sys.exc_info()[2])[:-1]))}"
    except Exception:
        row["error"] = traceback.format_exc()[-3000:]
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def _where(trace) -> list[str]:
    """file:line of the innermost callers, the last of which is the limit itself."""
    return [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(trace)][-7:]


def run_sections(args: argparse.Namespace, emit: Callable[[dict], object]) -> None:
    """All sections of --only in this process. Ends early where the device no longer answers."""
    started = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    import torch

    from sprint_core.devices import usable_device
    from tools.gpu import host, right, speed, training
    from tools.gpu.world import World

    world = World(usable_device(args.device), args.tiny, args.pack)
    work: dict[str, Callable] = {"kernels": speed.kernels_of_ours}
    work |= {"card": right.card, "right": right.right, "train": training.train, "host": host.host, "nodes": host.nodes}
    work |= {name: getattr(speed, name) for name in ("suspicious", "parts", "end", "diffusers", "compiled")}
    for name in args.only:
        left = args.total - (time.perf_counter() - started)
        if left < LEAST_SEC:
            emit({"section": name, "error": f"not begun: --total {args.total:.0f} s are over", "seconds": 0.0})
            continue
        world.limit_sec = min(_seconds(args, name), left)
        with torch.inference_mode(name != "train"):
            row = run_section(name, lambda row, name=name: work[name](world, row), world.limit_sec)
        emit(row)
        if "error" in row and world.device.type == "cuda":
            try:
                torch.cuda.synchronize(world.device)
            except Exception:  # the next section begins in a new process
                os._exit(LOST)


def _seconds(args: argparse.Namespace, name: str) -> float:
    return args.limit or LIMITS_SEC[name]


def _child(args: argparse.Namespace) -> None:
    """Lines go to the real output, whatever sections print goes to the other."""
    lines = sys.stdout

    def emit(row: dict) -> None:
        lines.write(json.dumps(row, default=str) + "\n")
        lines.flush()

    with contextlib.redirect_stdout(sys.stderr):
        run_sections(args, emit)
    sys.stderr.flush()
    os._exit(0)  # compilers' worker processes are not waited for


# --- the process that watches it --------------------------------------------------------------------------


def _install(wheels: Path, target: str) -> None:
    files = sorted(map(str, wheels.glob("*.whl")))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    status = subprocess.run([*command, "--target", target, *files]).returncode if files else 1
    if status:
        sys.stderr.write(f"--wheels {wheels}: nothing was installed\n")


def _read(output: IO[str], lines: "queue.Queue[str | None]") -> None:
    for line in output:
        lines.put(line)
    lines.put(None)


def _watch(args: argparse.Namespace, names: list[str], left: float, emit: Callable[[dict], object]) -> list[str]:
    """Run a process for these sections; returns those that it did not come to, after a line for the one it died in."""
    command = [sys.executable, "-m", "tools.gpu_check", "--child", "--only", ",".join(names), "--device", args.device]
    command += ["--total", str(left), *(["--limit", str(args.limit)] if args.limit else [])]
    command += ["--pack", str(args.pack.resolve()), *(["--tiny"] if args.tiny else [])]
    remaining = list(names)
    lines: queue.Queue[str | None] = queue.Queue()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    error = "its process ended"
    try:
        while remaining:
            line = lines.get(timeout=_seconds(args, remaining[0]) + GRACE_SEC)
            if line is None:
                break
            emit(json.loads(line))
            remaining.pop(0)
    except queue.Empty:
        error = "did not stop at its limit, and its process was ended"
        process.kill()
    status = process.wait()
    if remaining and (status != LOST or len(remaining) == len(names)):
        emit({"section": remaining.pop(0), "error": f"{error} (status {status})"})
    return remaining


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.child:
        _child(args)
    started, failed = time.perf_counter(), []

    def emit(row: dict) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        failed.extend([row["section"]] if "error" in row else [])

    with tempfile.TemporaryDirectory(prefix="gpu_check.") as site:
        if args.wheels:
            _install(args.wheels, site)
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
        names = args.only
        while names:
            names = _watch(args, names, args.total - (time.perf_counter() - started), emit)
    emit({"section": "all", "seconds": round(time.perf_counter() - started, 1), "failed": failed})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
