"""The parts of run.py and launcher/client.py that need no ComfyUI."""

import hashlib
import io
import socket
import struct
import tarfile
import threading

import pytest

import run
from launcher.client import _WebSocket, link_folder


@pytest.fixture
def archive(tmp_path):
    """A source distribution with an honest file, files beside the wanted folder, a way out, and a link."""
    path = tmp_path / "archive.tar.gz"
    prefix = f"{run.CURRENT.archive}/vendor/ComfyUI/"
    with tarfile.open(path, "w:gz") as tar:
        for name in (prefix + "main.py", prefix + "../../../out.py", f"{run.CURRENT.archive}/setup.py"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"pass"))
        link = tarfile.TarInfo(prefix + "link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


def test_unpack_takes_plain_files_of_comfyui_only(archive, tmp_path):
    honest = run.CURRENT._replace(sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    run.unpack(archive, tmp_path / "to" / "ComfyUI", honest)
    assert [path.name for path in tmp_path.rglob("*.py")] == ["main.py"]
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["ComfyUI"]


def test_unpack_refuses_another_archive(archive, tmp_path):
    with pytest.raises(run.Fault, match="sha256"):
        run.unpack(archive, tmp_path / "ComfyUI")
    assert not archive.exists() and not (tmp_path / "ComfyUI").exists()


def test_step_is_done_once_again_when_its_inputs_change_and_again_after_a_failure(tmp_path):
    python, done = run.venv_python(tmp_path), []
    python.parent.mkdir()
    python.touch()
    for inputs in ("a", "a", "b"):
        run.step(tmp_path, "a step", inputs, lambda: done.append(1))
    assert len(done) == 2
    with pytest.raises(KeyboardInterrupt):
        run.step(tmp_path, "a step", "c", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    run.step(tmp_path, "a step", "b", lambda: done.append(1))
    assert len(done) == 3


def test_failed_command_names_itself_its_log_and_a_way_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LOG", tmp_path / "setup.log")
    with pytest.raises(run.Fault, match=r"(?s)failed with code 1.*broken here.*setup\.log.*try that"):
        run.command([run.sys.executable, "-c", "raise SystemExit('broken here')"], "try that")


def test_edit_changes_only_what_was_asked():
    prompt = {
        "1": {"class_type": "SanaSprintTextEncode", "inputs": {"text": "old"}},
        "2": {"class_type": "SanaSprintSampler", "inputs": {"steps": 2, "seed": 0, "denoise": 1.0}},
    }
    assert run.edit(prompt, "new", None, 5) == (2, 5)
    assert prompt["1"]["inputs"] == {"text": "new"}
    assert prompt["2"]["inputs"] == {"steps": 2, "seed": 5, "denoise": 1.0}
    with pytest.raises(run.Fault):
        run.edit({}, "new", None, None)


def test_notes_are_the_packs_lines():
    log = "[INFO] Starting server\n[INFO] SANA-Sprint tiny, fp32\nSANA-Sprint: made a model\nx SANA-Sprint"
    assert run.notes(log) == ["SANA-Sprint tiny, fp32", "SANA-Sprint: made a model"]


def test_comfyui_path_without_comfyui_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(run.Fault, match="holds no ComfyUI"):
        run.set_up()


def test_comfyui_around_the_pack_is_used(tmp_path, monkeypatch):
    for name in ("main.py", "comfyui_version.py"):
        (tmp_path / name).touch()
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("SPRINT_PYTHON", "some-python")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "custom_nodes" / "pack" / "run.py"))
    assert run.set_up() == run.Host(tmp_path, run.Path("some-python"), ours=False)


def test_link_replaces_what_was_there(tmp_path):
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.mkdir(), new.mkdir()
    (old / "kept").touch()
    for target in (old, new, new):
        link_folder(link, target)
        assert link.resolve() == target
    assert (old / "kept").exists()
    link.unlink()
    link.mkdir()
    (link / "stale").touch()
    link_folder(link, new)
    assert link.resolve() == new


def frame(opcode: int, payload: bytes, final: bool = True) -> bytes:
    size = bytes([len(payload)]) if len(payload) < 126 else b"\x7e" + struct.pack(">H", len(payload))
    return bytes([opcode | (0x80 if final else 0)]) + size + payload


def test_websocket_reads_fragments_long_frames_and_answers_pings():
    listener, heard = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        peer, _ = listener.accept()
        heard.append(peer.recv(4096))
        peer.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + frame(2, b"preview"))
        peer.sendall(frame(1, b'{"type": "a", ', final=False) + frame(9, b"?") + frame(0, b'"data": {"n": 1}}'))
        heard.append(peer.recv(4096))
        peer.sendall(frame(1, b'{"type": "b", "data": {"n": "' + b"x" * 500 + b'"}}'))
        heard.append(peer.recv(4096))
        peer.close()

    thread = threading.Thread(target=serve)
    thread.start()
    client = _WebSocket(f"http://127.0.0.1:{listener.getsockname()[1]}", "/ws?clientId=me")
    assert client.receive(5) == [("a", {"n": 1})]
    assert client.receive(5) == [("b", {"n": "x" * 500})]
    assert client.receive(0.05) == []
    client.socket.close()
    thread.join()
    listener.close()
    assert heard[0].startswith(b"GET /ws?clientId=me HTTP/1.1\r\n") and b"Upgrade: websocket" in heard[0]
    assert heard[1] == b"\x8a\x81\x00\x00\x00\x00?"


def test_an_earlier_image_is_kept(tmp_path):
    path = tmp_path / "image_.png"
    names = []
    for _ in range(3):
        names.append(run.unused(path).name)
        run.unused(path).touch()
    assert names == ["image_.png", "image_2.png", "image_3.png"]


def test_the_model_can_be_chosen():
    prompt = {
        "1": {"class_type": run.LOADER_NODE, "inputs": {"model": "a", "dtype": "auto"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": ""}},
        "3": {"class_type": run.SAMPLER_NODE, "inputs": {"steps": 2, "seed": 0}},
    }
    run.edit(prompt, "a cat", None, None, "Sana_Sprint_0.6B")
    assert prompt["1"]["inputs"] == {"model": "Sana_Sprint_0.6B", "dtype": "auto"}


@pytest.mark.parametrize(
    ("argv", "says"), [(["serv"], "did you mean the command serve"), (["cat", "--steps", "9"], "9")]
)
def test_mistyped_commands_and_steps_are_refused_at_once(capsys, argv, says):
    with pytest.raises(SystemExit) as caught:
        run.main(argv)
    assert caught.value.code == 2 and says in capsys.readouterr().err
