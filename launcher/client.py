"""Drive ComfyUI over HTTP, with the standard library alone.

`Server` starts and stops a ComfyUI process, and `Client` speaks to a running one. Whatever goes wrong on the way
is a `ComfyError` whose message names the node.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.prompt import ComfyError, api_prompt
from sprint_core.threads import WAIT_PASSIVELY

# Between two looks at a prompt: a tenth of what it has taken so far, within these bounds.
SHORTEST_POLL_SEC, LONGEST_POLL_SEC = 0.02, 0.25
QUEUE_POLL_SEC = 2.0  # between two looks at whether it is queued at all
NO_ANSWER = (OSError, http.client.HTTPException)


class ServerGone(ComfyError):
    """A server that answers no more, or has forgotten a prompt: which may well be possible elsewhere."""


class Client:
    """One client of a running ComfyUI."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never ask a proxy for loopback

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
        return api_prompt(json.loads(Path(workflow).read_text(encoding="utf-8-sig")), self.object_info())

    def queue(self, prompt: dict) -> str:
        """Queue an API prompt and return its id; ComfyError if the server refuses any part of it."""
        try:
            reply = self.json("/prompt", {"prompt": prompt})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise ComfyError(f"/prompt answered {error.code}: {error.read().decode(errors='replace')}") from error
            reply = json.loads(error.read())
        except NO_ANSWER as error:
            raise ServerGone(f"{self.url} does not answer: {error}") from error
        if reply.get("node_errors") or "error" in reply:
            if "prompt_id" in reply:  # other outputs were valid and are queued: an incomplete result helps nobody
                self.request("/queue", {"delete": [reply["prompt_id"]]})
            raise ComfyError(_refusal(reply))
        return reply["prompt_id"]

    def wait(
        self, prompt_id: str, on_wait: Callable[[float], None] = lambda seconds: None, timeout: float = 3600
    ) -> dict:
        """Wait until a prompt has run and return its history; `on_wait(seconds so far)` before each look at it.

        ComfyError if a node failed, if the prompt was interrupted or took longer than `timeout` seconds; ServerGone if
        the server is gone, or was started anew, so that it knows nothing of the prompt.
        What a node has done so far, ComfyUI tells over its WebSocket alone.
        """
        started = time.monotonic()
        look_at_queue = QUEUE_POLL_SEC
        while (seconds := time.monotonic() - started) < timeout:
            on_wait(seconds)
            self.check()
            try:
                is_queued = seconds < look_at_queue or self.is_queued(prompt_id)  # first: it goes from there to history
                history = self.json(f"/history/{prompt_id}").get(prompt_id)
            except NO_ANSWER as error:
                self.check()
                raise ServerGone(f"{self.url} answers no more: {error}") from error
            if history:
                return _checked(history)
            if not is_queued:
                raise ServerGone(f"{self.url} knows the prompt no more: it was started anew, or its queue was cleared")
            if seconds >= look_at_queue:
                look_at_queue = seconds + QUEUE_POLL_SEC
            time.sleep(min(max(seconds / 10, SHORTEST_POLL_SEC), LONGEST_POLL_SEC))
        self.request("/interrupt", {"prompt_id": prompt_id})
        raise ComfyError(f"the prompt did not end within {timeout:.0f} s and was interrupted")

    def is_queued(self, prompt_id: str) -> bool:
        """Whether it runs or waits."""
        queue = self.json("/queue")
        return any(prompt_id == entry[1] for part in ("queue_running", "queue_pending") for entry in queue[part])

    def run(self, prompt: dict, on_wait: Callable[[float], None] = lambda seconds: None, timeout: float = 3600) -> dict:
        return self.wait(self.queue(prompt), on_wait, timeout)

    def images(self, history: dict) -> list[dict]:
        """The saved and previewed images of a finished prompt: dicts of filename, subfolder and type."""
        return [image for output in history["outputs"].values() for image in output.get("images", [])]

    def view(self, image: dict) -> bytes:
        keys = ("filename", "subfolder", "type")
        return self.request("/view?" + urllib.parse.urlencode({key: image[key] for key in keys}))

    def check(self) -> None:
        """Raise ComfyError if the server is known to be gone."""


def _refusal(reply: dict) -> str:
    lines = list(
        dict.fromkeys(
            f"node {node} ({errors['class_type']}): {_reason(error)}"
            for node, errors in (reply.get("node_errors") or {}).items()
            for error in errors["errors"]
        )
    )
    error = reply.get("error") or {}
    if not lines:
        lines = [f"{error.get('message', error)}: {error.get('details', '')}".rstrip(": ")]
    return "the server refused the prompt:\n  " + "\n  ".join(lines)


def _reason(error: dict) -> str:
    """A node's own check answers for all the inputs that it reads, and ComfyUI repeats its sentence for each."""
    _, dash, sentence = error["details"].partition(" - ")
    if error["type"] == "custom_validation_failed" and dash:
        return sentence
    return f"{error['message']}: {error['details']}".rstrip(": ")


def _checked(history: dict) -> dict:
    """The history of a prompt that succeeded; ComfyError, with the node, for any other."""
    status = history.get("status") or {}
    for kind, data in status.get("messages", []):
        if kind == "execution_error":
            message = f"{data['exception_type']}: {data['exception_message'].strip()}"
            raise ComfyError(f"node {data['node_id']} ({data['node_type']}): {message}")
        if kind == "execution_interrupted":
            raise ComfyError(f"interrupted at node {data['node_id']} ({data['node_type']})")
    if status.get("status_str") != "success":
        raise ComfyError(f"the prompt ended with status {status.get('status_str')!r}")
    return history


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
        self.stats: dict = {}  # /system_stats, once it runs

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
        own_group: dict[str, Any] = {"creationflags": 0x200} if os.name == "nt" else {"start_new_session": True}
        environment = {**WAIT_PASSIVELY, **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
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

    def notes(self) -> list[str]:
        """The lines of the log in which the pack speaks to its user, among ComfyUI's."""
        return re.findall(r"^(?:\[\w+\] )?(SANA-Sprint.*)$", self.log_text(), re.M)

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        if os.name == "nt":
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(self.process.pid)], capture_output=True)
        else:
            _signal_group(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill() if os.name == "nt" else _signal_group(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


def _signal_group(process_id: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_id, number)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
