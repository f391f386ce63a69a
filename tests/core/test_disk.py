"""Text by its byte order mark, and files that are written whole or not at all: killed, interrupted, on a full disk."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import ROOT

from sprint_core import __main__ as command_line
from sprint_core import convert, disk
from sprint_core.distill.engine.records import Record
from sprint_core.distill.recipes import Schedule
from sprint_core.evaluate import __main__ as evaluate
from sprint_core.images import files
from sprint_core.weights import presets, tensorfile

TEXT = "ein Käfer 🐞\u2028und\x85mehr\n"


# --- text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_text_by_its_mark(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith("-be") else ""
    assert disk.decoded((mark + TEXT).encode(encoding)) == TEXT
    file = tmp_path / "a.json"
    file.write_bytes((mark + json.dumps({"a": TEXT}, ensure_ascii=False)).encode(encoding))
    assert disk.read_json(file) == {"a": TEXT} == tensorfile.read_json(file)


@pytest.mark.parametrize("data", [TEXT.encode("cp1252", "ignore"), b"\xff\xfeabc", "a".encode("utf-16-be") + b"\xff"])
def test_other_text_is_not_guessed(tmp_path, data):
    with pytest.raises(UnicodeDecodeError):
        disk.decoded(data)
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(tensorfile.CheckpointError, match=r"a\.json: not readable as JSON \(neither UTF-8 nor"):
        tensorfile.read_json(tmp_path / "a.json")


def test_halves_of_characters_are_no_text():
    assert disk.is_text(TEXT) and disk.is_text(json.loads('"\\ud83d\\udc1e"'))
    assert not disk.is_text(json.loads('"\\ud83d"')) and not disk.is_text(disk.decoded(b"\xe9", "surrogateescape"))


# --- writing ----------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "new" / ("ä" * 100 + ".txt")
    for text in ("old", "new"):
        with disk.replacing(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text and names(path.parent) == [path.name]
    with pytest.raises(KeyboardInterrupt), disk.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and names(path.parent) == [path.name]


def test_what_a_link_leads_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "a.txt"
    link.symlink_to(tmp_path / "there" / "b.txt")
    with disk.replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and (tmp_path / "there" / "b.txt").read_text() == "new"
    assert names(tmp_path) == ["a.txt", "there"] and names(tmp_path / "there") == ["b.txt"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_in_one_step(tmp_path, monkeypatch, exchanges):
    """Where two folders can be exchanged; else in two, of which the first is undone if the second fails."""
    if not exchanges:
        monkeypatch.setattr(sys, "platform", "another")
    target = tmp_path / "out"
    for content in ("a", "b"):
        with disk.replacing_folder(target) as fresh:
            (fresh / content).write_text(content)
        assert names(target) == [content] and names(tmp_path) == ["out"]
    with pytest.raises(KeyboardInterrupt), disk.replacing_folder(target) as fresh:
        (fresh / "half").write_text("")
        raise KeyboardInterrupt
    assert names(target) == ["b"] and names(tmp_path) == ["out"]


def test_what_killed_processes_left_goes_when_nobody_writes_to_it(tmp_path):
    target, other = tmp_path / "a.pt", tmp_path / ".b.pt.tmp-0123"
    left = [tmp_path / f".a.pt.tmp-{i}" for i in range(3)]
    for path in (left[0], left[2], other):
        path.write_text("half")
    left[1].mkdir()
    for path in (left[0], left[1], other):
        os.utime(path, times=(time.time() - 1000,) * 2)
    with disk.replacing(target) as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == [".a.pt.tmp-2", ".b.pt.tmp-0123", "a.pt"]


def test_pickles_of_equal_content_are_equal_bytes(tmp_path):
    for _ in range(2):
        tensorfile.write_pickle(tmp_path / "a.pth", {"a": torch.ones(3)})
        os.rename(tmp_path / "a.pth", tmp_path / f"{len(names(tmp_path))}.pth")
    assert (tmp_path / "1.pth").read_bytes() == (tmp_path / "2.pth").read_bytes()
    assert torch.equal(torch.load(tmp_path / "1.pth", weights_only=True)["a"], torch.ones(3))


FAST = (
    "converting_a_file",
    "converting_the_authors_file",
    "converting_a_folder",
    "saving_a_training",
    "saving_a_batch",
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, and SIGKILL")
@pytest.mark.parametrize("kind, count", [*((kind, 10) for kind in FAST), ("fitting_previews", 3)])
def test_killed_at_any_moment(tmp_path, kind, count):
    """Ten kills of each, for 50 see crashes.py: the old or the new, never a half.

    Every third finds the process held in the middle of its writing, so that some of each kind hit it for certain.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    words = [sys.executable, ROOT / "tests/core/crashes.py", kind, tmp_path, str(count), "0"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["kills"] == count and report["in_writing"]["held"] == -(-count // 3)


# --- full disks, and folders that cannot be written -------------------------------------------------


@pytest.fixture
def full_disk():
    """No file may grow beyond 100 kB: the system refuses the write, as on a full disk."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


WRITES = {
    "a.safetensors": lambda path: tensorfile.write(path, {"a": torch.zeros(10**5)}, {}),
    "a.pth": lambda path: tensorfile.write_pickle(path, {"a": torch.zeros(10**5)}),
    "a.png": lambda path: files.save(torch.rand(1, 512, 512, 3), [path]),
    "a.webp": lambda path: files.write(Image.effect_noise((900, 900), 200).convert("RGB"), path),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, full_disk, name):
    path = tmp_path / name
    path.write_text("old")
    with pytest.raises(OSError) as raised:
        WRITES[name](path)
    assert str(raised.value).startswith(f"{path}: not written (")
    assert str(raised.value).endswith("); make room, or choose another place") and "\n" not in str(raised.value)
    assert path.read_text() == "old" and names(tmp_path) == [name]


def test_a_full_disk_leaves_the_old_folder(tmp_path, full_disk, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    words = [presets.BUNDLED, tmp_path / "out", "--to", "diffusers", "--part", "transformer", "--force"]
    assert convert.main([str(word) for word in words]) == 1
    assert caplog.records[-1].getMessage().startswith(f"error: {tmp_path / 'out'}: not written (")
    assert caplog.records[-1].getMessage().count("not written") == 1
    assert names(tmp_path / "out") == ["old"] and names(tmp_path) == ["out"]


def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path, caplog, monkeypatch):
    """A file where a folder should be, and a folder that is read-only; the sources, which are not there, come later."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "folder"
    folder.mkdir()
    access = os.access
    # Root may write everywhere but on read-only drives, which a test cannot make.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
    shutil.copy(presets.BUNDLED, folder / "vae.safetensors")
    for place, reason in ((tmp_path / "file", "is a file, not a folder"), (folder, "nothing can be written to")):
        assert command_line.main(["a cat", "--model", "gone", "--out", str(place / "sub" / "a.png")]) == 1
        assert reason in caplog.records[-1].getMessage()
        assert convert.main(["gone", str(place / "a.safetensors")]) == 1
        assert reason in caplog.records[-1].getMessage()
    assert convert.main(["--fit-preview", str(folder / "vae.safetensors"), "gone"]) == 1
    assert f"error: {folder / 'vae.preview.json'}: nothing can be written to" in caplog.records[-1].getMessage()


def test_what_the_system_says_comes_after_the_files_name(tmp_path, caplog):
    """A folder where a file should be: no number of an error, no quotes."""
    assert evaluate.main(["--geneval", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert caplog.records[-1].getMessage() == f"error: {tmp_path}: Is a directory"


def test_numbers_of_a_training_on_a_full_disk(tmp_path, full_disk):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "of": "x" * 99_970}) + "\n")
    with Record(tmp_path, Schedule(9, 1, 0.1), 1, writes=True) as record, pytest.raises(OSError) as raised:
        record.metrics(2, 0, {"loss": torch.ones(())})
    assert str(raised.value).startswith(f"{path}: not written (File too large)")
