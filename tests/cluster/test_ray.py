"""--engine ray, on a cluster with two CPUs and on one of its own: the bytes of the local engine, whatever is killed."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import ray
import standin

from launcher.client import free_port
from sprint_core.batch import __main__ as command_line

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 40
SMALL = ("--size", "64x64", "--batch", 2, "--shard-rows", 4, "--threads", 1, "--steps", 20)
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
MINUTES_SEC = 240


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> tuple:
    folder = tmp_path_factory.mktemp("job")
    file = folder / "prompts.txt"
    file.write_text("".join(f"a cat of {i} kilograms\n" for i in range(4 * SHARDS)))
    return (file, "--model", standin.make(folder / "sprint"), *SMALL)


@pytest.fixture(scope="module")
def local(words, tmp_path_factory) -> tuple[dict, dict[str, bytes]]:
    """What the local engine ends with, and its shards."""
    out = tmp_path_factory.mktemp("local") / "out"
    return finished(start(*words, "--out", out)), shards(out)


@pytest.fixture(scope="module")
def cluster():
    """A cluster with two CPUs, as `ray start` makes it on a head node, and its address."""
    port, environment = free_port(), ENVIRONMENT | {"RAY_BACKEND_LOG_LEVEL": "fatal"}
    line = ["start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false", f"--port={port}"]
    folder = tempfile.mkdtemp(prefix="ray-")  # short, as it holds sockets; and /tmp/ray would remember the cluster
    line += [f"--ray-client-server-port={free_port()}", f"--object-store-memory={2**27}", f"--temp-dir={folder}"]
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *line],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ["RAY_AUTH_MODE"] = "disabled"
    try:
        ray.init(f"127.0.0.1:{port}", log_to_driver=False, logging_level="ERROR")
        yield head, f"127.0.0.1:{port}"
        ray.shutdown()
    finally:
        for process in (*psutil.Process(head.pid).children(recursive=True), head):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def start(*words: object, **environment: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "sprint_core.batch", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT | environment, **pipes)


def finished(process: subprocess.Popen) -> dict:
    output, errors = process.communicate(timeout=MINUTES_SEC)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def shards(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.glob("train-*"))}


def until_shards(out: Path, process: subprocess.Popen, count: int = 1) -> None:
    while len(list(out.glob("train-*"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def actors(of: subprocess.Popen) -> list[psutil.Process]:
    """The actors of a session that this process started."""
    workers = []
    for process in psutil.Process(of.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            workers += [process] if process.cmdline()[0].startswith("ray::MapWorker") else []
    return workers


def test_an_actor_is_killed(words, local, tmp_path):
    """Ray starts another one, which makes what the first had; here Ray starts on this machine."""
    out = tmp_path / "out"
    command = start(*words, "--out", out, "--engine", "ray", "--workers", 2)
    until_shards(out, command)
    first = actors(command)
    assert len(first) in (1, 2)  # one may come up later
    first[0].kill()
    before = len(shards(out))
    result = finished(command)
    assert 0 < before < SHARDS
    assert shards(out) == local[1] and result["pixels_sha256"] == local[0]["pixels_sha256"]


def test_the_command_is_killed_and_goes_on(words, local, cluster, tmp_path):
    """On a cluster that stays; as many actors as it has CPUs leave one free, for which Ray's own tasks would wait."""
    head, address = cluster
    out, engine = tmp_path / "out", ("--engine", "ray", "--workers", 2)
    command = start(*words, "--out", out, *engine, RAY_ADDRESS=address)
    until_shards(out, command)
    first = actors(head)
    assert first
    assert ray.get(ray.remote(lambda: 7).options(num_cpus=1).remote(), timeout=60) == 7 and command.poll() is None
    command.kill()
    command.communicate()
    before = shards(out)
    assert 0 < len(before) < SHARDS
    result = finished(start(*words, "--out", out, *engine, RAY_ADDRESS=address))
    assert shards(out) == local[1] and result["pixels_sha256"] == local[0]["pixels_sha256"]
    assert result["run"]["images"] <= 4 * (SHARDS - len(before))
    _, alive = psutil.wait_procs([*first, *actors(head)], timeout=30)
    assert not alive


def test_what_an_actor_cannot_write_is_said_in_a_sentence(words, cluster, tmp_path):
    """And not as Ray's account of all that called what."""
    out = tmp_path / "out"
    (out / ".batch" / f"train-00000-of-{SHARDS:05d}.tar").mkdir(parents=True)  # in place of a file
    command = start(*words, "--out", out, "--engine", "ray", RAY_ADDRESS=cluster[1])
    errors = command.communicate(timeout=MINUTES_SEC)[1].splitlines()
    assert command.returncode == 1 and f"train-00000-of-{SHARDS:05d}.tar: not written (Is a directory" in errors[-1]
    assert not [line for line in errors if "Traceback" in line]


@pytest.mark.parametrize(
    ("options", "address", "message"),
    [
        (("--device", "cpu,cpu"), "", "--device cpu,cpu: Ray chooses the devices; say cpu or cuda, and how many"),
        (("--device", "cuda"), "", "--device cuda:"),
        ((), "127.0.0.1:9", "RAY_ADDRESS=127.0.0.1:9: nothing answers there"),
    ],
)
def test_what_cannot_work_is_said_at_once(words, tmp_path, monkeypatch, caplog, options, address, message):
    monkeypatch.setenv("RAY_ADDRESS", address)
    line = [*words, "--out", tmp_path / "out", "--engine", "ray", *options]
    assert command_line.main([str(word) for word in line]) == 1
    assert caplog.records[-1].getMessage().startswith(f"error: {message}")
