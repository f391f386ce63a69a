"""The line between a live canvas's page and its node: a WebSocket of our own on ComfyUI's server.

    GET /sana_sprint/live?client=<ComfyUI's client id>&node=<node id>[&silence=<seconds>]

Page to server: frames (sprint_core/images/frames.py) and {"type": "stop"}. Server to page: {"type": "state"}, {"type":
"error"} and images, packed as frames are. ComfyUI's loop listens; its worker takes frames and answers. Only the newest
frame is kept, and none while no run listens. Nothing is written to disk.
"""

import asyncio
import io
import json
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import torch
from aiohttp import WSCloseCode, WSMsgType, web
from comfy.cli_args import args
from PIL import Image
from torch import Tensor

from ...sprint_core import messages
from ...sprint_core.images import frames
from ...sprint_core.images.frames import Frame, Incoming
from . import screen

log = messages.logger(__name__)

PATH = "/sana_sprint/live"
TAKEN_CODE = 4001  # of a socket that another tab's takes the place of
UNKNOWN_CODE = 4003  # of a socket that came before ComfyUI's own, as after a restart: the page comes again
LONGEST_ID = 200
HEARTBEAT_SEC = 20.0
SILENCE_SEC, LONGEST_SILENCE_SEC = 60.0, 3600.0
JPEG_QUALITY = 90
LOOPBACK = ("127.0.0.1", "::1")


@dataclass
class Run:
    """What a run of the node wants of its page.

    base: its values stand in where a frame has none; message: what the node would say; underlay: its image as JPEG.
    """

    base: Frame
    final_steps: int
    message: str = ""
    underlay: bytes = b""


@dataclass
class Session:
    """One node of one page, by (client id, node id). `changed` guards what both threads write."""

    key: tuple[str, str]
    silence_sec: float = SILENCE_SEC
    changed: threading.Condition = field(default_factory=threading.Condition)
    socket: web.WebSocketResponse | None = None
    run: Run | None = None
    newest: Incoming | None = None
    stopped: bool = False
    heard: float = 0.0  # when the last frame came, or the run began, by the monotonic clock
    gone: float = 0.0  # since when no page is there
    sending: Future | None = None
    logged: set[str] = field(default_factory=set)  # faults that are in the log

    # --- the worker's side

    def begin(self, run: Run) -> None:
        with self.changed:
            self.run, self.newest, self.stopped = run, None, False
            self.heard = self.gone = time.monotonic()
        self.post(self.state())
        self._post_underlay()

    def end(self, reason: str) -> None:
        with self.changed:
            self.run = self.newest = None
        self.post({"type": "state", "state": "ended", "reason": reason})
        self.forget()

    def forget(self) -> None:
        """Drop a session that neither a page nor a run has."""
        if self.socket is None and self.run is None:
            SESSIONS.pop(self.key, None)

    def take(self, timeout_sec: float) -> Incoming | None:
        """The newest frame, once the last image is on its way; None if none comes in time."""
        with self.changed:
            if self.newest is None and not self.stopped:
                self.changed.wait(timeout_sec)
        if self.sending is not None and not wait([self.sending], timeout_sec).done:
            return None
        with self.changed:
            incoming, self.newest = self.newest, None
            return incoming

    @property
    def waits_for_the_last(self) -> bool:
        """Whether the newest frame is that of a lifted pen."""
        newest = self.newest
        return newest is not None and newest.final

    def answer(self, number: int, image: Tensor, ms: dict[str, float]) -> None:
        """Send an image [1, h, w, 3] in [0, 1]. ms: of each stage; what it takes to encode joins them."""
        begun = time.perf_counter()
        pixels = image[0].clamp(0, 1).mul(255).round().to("cpu", torch.uint8).numpy()
        data = jpeg(Image.fromarray(pixels))
        ms = ms | {"encode": (time.perf_counter() - begun) * 1000}
        ms = {stage: round(value, 2) for stage, value in (ms | {"total": sum(ms.values())}).items()}
        height, width = pixels.shape[:2]
        header = {"seq": number, "ms": ms, "width": width, "height": height, "format": "jpeg"}
        self.sending = self.post(frames.pack(header, data))

    def state(self) -> dict[str, Any]:
        """Whether a run listens, and the size that it wants."""
        run = self.run
        if run is None:
            return {"type": "state", "state": "waiting"}
        return {
            "type": "state",
            "state": "live",
            "width": run.base.width,
            "height": run.base.height,
            "message": run.message,
        }

    def post(self, message: dict[str, Any] | bytes) -> Future | None:
        """Send from the worker, without waiting. Lost where no page is there."""
        socket, server = self.socket, screen.server()
        if socket is None or server is None:
            return None
        return asyncio.run_coroutine_threadsafe(_send(socket, message), server.loop)

    def _post_underlay(self) -> None:
        if (run := self.run) is not None and run.underlay:
            self.post(_underlay(run))

    # --- the server's side

    def put(self, incoming: Incoming) -> None:
        with self.changed:
            self.newest, self.heard = incoming, time.monotonic()
            self.changed.notify()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify()


SESSIONS: dict[tuple[str, str], Session] = {}


def jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def _underlay(run: Run) -> bytes:
    width, height = run.base.size
    return frames.pack({"underlay": True, "format": "jpeg", "width": width, "height": height}, run.underlay)


async def _send(socket: web.WebSocketResponse, message: dict[str, Any] | bytes) -> None:
    try:
        if isinstance(message, bytes):
            await socket.send_bytes(message)
        else:
            await socket.send_str(json.dumps(message))
    except (ConnectionError, RuntimeError):  # it closed meanwhile
        pass


# --- the route --------------------------------------------------------------------------------------


def register() -> None:
    """Add the route to ComfyUI's server, if it runs as one."""
    if (server := screen.server()) is not None:
        server.routes.get(PATH)(listen)


def _is_own(request: web.Request) -> bool:
    """Whether it is of ComfyUI's own page, of an origin that ComfyUI was started to allow, or of no page."""
    origin = request.headers.get("Origin")
    if origin is None or args.enable_cors_header in ("*", origin):
        return True
    return urlsplit(origin).netloc.lower() == request.host.lower()


_refused: set[str] = set()  # what is in the log already


def _tell(why: str) -> None:
    if why not in _refused:
        _refused.add(why)
        log.warning("live canvas: %s; refused", why)


def _refuse(status: int, why: str) -> web.Response:
    _tell(why)
    return web.Response(status=status, text=why)


async def listen(request: web.Request) -> web.StreamResponse:
    """A page's line, until it closes."""
    if not _is_own(request):
        return _refuse(403, "a page of another origin asked")
    client, node = request.query.get("client", ""), request.query.get("node", "")
    if not (0 < len(client) <= LONGEST_ID and 0 < len(node) <= LONGEST_ID):
        return _refuse(400, "a page named no client and node")
    # Compressed for pages elsewhere, whose sheets become a twentieth; on this machine that takes longer than to send.
    compress = request.remote not in LOOPBACK
    socket = web.WebSocketResponse(max_msg_size=frames.MAX_MESSAGE_BYTES, heartbeat=HEARTBEAT_SEC, compress=compress)
    await socket.prepare(request)
    if client not in getattr(screen.server(), "sockets", {}):
        _tell("a page named a client that ComfyUI does not know")
        await socket.close(code=UNKNOWN_CODE)  # rather than 403, which browsers report as an error of the page
        return socket
    session = SESSIONS.setdefault((client, node), Session((client, node)))
    session.silence_sec = _silence_of(request.query.get("silence"))
    before, session.socket = session.socket, socket
    if before is not None:
        await _send(before, {"type": "state", "state": "taken"})
        await before.close(code=TAKEN_CODE)
    await _send(socket, session.state())
    if (run := session.run) is not None and run.underlay:
        await _send(socket, _underlay(run))
    try:
        await _hear(socket, session)
    finally:
        if session.socket is socket:
            session.socket, session.gone = None, time.monotonic()
        session.forget()
    return socket


def _silence_of(text: str | None) -> float:
    try:
        return min(max(float(text or SILENCE_SEC), 1.0), LONGEST_SILENCE_SEC)
    except ValueError:
        return SILENCE_SEC


async def _hear(socket: web.WebSocketResponse, session: Session) -> None:
    async for message in socket:
        if message.type == WSMsgType.ERROR and getattr(message.data, "code", None) == WSCloseCode.MESSAGE_TOO_BIG:
            _note(session, f"frame: larger than {frames.MAX_MESSAGE_BYTES} bytes")
        if message.type not in (WSMsgType.BINARY, WSMsgType.TEXT):
            continue
        try:
            _receive(session, message.data)
        except ValueError as error:
            _note(session, str(error))
            await _send(socket, {"type": "error", "message": str(error)})


def _note(session: Session, fault: str) -> None:
    kind = fault[:24]
    if kind not in session.logged:
        session.logged.add(kind)
        log.warning("live canvas: %s; refused", fault)


def _receive(session: Session, data: bytes | str) -> None:
    """Take a message. Raises ValueError for one that says nothing."""
    if isinstance(data, str):
        try:
            kind = json.loads(data).get("type")
        except (ValueError, AttributeError, RecursionError):
            raise ValueError("message: not an object of JSON") from None
        if kind != "stop":
            raise ValueError(f"message: its type is {str(kind)[:40]!r}, not 'stop'")
        session.stop()
        return
    run = session.run or Run(Frame(64, 64), 1)
    incoming = frames.read(data, run.base, run.final_steps)
    if session.run is None:
        return
    if incoming.frame.size != run.base.size:
        width, height = run.base.size
        raise ValueError(f"frame: its size is {incoming.frame.width} x {incoming.frame.height}, not {width} x {height}")
    session.put(incoming)
