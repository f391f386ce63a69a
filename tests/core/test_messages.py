"""What people read: any text fits every log, and names folders by no more than people need."""

import ast
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sprint_core import messages
from sprint_core.distill import __main__ as distill
from sprint_core.weights import tensorfile
from sprint_core.weights.tensorfile import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, caf\xe9, \u4e2d\u6587, \U0001f600", "plain, caf\xe9, \u4e2d\u6587, \U0001f600"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[2J\x00\x7f\x9b", r"\x1b[2J\x00\x7f\x9b"),
        ("a\u2028b\u202etxt", r"a\u2028b\u202etxt"),
        ("\ud83d", r"\ud83d"),
        (os.fsdecode(b"empty_\xff.pth"), rf"empty_\xff.pth ({messages.NOT_UTF8})"),
    ],
)
def test_text_is_one_line_that_can_be_encoded(text, shown):
    assert messages.readable(text) == shown == messages.readable(shown)
    assert str(CheckpointError(text)) == shown
    shown.encode()


def test_ten_megabytes_keep_their_beginning_and_their_end():
    shown = messages.readable("a.pth: " + "\x00" * 10_000_000 + "; download it again")
    assert len(shown) < messages.LONGEST + 10
    assert shown.startswith("a.pth: ") and shown.endswith("; download it again")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_a_stream_cannot_encode_is_escaped(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    shown = messages.readable("\u4e2d caf\xe9")
    assert shown.startswith(r"\u4e2d caf")
    shown.encode(encoding)


def test_folders_are_left_out_innermost_first(monkeypatch):
    places = {"/srv/comfy/": "", "/srv/comfy/models/vae/": "", "/home/ada/": "~/"}
    monkeypatch.setattr(messages.PLACES, "prefixes", lambda: places)
    text = "/srv/comfy/models/vae/a/b.pth, /srv/comfy/user/c.json, /home/ada/d.pth"
    assert messages.readable(text) == "a/b.pth, user/c.json, ~/d.pth"


def test_log_lines_are_readable_and_name_their_caller(caplog):
    log = messages.logger("sprint_core.somewhere")
    with caplog.at_level(logging.INFO):
        log.info("%s: %d\n", "\udcff", 3)
    assert caplog.records[-1].getMessage() == rf"\xff: 3\n ({messages.NOT_UTF8})"
    assert caplog.records[-1].funcName == "test_log_lines_are_readable_and_name_their_caller"
    with caplog.at_level(logging.WARNING):
        log.info("%d", "not formatted")


def test_every_module_logs_through_it():
    """A logger of its own would write foreign text as it is."""
    for folder in ("sprint_core", "nodes"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            calls = [node for node in tree if isinstance(node, ast.Call) and node.args]
            loggers = [call for call in calls if ast.unparse(call.func) == "logging.getLogger"]
            own = [call for call in loggers if not ast.unparse(call.args[0]).startswith("'ray.")]  # that one is Ray's
            assert not own or file.name == "messages.py", file


NAME = b"two\nlines_\xff_" + "caf\xe9.safetensors".encode()
COMMANDS = (
    ("sprint_core", "a cat", "--model", "FILE"),
    ("sprint_core", "a cat \udcff", "--size", "64x64", "--steps", "1", "--model", "FILE"),
    ("sprint_core", "a cat", "--image", "FILE"),
    ("sprint_core.convert", "FILE", "out.safetensors"),
    ("sprint_core.evaluate", "--model", "FILE", "--prompts", "1"),
    ("sprint_core.distill", "--recipe", "FILE", "--out", "out"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0] + str(COMMANDS.index(command)))
def test_command_lines_end_with_one_line(tmp_path, command):
    """With names that are no text, and an output that is ASCII alone."""
    file = os.path.join(os.fsencode(tmp_path), NAME)
    Path(os.fsdecode(file)).write_bytes(b"")
    words = [file if word == "FILE" else os.fsencode(word) for word in command]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    line = [os.fsencode(sys.executable), b"-m", *words]
    ended = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    errors = ended.stderr.decode("ascii")
    assert ended.returncode == 1 and not ended.stdout and "Traceback" not in errors, errors
    assert errors.splitlines()[-1].startswith("error: ")
    assert "safetensors" in errors.splitlines()[-1]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ""])
def test_a_name_that_is_not_utf8_is_told(tmp_path, suffix):
    """PyTorch and safetensors open no such file."""
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"model_\xff" + suffix.encode())))
    if suffix:
        path.write_bytes(b"anything")
    else:
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"anything")
    for use in (tensorfile.read, lambda path: tensorfile.write(path, {}, {})):
        with pytest.raises(CheckpointError, match=r"model_\\xff.*: its name, .* is not UTF-8; rename it"):
            use(path)


def test_the_command_in_published_files_names_no_folder():
    words = ["--recipe", "control", "--out=/home/ada/runs", "--vae", "/home/ada/dc-ae.pth", "--data", "images/a"]
    words += ["--set", "control.lr=1e-4"]
    expected = "--recipe control --out=runs --vae dc-ae.pth --data images/a --set control.lr=1e-4"
    assert distill.command_of(words) == f"python -m sprint_core.distill {expected}"
