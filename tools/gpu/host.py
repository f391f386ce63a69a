"""Sections host and nodes: this pack inside ComfyUI, out of what tools/gpu_pack.py packed."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import alone
from sprint_core.models.controlnet import AUTHORS
from sprint_core.weights import checkpoint, layouts
from tools.gpu_pack import ALLOCATOR, DESCRIPTION, FILES

from .timing import ROOT, Row
from .world import World

MODEL = "1.6B"
PIPELINE, CONTROL = "full", "control.safetensors"  # in ComfyUI's folders of models
IN_A_REHEARSAL = ("tests/host/test_nodes.py", "tests/host/test_equality.py")
TESTS = ("tests/host",)
SPARE_SEC = 12  # of the section's limit, to end in
WORKERS = 8  # at most, of tests side by side
SHOWN = 40  # failures


@contextlib.contextmanager
def unpacked(pack: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder of its own, and the environment of processes that find ComfyUI and the packages that Python has not.

    Raises ValueError for a pack of another Python.
    """
    description = json.loads((pack / DESCRIPTION).read_text(encoding="utf-8"))
    python = ".".join(map(str, sys.version_info[:2]))
    if description["python"] != python:
        raise ValueError(
            f"{pack}: is for Python {description['python']}, and this is {python}: make it with --python {python}"
        )
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as temporary:
        folder = Path(temporary)
        with tarfile.open(pack / FILES) as tar:
            tar.extractall(folder, filter="data")
        missing = [name for name, package in description["packages"].items() if _is_missing(package["modules"])]
        paths = [*(str(folder / "site" / name) for name in missing), os.environ.get("PYTHONPATH")]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "SPRINT_COMFYUI": str(folder / "comfyui")}
        yield folder, {**os.environ, **environment}


def _is_missing(modules: list[str]) -> bool:
    return any(importlib.util.find_spec(module) is None for module in modules)


def _is_packed(world: World, row: Row) -> bool:
    """Whether there is a pack; if not, the line says so."""
    if (world.pack / DESCRIPTION).is_file():
        return True
    row["skipped"] = (
        f"no pack in {world.pack}: make one with `python run.py python -m tools.gpu_pack`, name it by --pack"
    )
    return False


def _machines(world: World) -> list[str]:
    return ["cuda", "cuda-dynamic"] if world.device.type == "cuda" else ["cpu"]


def _variables(machine: str) -> dict[str, str]:
    """Of the environment of a process that runs ComfyUI on it; on CUDA with the allocator that ComfyUI starts with."""
    return {"SPRINT_HOST_ON": machine} | ({} if machine == "cpu" else dict([ALLOCATOR]))


# --- tests ------------------------------------------------------------------------------------------------


def host(world: World, row: Row) -> None:
    """The tests inside ComfyUI on this device, plain and with dynamic VRAM; each run has its share of the limit."""
    if not _is_packed(world, row):
        return
    started = time.perf_counter()
    machines = _machines(world)
    if len(machines) == 1:
        row["dynamic"] = {"skipped": "dynamic VRAM needs a GPU"}
    with unpacked(world.pack) as (folder, environment):
        share_sec = (world.limit_sec - SPARE_SEC - (time.perf_counter() - started)) / len(machines)
        for machine in machines:
            row[machine] = {}
            _test(machine, folder, environment, world, max(share_sec, 1.0), row[machine])
    if bad := [name for name in machines if row[name].keys() & {"output", "stopped"} or row[name]["failed"]]:
        raise RuntimeError(f"not every test passed on {', '.join(bad)}")


def _test(machine: str, folder: Path, environment: dict, world: World, seconds: float, row: Row) -> None:
    file, log = folder / f"{machine}.jsonl", folder / f"{machine}.log"
    file.touch()
    command = [sys.executable, "-m", "pytest", "-p", "tools.gpu.outcomes", "--tb=short"]
    workers = min(WORKERS, (os.cpu_count() or 1) // 2)
    command += ["-n", str(workers), "--dist=loadfile"] if workers > 1 else []
    command += IN_A_REHEARSAL if world.tiny else TESTS
    variables = _variables(machine) | {"SPRINT_OUTCOMES": str(file)}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment | variables, stdout=output, stderr=output, start_new_session=True
        )
    try:
        if process.wait(seconds) not in (0, 1):
            row["output"] = log.read_text(encoding="utf-8", errors="replace")[-1500:]
    except subprocess.TimeoutExpired:
        row["stopped"] = f"after {seconds:.0f} s; --limit and --total give more"
    finally:
        if process.poll() is None:  # its workers, too, which else keep the GPU's memory
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        row |= counted(file)


def counted(file: Path) -> Row:
    """How many tests passed, failed and skipped, and which failed why."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    counts = Counter(line["outcome"] for line in lines)
    failures = [f"{line['test']}: {line['reason']}" for line in lines if line["outcome"] == "failed"]
    return {name: counts[name] for name in ("passed", "failed", "skipped")} | {"failures": failures[:SHOWN]}


# --- nodes ------------------------------------------------------------------------------------------------


def nodes(world: World, row: Row) -> None:
    """Milliseconds of ComfyUI's nodes with the 1.6B, as ComfyUI starts on this device, in a process of their own."""
    if not _is_packed(world, row):
        return
    with unpacked(world.pack) as (folder, environment):
        _write_models(world, folder / "base" / "models")
        row["machine"] = machine = _machines(world)[-1]
        command = [sys.executable, "-m", "tools.gpu.comfyui", machine, str(folder / "base")]
        command += [str(world.size_px), str(world.runs)]
        environment |= _variables(machine)
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    row |= json.loads(line)
            except BaseException:  # the section's limit, too
                process.kill()
                raise
        if process.returncode and "error" not in row:
            raise RuntimeError(f"the process of ComfyUI's nodes ended with status {process.returncode}")


def _write_models(world: World, models: Path) -> None:
    """A pipeline and a ControlNet of random weights, in ComfyUI's folders."""
    control = models / "controlnet" / CONTROL
    control.parent.mkdir(parents=True)
    if world.tiny:
        sys.path.append(str(ROOT / "tests"))
        import standin

        standin.make(models / "diffusers" / PIPELINE)
        checkpoint.save(control, [standin.control(AUTHORS)], {})
        return
    made = world.ours(MODEL)
    alone.write(made, models / "diffusers" / PIPELINE)
    net = made.net
    checkpoint.save(control, [checkpoint.Weights(layouts.CONTROLNET, net.config, net.state_dict(), control)], {})
    del made, net
    World.ours.cache_clear()  # ComfyUI has the memory
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
