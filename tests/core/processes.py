"""Tests' own processes: one alone, and two that train together, as accelerate starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/core")))


def run_alone(file: str, *arguments: object) -> None:
    """Run a test file as a script, which must succeed: what it does to its process is done to no other test's."""
    command = [sys.executable, file, *map(str, arguments)]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": PATHS}, capture_output=True, text=True, timeout=180
    )
    assert ended.returncode == 0, (ended.returncode, ended.stderr[-2000:])


def run_two(file: str, out: Path) -> None:
    """Run a test file as a script in two processes, each with the argument `out`; both must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "PYTHONPATH": PATHS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, file, str(out)]
    workers = [subprocess.Popen(command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    assert [worker.wait(timeout=180) for worker in workers] == [0, 0]
