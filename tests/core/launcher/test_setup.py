"""The parts of launcher/setup.py that need no ComfyUI."""

import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from launcher import setup


@pytest.fixture
def archive(tmp_path):
    """A source distribution with an honest file, files beside the wanted folder, a way out, and a link."""
    path = tmp_path / "archive.tar.gz"
    prefix = f"{setup.CURRENT.archive}/vendor/ComfyUI/"
    with tarfile.open(path, "w:gz") as tar:
        for name in (prefix + "main.py", prefix + "../../../out.py", f"{setup.CURRENT.archive}/setup.py"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"pass"))
        link = tarfile.TarInfo(prefix + "link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


def test_unpack_takes_plain_files_of_comfyui_only(archive, tmp_path):
    honest = setup.CURRENT._replace(sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    setup.unpack(archive, tmp_path / "to" / "ComfyUI", honest)
    assert [path.name for path in tmp_path.rglob("*.py")] == ["main.py"]
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["ComfyUI"]


def test_unpack_refuses_another_archive(archive, tmp_path):
    with pytest.raises(setup.Fault, match="sha256"):
        setup.unpack(archive, tmp_path / "ComfyUI")
    assert not archive.exists() and not (tmp_path / "ComfyUI").exists()


def test_step_is_done_once_again_when_its_inputs_change_and_again_after_a_failure(tmp_path):
    python, done = setup.venv_python(tmp_path), []
    python.parent.mkdir()
    python.touch()
    for inputs in ("a", "a", "b"):
        setup.step(tmp_path, "a step", inputs, lambda: done.append(1))
    assert len(done) == 2
    with pytest.raises(KeyboardInterrupt):
        setup.step(tmp_path, "a step", "c", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    setup.step(tmp_path, "a step", "b", lambda: done.append(1))
    assert len(done) == 3


def test_failed_command_names_itself_its_log_and_a_way_on(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "LOG", tmp_path / "setup.log")
    with pytest.raises(setup.Fault, match=r"(?s)failed with code 1.*broken here.*setup\.log.*try that"):
        setup.command([sys.executable, "-c", "raise SystemExit('broken here')"], "try that")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_a_python_that_makes_no_environment_leaves_the_old_one(tmp_path, monkeypatch):
    """As Debian's without python3-venv."""
    monkeypatch.setattr(setup, "LOG", tmp_path / "setup.log")
    kept, maker = tmp_path / "venv" / "kept", tmp_path / "python"
    kept.parent.mkdir()
    kept.touch()
    without = "import sys; sys.modules['ensurepip'] = None"
    maker.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec "{sys.executable}" -c "{without}; $2"\n'
        f'"{sys.executable}" -m venv --without-pip --clear "$4"; exit 1\n'  # as far as it comes
    )
    maker.chmod(0o755)
    with pytest.raises(setup.Fault, match="apt-get install python3-venv"):
        setup.make_venv(tmp_path / "venv", maker)
    assert kept.exists()


def test_comfyui_path_without_comfyui_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(setup.Fault, match="holds no ComfyUI"):
        setup.set_up()


@pytest.mark.parametrize("file", ["run.py", "tools/make_help.py", "launcher/setup.py"])
def test_comfyui_around_the_pack_is_used(tmp_path, monkeypatch, file):
    for name in ("main.py", "comfyui_version.py"):
        (tmp_path / name).touch()
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("SPRINT_PYTHON", "some-python")
    path = str(tmp_path / "custom_nodes" / "pack" / file)
    if file == "launcher/setup.py":
        monkeypatch.setattr(setup, "__file__", path)
    else:
        monkeypatch.setattr(sys, "argv", [path])
    assert setup.set_up() == setup.Host(tmp_path, Path("some-python"), ours=False)


def test_only_a_comfyui_with_the_pack_in_it_is_around(tmp_path):
    file = tmp_path / "custom_nodes" / "pack" / "run.py"
    assert setup.comfyui_around(str(file)) is None
    for name in ("main.py", "comfyui_version.py"):
        (tmp_path / name).touch()
    assert setup.comfyui_around(str(file)) == tmp_path
    assert setup.comfyui_around(str(tmp_path / "elsewhere" / "pack" / "run.py")) is None


def test_link_replaces_what_was_there(tmp_path):
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.mkdir(), new.mkdir()
    (old / "kept").touch()
    for target in (old, new, new):
        setup.link_folder(link, target)
        assert link.resolve() == target
    assert (old / "kept").exists()
    link.unlink()
    link.mkdir()
    (link / "stale").touch()
    setup.link_folder(link, new)
    assert link.resolve() == new


def test_the_pack_is_linked_once(tmp_path):
    """Under its name, not under an older one as well; what others put there stays."""
    base, pack, custom_nodes = tmp_path / "base", tmp_path / "pack", tmp_path / "base" / "custom_nodes"
    pack.mkdir()
    (custom_nodes / "another").mkdir(parents=True)
    setup.link_folder(custom_nodes / "older-name", pack)
    setup.prepare_base(base, tmp_path, pack)
    assert sorted(path.name for path in custom_nodes.iterdir()) == sorted(["another", setup.PACK_NAME])
    assert (custom_nodes / setup.PACK_NAME).resolve() == pack
