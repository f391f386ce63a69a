"""Drive ComfyUI with the standard library alone.

`Server` starts and stops a ComfyUI process, `Client` speaks its HTTP and WebSocket interface, and
`prepare_base` makes the folders it works in. Whatever goes wrong on the way is a `ComfyError` whose
message names the node.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.prompt import ComfyError, api_prompt

PACK_NAME = "comfyui-sana-sprint"  # the folder under custom_nodes, and so the name in the template browser


class Client:
    """One client of a running ComfyUI."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.id = uuid.uuid4().hex
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never ask a proxy for loopback
        self._events: _WebSocket | None = None

    def request(self, path: str, body: Any = None, timeout: float = 60) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=timeout) as reply:
            return reply.read()

    def json(self, path: str, body: Any = None, timeout: float = 60) -> Any:
        text = self.request(path, body, timeout)
        return json.loads(text) if text else None

    def object_info(self) -> dict:
        return self.json("/object_info")

    def prompt_of(self, workflow: Path) -> dict:
        """The API prompt of a workflow file."""
        return api_prompt(json.loads(Path(workflow).read_text(encoding="utf-8")), self.object_info())

    def queue(self, prompt: dict) -> str:
        """Queue an API prompt and return its id; ComfyError if the server refuses any part of it."""
        if self._events is None:
            self._events = _WebSocket(self.url, f"/ws?clientId={self.id}")
        try:
            reply = self.json("/prompt", {"prompt": prompt, "client_id": self.id})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise ComfyError(f"/prompt answered {error.code}: {error.read().decode(errors='replace')}") from error
            reply = json.loads(error.read())
        if reply.get("node_errors") or "error" in reply:
            if "prompt_id" in reply:  # other outputs were valid and are queued: an incomplete result helps nobody
                self.request("/queue", {"delete": [reply["prompt_id"]]})
            raise ComfyError(_refusal(reply))
        return reply["prompt_id"]

    def wait(self, prompt_id: str, on_progress: Callable[[str, int, int], None] | None = None, timeout: float = 3600):
        """Wait until a prompt has run and return its history; `on_progress(node id, value, maximum)` as it goes."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            events = [(kind, data) for kind, data in self._receive() if data.get("prompt_id") == prompt_id]
            for kind, data in events:
                if kind == "progress" and on_progress:
                    on_progress(str(data["node"]), int(data["value"]), int(data["max"]))
            if not events or any(kind == "executing" and data["node"] is None for kind, data in events):
                self.check()
                history = self.json(f"/history/{prompt_id}").get(prompt_id)
                if history:
                    return _checked(history)
        self.request("/interrupt", {"prompt_id": prompt_id})
        raise ComfyError(f"the prompt did not end within {timeout:.0f} s and was interrupted")

    def _receive(self) -> list[tuple[str, dict]]:
        if self._events is None:
            time.sleep(0.5)
            return []
        try:
            return self._events.receive(1.0)
        except (ComfyError, OSError):  # the history still tells the end
            self.close()
            return []

    def run(self, prompt: dict, on_progress: Callable[[str, int, int], None] | None = None, timeout: float = 3600):
        return self.wait(self.queue(prompt), on_progress, timeout)

    def images(self, history: dict) -> list[dict]:
        """The saved and previewed images of a finished prompt: dicts of filename, subfolder and type."""
        return [image for output in history["outputs"].values() for image in output.get("images", [])]

    def view(self, image: dict) -> bytes:
        keys = ("filename", "subfolder", "type")
        return self.request("/view?" + urllib.parse.urlencode({key: image[key] for key in keys}))

    def check(self) -> None:
        """Raise ComfyError if the server is known to be gone."""

    def close(self) -> None:
        if self._events:
            self._events.socket.close()
            self._events = None


def _refusal(reply: dict) -> str:
    lines = [
        f"node {node} ({errors['class_type']}): {error['message']}: {error['details']}".rstrip(": ")
        for node, errors in (reply.get("node_errors") or {}).items()
        for error in errors["errors"]
    ]
    error = reply.get("error") or {}
    if not lines:
        lines = [f"{error.get('message', error)}: {error.get('details', '')}".rstrip(": ")]
    return "the server refused the prompt:\n  " + "\n  ".join(lines)


def _checked(history: dict) -> dict:
    status = history.get("status") or {}
    for kind, data in status.get("messages", []):
        if kind == "execution_error":
            what = f"{data['exception_type']}: {data['exception_message'].strip()}"
            raise ComfyError(f"node {data['node_id']} ({data['node_type']}): {what}")
        if kind == "execution_interrupted":
            raise ComfyError(f"interrupted at node {data['node_id']} ({data['node_type']})")
    if status.get("status_str") != "success":
        raise ComfyError(f"the prompt ended with status {status.get('status_str')!r}")
    return history


class _WebSocket:
    """The receiving half of RFC 6455: JSON text messages as (type, data); previews are skipped."""

    def __init__(self, url: str, path: str) -> None:
        where = urllib.parse.urlsplit(url)
        self.socket = socket.create_connection((where.hostname, where.port or 80), timeout=30)
        key = base64.b64encode(os.urandom(16)).decode()
        headers = f"Host: {where.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        headers += f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        self.socket.sendall(f"GET {path} HTTP/1.1\r\n{headers}".encode())
        self.buffer, self.message, self.kind = b"", b"", 1
        while b"\r\n\r\n" not in self.buffer:
            self._fill()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise ComfyError(f"{url}{path} refused the WebSocket: {head.splitlines()[0].decode(errors='replace')}")

    def receive(self, timeout: float) -> list[tuple[str, dict]]:
        """The next messages, or none if nothing arrives in time."""
        self.socket.settimeout(timeout)
        try:
            while True:
                messages = [json.loads(text) for text in self._frames()]
                if messages:
                    return [(message["type"], message.get("data") or {}) for message in messages]
                self._fill()
        except TimeoutError:
            return []

    def _fill(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ComfyError("the server closed the connection")
        self.buffer += data

    def _frames(self) -> Iterator[bytes]:
        """Take the complete frames off the buffer and yield the text messages that they end."""
        while len(self.buffer) >= 2:
            final, opcode, size, start = self.buffer[0] & 0x80, self.buffer[0] & 0x0F, self.buffer[1] & 0x7F, 2
            if size >= 126:  # a server never masks, so that only the length is extended
                start, form = (4, ">H") if size == 126 else (10, ">Q")
                if len(self.buffer) < start:
                    return
                (size,) = struct.unpack(form, self.buffer[2:start])
            if len(self.buffer) < start + size:
                return
            payload, self.buffer = self.buffer[start : start + size], self.buffer[start + size :]
            if opcode == 9:  # ping: a client must mask its pong, and zeros are a mask
                self.socket.sendall(bytes([0x8A, 0x80 | size]) + bytes(4) + payload)
            elif opcode == 8:
                raise ComfyError("the server closed the connection")
            elif opcode in (0, 1, 2):
                self.kind = opcode or self.kind
                self.message += payload
                if final:
                    message, self.message = self.message, b""
                    if self.kind == 1:
                        yield message


# ---- the process -------------------------------------------------------------------------------


class Server(Client):
    """A ComfyUI process on a loopback port; `with Server(...) as server:` waits until it answers and stops it after."""

    def __init__(
        self, python: str | Path, comfyui: Path, base: Path, log: Path, args: tuple = (), port: int | None = None
    ) -> None:
        self.port = port or free_port()
        super().__init__(f"http://127.0.0.1:{self.port}")
        self.base, self.log = Path(base), Path(log)
        self.command = [str(python), str(Path(comfyui) / "main.py"), "--port", str(self.port)]
        self.command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        self.command += ["--disable-auto-launch", *args]
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = 240) -> None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise ComfyError(f"port {self.port} is in use: choose another one or stop what uses it")
        own_group = {"creationflags": 0x200} if os.name == "nt" else {"start_new_session": True}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, **own_group
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check()
            try:
                self.stats = self.json("/system_stats", timeout=5)
                return
            except (OSError, ValueError):
                time.sleep(0.2)
        raise ComfyError(f"ComfyUI did not answer within {timeout:.0f} s{self.log_tail()}")

    def check(self) -> None:
        if self.process is None or self.process.poll() is not None:
            code = self.process.returncode if self.process else None
            raise ComfyError(f"ComfyUI ended with code {code}{self.log_tail()}")

    def log_text(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def log_tail(self, lines: int = 30) -> str:
        tail = "\n  ".join(self.log_text().splitlines()[-lines:])
        return f"; the end of {self.log}:\n  {tail}"

    def stop(self) -> None:
        self.close()
        if self.process is None or self.process.poll() is not None:
            return
        if os.name == "nt":
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(self.process.pid)], capture_output=True)
        else:
            self._signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill() if os.name == "nt" else self._signal(signal.SIGKILL)
            self.process.wait(10)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prepare_base(base: Path, comfyui: Path, pack: Path) -> None:
    """Make a ComfyUI base directory: its folders, ComfyUI's example input, and the pack among the custom nodes."""
    for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for example in (comfyui / "input").glob("*.png"):
        if not (base / "input" / example.name).exists():
            shutil.copyfile(example, base / "input" / example.name)
    link_folder(base / "custom_nodes" / PACK_NAME, pack)


def link_folder(link: Path, target: Path) -> None:
    """Make `link` lead to `target`: a symbolic link, a junction on Windows, a copy where neither is allowed."""
    if link.exists() and link.resolve() == target.resolve():
        return
    if link.is_symlink():
        link.unlink()
    elif os.path.lexists(link):
        try:
            link.rmdir()  # a junction
        except OSError:
            shutil.rmtree(link)  # an earlier copy
    try:
        link.symlink_to(target, target_is_directory=True)
        return
    except OSError:
        pass
    if os.name == "nt" and subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)]).returncode == 0:
        return
    print(f"warning: {link} is a copy, as this system allows no link: edits reach it on the next run", file=sys.stderr)
    shutil.copytree(target, link, ignore=shutil.ignore_patterns(".*", "output", "__pycache__"))
