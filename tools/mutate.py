"""Mutation testing: small bugs in the wiring, each planted alone, and the tests that have to notice it.

    python -m tools.mutate --processes 2    all of tools/mutations/: first the tests on the code as it is, then each bug
    python -m tools.mutate clip- scm-       those whose ids begin so
    python -m tools.mutate --check          only whether every bug still fits the code; tests/core has this as a test

No file is touched: a bug lives in a fork of this process, whose import system reads that one file changed. (So a test
that starts processes of its own sees no bug, and belongs in none of the lists.) Leave the code alone meanwhile. Tests
of nodes need SPRINT_COMFYUI. The last line of output is one JSON document. Exits with 1 if a bug survives.
"""

import argparse
import ast
import gc
import importlib
import importlib.machinery
import json
import linecache
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LISTS = sorted(Path(__file__).with_name("mutations").glob("*.json"))
LIMIT_SEC = 600  # of one bug's tests; a bug that makes them hang is noticed
# What tests import before the code under test, loaded once: forks share it.
PRELOADED = ("torch", "torch.func", "torch.utils.checkpoint", "torch.utils.tensorboard", "einops", "safetensors.torch")
PRELOADED += ("numpy", "scipy.linalg", "PIL.Image", "tokenizers", "sentencepiece", "peft", "came_pytorch", "pytest")
PRELOADED += ("diffusers.models.transformers.sana_transformer", "diffusers.models.autoencoders.autoencoder_dc")
PRELOADED += ("diffusers.models.controlnets.controlnet_sana", "diffusers.schedulers.scheduling_scm")
PRELOADED += ("transformers.models.gemma2.modeling_gemma2",)
PRELOADED_FOR_COMFYUI = (
    "torchvision",
    "torchaudio",
    "torchsde",
    "kornia",
    "av",
    "aiohttp",
    "yaml",
    "psutil",
    "spandrel",
)
# Exit codes of pytest; the last also where a bug breaks an import
PASSED = 0
FAILED = 1
NO_COLLECTION = 2


@dataclass(frozen=True)
class Mutation:
    """`before` stands once in `file` and becomes `after`; one of `tests`, all small, has to fail."""

    id: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    @property
    def path(self) -> Path:
        return ROOT / self.file

    def source(self) -> str:
        """The file with the bug. Raises ValueError where it does not fit any more."""
        text = self.path.read_text(encoding="utf-8")
        if (count := text.count(self.before)) != 1:
            raise ValueError(f"{self.before!r} stands {count} times in {self.file}")
        return text.replace(self.before, self.after)


def read_lists(files: Iterable[Path] = LISTS) -> list[Mutation]:
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    return [Mutation(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def problems(mutations: Sequence[Mutation]) -> list[str]:
    """What keeps mutations from being run, in words: nothing, where all fit the code."""
    found = [f"{m.id}: twice" for i, m in enumerate(mutations) if m.id in {other.id for other in mutations[:i]}]
    for mutation in mutations:
        try:
            text = mutation.source()
            ast.parse(text)
        except (OSError, ValueError, SyntaxError) as error:
            found.append(f"{mutation.id}: {error}")
            continue
        if text == mutation.path.read_text(encoding="utf-8"):
            found.append(f"{mutation.id}: changes nothing")
        found += [f"{mutation.id}: no {test}" for test in mutation.tests if not exists(test)]
        found += [] if mutation.tests else [f"{mutation.id}: no tests"]
    return found


def exists(test: str) -> bool:
    """Whether there is such a file, or such a function in it: 'tests/core/test_trigflow.py::test_known_times'."""
    file, _, function = test.partition("::")
    path = ROOT / file
    return path.is_file() and (not function or f"def {function}(" in path.read_text(encoding="utf-8"))


# --- running --------------------------------------------------------------------------------------


def plant(mutation: Mutation) -> None:
    """From now on whoever imports the mutation's file, under any name or link, gets it with the bug."""
    source, plain = mutation.source(), importlib.machinery.SourceFileLoader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, name: str):
        path = self.get_filename(name)
        return self.source_to_code(source, path) if os.path.realpath(path) == str(mutation.path) else plain(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code
    # For who reads the source of a function, as Triton does. No time: the file is not looked at again.
    linecache.cache[str(mutation.path)] = (len(source), None, source.splitlines(keepends=True), str(mutation.path))


def fork(tests: Sequence[str], mutation: Mutation | None, log: Path) -> int:
    """Start the tests in a fork that writes to `log`; its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    signal.alarm(LIMIT_SEC)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = -1
    try:
        if mutation is not None:
            plant(mutation)
        import pytest

        code = int(pytest.main(["-x", *tests]))
    except BaseException:  # or os._exit would swallow it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code & 0xFF)


Job = tuple[tuple[str, ...], Mutation | None]


def run(jobs: Sequence[Job], processes: int, folder: Path) -> Iterator[tuple[Job, int, float, str]]:
    """(job, exit code, seconds, output) of each job as it ends; the code is negative where a signal ended it."""
    waiting, running = list(reversed(jobs)), {}
    while waiting or running:
        while waiting and len(running) < processes:
            job, log = waiting.pop(), folder / f"{len(waiting)}.log"
            running[fork(*job, log)] = (job, log, time.monotonic())
        pid, status = os.wait()
        if pid in running:
            job, log, started = running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            yield job, code, time.monotonic() - started, log.read_text(encoding="utf-8", errors="replace")


def check_baseline(mutations: Sequence[Mutation], processes: int, folder: Path) -> None:
    """Every test that is named passes on the code as it is; else SystemExit. One process for each file of tests."""
    named = sorted({test for mutation in mutations for test in mutation.tests})
    files = {test.split("::")[0]: [] for test in named}
    for test in named:
        files[test.split("::")[0]].append(test)
    sets = [(file,) if file in tests else tuple(tests) for file, tests in files.items()]
    for (tests, _), code, seconds, output in run([(tests, None) for tests in sets], processes, folder):
        print(f"{'passes' if code == PASSED else 'FAILS':8} {seconds:6.1f} s  {tests[0].split('::')[0]}", flush=True)
        if code != PASSED:
            raise SystemExit(f"without any bug these tests end with {code}:\n{output[-6000:]}")


def survivors(mutations: Sequence[Mutation], processes: int, folder: Path) -> list[str]:
    """Ids of the bugs that no test noticed; SystemExit where tests could not be run."""
    survived = []
    for (_, mutation), code, seconds, output in run([(m.tests, m) for m in mutations], processes, folder):
        noticed = code in (FAILED, NO_COLLECTION, -signal.SIGALRM)
        if not noticed and code != PASSED:
            raise SystemExit(f"{mutation.id}: the tests ended with {code}:\n{output[-6000:]}")
        by = re.search(r"^(?:FAILED|ERROR) \S*?([\w.]+(?:::\S+)?)(?: |$)", output, re.MULTILINE)
        end = f"by {by[1]}" if by else "no test failed" if code == PASSED else "they hang"
        print(f"{'killed' if noticed else 'SURVIVED':8} {seconds:6.1f} s  {mutation.id}: {end}", flush=True)
        survived += [] if noticed else [mutation.id]
    return sorted(survived)


def preload(mutations: Sequence[Mutation]) -> None:
    """Import what forks share, with one thread each: a fork does not inherit the threads of a pool."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    host = any(test.startswith("tests/host") for mutation in mutations for test in mutation.tests)
    for name in PRELOADED + (PRELOADED_FOR_COMFYUI if host else ()):
        importlib.import_module(name)
    loaded = [name for name in sys.modules if name.split(".")[0] in ("sprint_core", "standin", "nodes", "comfy")]
    assert not loaded, f"{loaded} would be the same in every fork"
    gc.freeze()  # so that no fork's collector walks, and copies, what they share


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ids", nargs="*", help="beginnings of the ids to run; all if none is given")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="tests at a time, of one thread each")
    parser.add_argument("--check", action="store_true", help="run nothing; only whether every bug fits the code")
    options = parser.parse_args(arguments)
    mutations = [m for m in read_lists() if not options.ids or m.id.startswith(tuple(options.ids))]
    if found := problems(mutations):
        raise SystemExit("\n".join(found))
    survived: list[str] = []
    if not options.check:
        os.chdir(ROOT)
        preload(mutations)
        with tempfile.TemporaryDirectory() as folder:
            check_baseline(mutations, options.processes, Path(folder))
            survived = survivors(mutations, options.processes, Path(folder))
    summary = {"mutants": len(mutations)}
    summary |= {} if options.check else {"killed": len(mutations) - len(survived), "survived": survived}
    print(json.dumps(summary))
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
