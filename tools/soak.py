"""A day's use of one ComfyUI in minutes: four clients at once, and what is left behind when they are done.

    python run.py python tools/soak.py --minutes 60

Every case, a shipped workflow (01 to 06) at a size, batch, text, seed and steps of its own, first runs alone on a
server of its own. Then four clients ask another server for these cases in any order, for new ones, for broken files
and values out of range; they interrupt at random moments, take prompts out of the queue, and call /free. An image
that is not, pixel for pixel, that of the case alone is counted as different.

Memory and open files are measured at the start, after a warm-up of a fifth of the time, and at the end, each time
with an empty queue, after /free, and once the C library has given back what it keeps of freed memory. Not a test. All
goes into a log as well; the last line is one JSON document whatever happens, also after Ctrl-C and SIGTERM. Ends with
code 1 if there were unexpected errors or different images.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from launcher import setup  # noqa: E402
from launcher.client import Server  # noqa: E402
from tools import soak_mix  # noqa: E402
from tools.soak_mix import Case, Mix  # noqa: E402
from tools.soak_use import PATIENCE_SEC, Alone, PatientClient, Soak, Stopped, Tally, hashes  # noqa: E402

CASES = 72
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class PatientServer(Server):
    def start(self, timeout: float = PATIENCE_SEC) -> None:
        super().start(max(timeout, PATIENCE_SEC))


class Log:
    """Lines for the screen and for a file, written at once; a terminal that is gone does not matter."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __call__(self, line: str) -> None:
        line = line.encode("ascii", "backslashreplace").decode()
        self.file.write(f"{line}\n")
        self.file.flush()
        with contextlib.suppress(OSError, ValueError):
            print(line, flush=True)


def make_base(base: Path, comfyui: Path) -> None:
    setup.prepare_base(base, comfyui, ROOT)
    shutil.copyfile(ROOT / "tools" / "soak_node.py", base / "custom_nodes" / "soak_node.py")


def run_alone(server: Server, cases: list[Case]) -> Alone:
    """The cases with their images, one after the other."""
    client = PatientClient(server.url)
    return [(case, hashes(client, client.run(case.prompt, timeout=float("inf")))) for case in cases]


def stop_on_signals() -> None:
    """The first signal raises Stopped; the report that follows is not to be disturbed by another."""

    def stop(number: int, frame: object) -> None:
        ignore_signals()
        raise Stopped(signal.Signals(number).name)

    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)


def ignore_signals() -> None:
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def soak(options: argparse.Namespace, tally: Tally, say: Callable[[str], None]) -> None:
    """The whole run; `tally` grows on the way."""
    comfyui = os.environ.get("SPRINT_COMFYUI")
    if not comfyui:
        raise setup.Fault("SPRINT_COMFYUI names no ComfyUI: run `python run.py python tools/soak.py`")
    arguments = tuple(setup.device_arguments(Path(sys.executable)))
    with tempfile.TemporaryDirectory(prefix="sana_sprint_soak.", ignore_cleanup_errors=True) as folder:

        def server(name: str) -> Server:
            make_base(Path(folder) / name, Path(comfyui))
            log = options.log.with_suffix(f".{name}.log")
            return PatientServer(sys.executable, Path(comfyui), Path(folder) / name, log, arguments)

        with server("alone") as running:
            say(describe(running))
            mix, started = Mix.of(running), time.monotonic()
            alone = run_alone(running, soak_mix.cases(mix, options.cases, random.Random(options.seed)))
            say(f"{len(alone)} cases alone: {time.monotonic() - started:.0f} s")
        with server("used") as running:
            Soak(running, mix, alone, say, tally).whole(options.minutes)
            leaks = running.log_text().count("memory leak")
            say(f"lines of ComfyUI's log that speak of a memory leak: {leaks}")


def describe(server: Server) -> str:
    """Date, commit, machine and versions, for the docs."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    system, device = server.stats["system"], server.stats["devices"][0]["name"]
    versions = (
        f"ComfyUI {system['comfyui_version']}, PyTorch {system['pytorch_version']}, Python {sys.version.split()[0]}"
    )
    return f"{datetime.date.today()}, {commit}, {platform.machine()} with {os.cpu_count()} cores, {device}, {versions}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of use by four clients (default: 10)")
    parser.add_argument("--cases", type=int, default=CASES, help=f"different prompts to compare (default: {CASES})")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: 0)")
    parser.add_argument("--log", type=Path, default=setup.HOME / "soak.log", help="default: soak.log in .host")
    options = parser.parse_args()
    options.log.parent.mkdir(parents=True, exist_ok=True)
    tally = Tally()
    with open(options.log, "w", encoding="utf-8") as file:
        say = Log(file)
        try:
            stop_on_signals()
            soak(options, tally, say)
        except Stopped as stopped:
            say(f"ended early by {stopped}")
        except BaseException as error:
            tally.unexpected.append(f"{type(error).__name__}: {error}")
            say(f"unexpected: {tally.unexpected[-1]}")
        ignore_signals()
        for line in tally.lines():
            say(line)
        say(json.dumps(tally.document()))
    return 1 if tally.unexpected or tally.different else 0


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)  # clients that still wait for an answer are not waited for
