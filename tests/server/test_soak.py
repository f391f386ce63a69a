"""tools/soak.py in small: what it counts is what happens, and its last line comes whatever happens."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tools import soak, soak_mix, soak_use

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mix(server) -> soak_mix.Mix:
    return soak_mix.Mix.of(server)


@pytest.fixture(scope="module")
def alone(server, comfyui_path, mix) -> soak_use.Alone:
    """Six cases, one of each workflow, and their images."""
    soak.make_base(server.base, comfyui_path)
    return soak.run_alone(server, soak_mix.cases(mix, len(soak_mix.WORKFLOWS), random.Random(0)))


@pytest.fixture
def use(server, mix, alone) -> soak_use.Soak:
    return soak_use.Soak(server, mix, alone, print, soak_use.Tally())


def test_four_clients_find_nothing_wrong(server, use, monkeypatch):
    monkeypatch.setattr(soak_use, "STEADY_SEC", 1)  # its three measures are of no long run
    use.whole(minutes=0.1)
    document = use.tally.document()
    assert (document["unexpected"], document["different"]) == (0, 0), use.tally
    assert document["prompts"] >= 1 and len(document["open_files"]) == 3
    assert abs(document["memory_growth"]) < 1
    assert server.json("/queue") == {"queue_running": [], "queue_pending": []}


def test_another_image_is_different(server, use):
    case, images = use.alone[0]
    use.alone = [(case, dict.fromkeys(images, ("0" * 64,)))]
    use.case(soak_use.PatientClient(server.url), random.Random(0))
    assert (use.tally.document()["prompts"], use.tally.different) == (1, [case.name])


@pytest.mark.parametrize("action", ["broken", "out_of_range", "interrupt", "dequeue"])
def test_action_is_expected(server, use, action):
    """Once each, so that none of them depends on chance to be tried."""
    getattr(use, action)(soak_use.PatientClient(server.url), random.Random(1))
    tally = use.tally
    assert tally.expected.total() + tally.others.total() + tally.done == 1
    if action in ("broken", "out_of_range"):
        assert tally.expected.total() == 1
    assert not list(server.base.glob("**/soak_[0-9]*"))


@pytest.mark.parametrize("folder", soak_mix.READERS)
def test_every_reader_of_broken_files_is_reached(server, use, folder, monkeypatch):
    monkeypatch.setattr(soak_mix, "READERS", {folder: soak_mix.READERS[folder]})
    use.broken(soak_use.PatientClient(server.url), random.Random(2))
    assert use.tally.expected == {"of broken files": 1}


def test_an_error_without_a_broken_file_is_unexpected(use):
    """A client that asks for what fails counts it, and goes on."""
    case, images = use.alone[0]
    prompt = {node: {**entry, "inputs": dict(entry["inputs"])} for node, entry in case.prompt.items()}
    prompt["1"]["inputs"]["model"] = "not there"
    use.alone = [(soak_mix.Case("no model", prompt), images)]
    asked = iter([False, True])
    use.actions = {"case": 1}
    use.use(lambda: next(asked), "seed")
    assert len(use.tally.unexpected) == 1 and "not there" in use.tally.unexpected[0]


def test_saved_images_are_deleted_once_no_cache_names_them(server, use):
    use.case(soak_use.PatientClient(server.url), random.Random(0))
    use.litter.between = 0
    mine = {path for path in use.litter.new if path.parent.name != "input"}
    assert mine and all(path.is_file() for path in mine)
    use.litter.sweep()
    assert all(path.is_file() for path in mine)
    use.litter.sweep()
    assert not any(path.exists() for path in mine)


def test_sigterm_ends_it_with_the_json_line(comfyui_path, tmp_path):
    """The ComfyUI that it started ends with it."""
    log = tmp_path / "soak.alone.log"
    command = [sys.executable, str(ROOT / "tools" / "soak.py"), "--log", str(tmp_path / "soak.log")]
    environment = {**os.environ, "SPRINT_COMFYUI": str(comfyui_path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while "got prompt" not in (log.read_text(errors="replace") if log.is_file() else ""):
            assert process.poll() is None
            time.sleep(0.1)
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        lines = process.communicate()[0].splitlines()
    assert process.returncode == 0
    assert json.loads(lines[-1]) == {
        "prompts": 0, "unexpected": 0, "different": 0, "memory_growth": None, "open_files": []
    }  # fmt: skip
    assert "ended early by SIGTERM" in lines
    assert (tmp_path / "soak.log").read_text().splitlines() == lines
    assert children and not any(child.is_running() for child in children)
