"""A run that goes on while somebody draws, in ComfyUI's worker: the newest frame is painted, one at a time. Those of a
moving pen that the lifted pen's overtakes are not answered.

It ends when the page says so, another prompt waits, nothing is drawn for a while, the page is gone, or ComfyUI
interrupts it.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace

import comfy.model_management as mm

from ...sprint_core.images.frames import Frame, Incoming
from ...sprint_core.live import LiveSession, Outdated
from . import live_socket, screen
from .live_socket import Run, Session

LISTEN_SEC = 1.0  # how long a run waits for its page
AWAY_SEC = 5.0  # a page that reloads is back by then
WAIT_SEC = 0.1


def listens(client: str | None) -> bool:
    """Whether a page of this client shows a live canvas."""
    return any(key[0] == client and session.socket is not None for key, session in list(live_socket.SESSIONS.items()))


def client_of_run() -> str | None:
    """The page that queued the running prompt; None for one that none did, or that is closed."""
    server = screen.server()
    client = getattr(server, "client_id", None)
    return client if client is not None and client in getattr(server, "sockets", {}) else None


def session_of(node_id: str | None, wait_sec: float = LISTEN_SEC) -> Session | None:
    """The session of the running node, if its page listens, for which this waits a moment."""
    client = client_of_run()
    if client is None or node_id is None:
        return None
    until = time.monotonic() + wait_sec
    while True:
        session = live_socket.SESSIONS.get((client, node_id))
        if session is not None and session.socket is not None:
            return session
        if time.monotonic() >= until:
            return None
        mm.throw_exception_if_processing_interrupted()
        time.sleep(WAIT_SEC / 2)


def reason_to_end(session: Session) -> str | None:
    """Why a run is over; None while it is not."""
    now, server = time.monotonic(), screen.server()
    if session.stopped:
        return "stopped"
    if server is None or server.prompt_queue.get_tasks_remaining() > 1:  # this one is among them
        return "queue"
    if session.socket is None and now - session.gone > AWAY_SEC:
        return "away"
    return "silence" if now - session.heard > session.silence_sec else None


def follow(
    session: Session, live: LiveSession, run: Run, redraw: Callable[[str, Frame], Frame], notice: Callable[[Frame], str]
) -> Frame:
    """Paint what the page sends, until the run is over. Returns the last frame, with the steps for the last image.

    redraw(text, frame): a frame with the strokes of that text. notice(frame): what to say of one. Raises what painting
    raises, but ValueErrors, which the page shows while the run goes on.
    """
    last, steps, reason = replace(run.base, steps=run.final_steps), run.final_steps, "interrupted"
    drawing: str | None = None
    session.begin(run)
    try:
        while (over := reason_to_end(session)) is None:
            mm.throw_exception_if_processing_interrupted()
            incoming = session.take(WAIT_SEC)
            if incoming is None:
                continue
            last, drawing = incoming.frame, incoming.drawing
            steps = last.steps if incoming.final else steps
            _paint(session, live, incoming)
            if (said := notice(last)) != run.message:
                run.message = said
                session.post(session.state())
        if (incoming := session.newest) is not None:  # it came with the end
            last, drawing = incoming.frame, incoming.drawing
            steps = last.steps if incoming.final else steps
        reason = over
    except mm.InterruptProcessingException:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise
    finally:
        session.end(reason)
    if drawing is not None:
        with contextlib.suppress(ValueError):  # of a page whose strokes are none
            last = redraw(drawing, last)
    return replace(last, steps=steps)


def _paint(session: Session, live: LiveSession, incoming: Incoming) -> None:
    """Send its image, unless the pen is lifted meanwhile: the last image of a stroke does not wait for one before."""
    try:
        wanted = None if incoming.final else lambda: not session.waits_for_the_last
        painted = live.paint(incoming.frame, hurried=True, wanted=wanted)
    except Outdated:
        return
    except ValueError as error:
        session.post({"type": "error", "seq": incoming.number, "message": str(error)})
        return
    session.answer(incoming.number, painted.image, painted.ms)
