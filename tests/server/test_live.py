"""The live canvas of a running server over real WebSockets: as a page draws, stops, breaks off and misbehaves."""

import asyncio
import contextlib
import io
import json
import struct
import time

import aiohttp
import numpy as np
import pytest
from api_prompts import BUNDLED, graph
from PIL import Image

from sprint_core.images import drawing
from sprint_core.weights import presets

SIDE = 256
PATIENCE_SEC = 120
NODE = "canvas"


def strokes(x: int = 200) -> str:
    stroke = {"layer": "lines", "tool": "brush", "color": "#ffffff", "width": 9, "points": [40, 40, 1, x, 160, 1]}
    return json.dumps({"version": 1, "size": [SIDE, SIDE], "strokes": [stroke]})


def lines(text: str) -> bytes:
    return drawing.lines(drawing.parse(text), SIDE, SIDE).tobytes()


def prompt(**inputs) -> dict:
    inputs = {
        "model": ["loader", 0], "clip": ["loader", 1], "vae": ["loader", 2], "control_net": ["control", 0],
        "text": "a red apple", "seed": 7, "mode": "lines", "size": "auto", "steps": 1, "final_steps": 2,
        "guidance": 4.5, "strength": 1.0, "denoise": 0.6, "live": True, "drawing": strokes(),
    } | inputs  # fmt: skip
    control = {"control_net": presets.BUNDLED_CONTROL_NAME, "dtype": "auto", "time_scale": "auto", "wiring": "auto"}
    return {
        "loader": {"class_type": "SanaSprintLoader", "inputs": {"model": BUNDLED, "dtype": "auto"}},
        "control": {"class_type": "SanaSprintControlNetLoader", "inputs": control},
        NODE: {"class_type": "SanaSprintLiveCanvas", "inputs": {k: v for k, v in inputs.items() if v is not None}},
        "save": {"class_type": "SaveImage", "inputs": {"images": [NODE, 0], "filename_prefix": "live"}},
    }


def message(header: dict, pixels: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack(">I", len(text)) + text + pixels


class Page:
    """A browser's page: ComfyUI's own WebSocket, and that of one node."""

    def __init__(self, server, client: str):
        self.server, self.client = server, client
        self.states, self.errors, self.answers = [], [], []

    async def open(self) -> "Page":
        self.web = aiohttp.ClientSession()
        self.main = await self.web.ws_connect(f"{self.server.url}/ws?clientId={self.client}")
        return self

    async def listen(self, silence: float | None = None, **options) -> None:
        url = f"{self.server.url}/sana_sprint/live?client={self.client}&node={NODE}"
        url += "" if silence is None else f"&silence={silence}"
        self.socket = await self.web.ws_connect(url, **options)
        self.reader = asyncio.ensure_future(self._read(self.socket))

    async def _read(self, socket) -> None:
        async for one in socket:
            if one.type == aiohttp.WSMsgType.BINARY:
                end = 4 + struct.unpack(">I", one.data[:4])[0]
                self.answers.append((json.loads(one.data[4:end]), one.data[end:]))
            else:
                data = json.loads(one.data)
                (self.errors if data["type"] == "error" else self.states).append(data)

    async def draw(self, number: int, pixels: bytes | None = None, **header) -> None:
        pixels = lines(strokes()) if pixels is None else pixels
        start = {"seq": number, "width": SIDE, "height": SIDE, "lines": True}
        await self.socket.send_bytes(message(start | header, pixels))

    async def queue(self, prompt: dict) -> str:
        body = {"prompt": prompt, "client_id": self.client}
        async with self.web.post(f"{self.server.url}/prompt", json=body) as reply:
            return (await reply.json())["prompt_id"]

    async def until(self, check):
        """The first true value of check(), a function of what has come."""
        end = time.monotonic() + PATIENCE_SEC
        while not (value := check()):
            assert time.monotonic() < end, (self.states, self.errors, [header for header, _ in self.answers])
            await asyncio.sleep(0.02)
        return value

    async def state(self, name: str) -> dict:
        return await self.until(lambda: next((s for s in self.states if s["state"] == name), None))

    async def answer(self, number: int) -> tuple[dict, np.ndarray]:
        header, data = await self.until(lambda: next((a for a in self.answers if a[0].get("seq") == number), None))
        return header, np.asarray(Image.open(io.BytesIO(data)))

    async def close(self) -> None:
        await self.web.close()


@contextlib.asynccontextmanager
async def drawing_page(server, client: str, silence: float | None = None, **inputs):
    """A page whose run is live, and the run's id."""
    page = await Page(server, client).open()
    try:
        await page.listen(silence)
        await page.state("waiting")
        run = await page.queue(prompt(**inputs))
        await page.state("live")
        yield page, run
    finally:
        await page.close()


def saved(server, run: str) -> np.ndarray:
    """The image that a run saved."""
    (image,) = server.images(server.wait(run, timeout=PATIENCE_SEC))
    return np.asarray(Image.open(io.BytesIO(server.view(image))))


def still(server, **inputs) -> np.ndarray:
    """What the same run saves without a page."""
    return saved(server, server.queue(prompt(**inputs)))


def scenario(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 3 * PATIENCE_SEC))


def test_a_run_without_a_page_ends_by_itself_with_the_same_bytes(server):
    before = time.monotonic()
    first = still(server, seed=11)
    assert time.monotonic() - before < PATIENCE_SEC
    assert np.array_equal(first, still(server, seed=11, live=False))


def test_the_picture_follows_the_pen_until_stop(server):
    other = strokes(90)

    async def run():
        async with drawing_page(server, "pen") as (page, run):
            live = await page.state("live")
            assert (live["width"], live["height"], live["message"]) == (SIDE, SIDE, "")
            await page.draw(1, text="a banana", steps=1)
            header, picture = await page.answer(1)
            assert picture.shape == (SIDE, SIDE, 3) and header["format"] == "jpeg"
            assert set(header["ms"]) == {"text", "control", "steps", "decode", "encode", "total"}
            assert header["ms"]["text"] > 0 and header["ms"]["control"] > 0
            await page.draw(2, lines(other), text="a banana", final=True, drawing=other)
            header, painted = await page.answer(2)
            assert header["ms"]["text"] < 5 and not np.array_equal(painted, picture)
            await page.socket.send_str('{"type": "stop"}')
            ended = await page.state("ended")
            _, last = await page.answer(0)
            return run, ended["reason"], painted, last

    run_id, reason, painted, last = scenario(run())
    assert reason == "stopped"
    image = saved(server, run_id)
    assert np.array_equal(image, still(server, text="a banana", drawing=other, live=False))
    assert np.abs(painted.astype(int) - last).mean() < 0.1  # another number of threads may change the last bits
    assert np.abs(painted.astype(int) - image).mean() < 3


def test_the_last_image_of_a_stroke_does_not_wait(server):
    """A frame of a moving pen that is being painted is given up for that of the lifted one, and answered no more."""

    async def run():
        async with drawing_page(server, "lifted") as (page, _):
            await page.draw(1, steps=4, seed=1)
            header, _ = await page.answer(1)
            for number in range(10, 16):
                await page.draw(number, steps=4, seed=number)
                await asyncio.sleep(header["ms"]["total"] / 4000)  # it has begun by then
                await page.draw(100 + number, steps=1, seed=number, final=True)
                await page.answer(100 + number)
            return [header["seq"] for header, _ in page.answers]

    answered = scenario(run())
    assert [number for number in answered if number >= 100] == list(range(110, 116))
    assert len([number for number in answered if 10 <= number < 16]) <= 2


def test_frames_of_a_lifted_pen_are_all_painted(server):
    """As when a slider moves: none of them gives up the one before."""

    async def run():
        async with drawing_page(server, "slider") as (page, _):
            await page.draw(1, seed=1, final=True)
            await page.answer(1)
            await page.draw(2, seed=2, final=True)
            await asyncio.sleep(0.03)
            await page.draw(3, seed=3, final=True)
            await page.answer(3)
            return [header["seq"] for header, _ in page.answers]

    assert scenario(run()) == [1, 2, 3]


def test_another_prompt_ends_it_and_the_image_is_saved(server):
    async def run():
        async with drawing_page(server, "queue") as (page, run):
            await page.draw(1)
            await page.answer(1)
            other = await page.queue(graph())
            return run, other, (await page.state("ended"))["reason"]

    run_id, other, reason = scenario(run())
    assert reason == "queue"
    assert np.array_equal(saved(server, run_id), still(server, live=False))
    assert server.images(server.wait(other, timeout=PATIENCE_SEC))


def test_interrupting_it_ends_it_without_an_image(server):
    async def run():
        async with drawing_page(server, "interrupt") as (page, run):
            async with page.web.post(f"{server.url}/interrupt", json={}):
                pass
            return run, (await page.state("ended"))["reason"]

    run_id, reason = scenario(run())
    assert reason == "interrupted"
    deadline = time.monotonic() + PATIENCE_SEC
    while run_id not in (history := server.json(f"/history/{run_id}")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not history[run_id]["outputs"] and still(server).shape == (SIDE, SIDE, 3)


def test_silence_and_a_closed_page_end_it(server):
    async def silent():
        async with drawing_page(server, "silent", silence=1) as (page, run):
            return run, (await page.state("ended"))["reason"]

    async def away():
        async with drawing_page(server, "away") as (page, run):
            await page.draw(1, seed=8)
            await page.answer(1)
        return run

    run_id, reason = scenario(silent())
    assert reason == "silence" and saved(server, run_id).shape == (SIDE, SIDE, 3)
    assert np.array_equal(saved(server, scenario(away())), still(server, seed=8, live=False))


def test_a_lost_line_comes_back_to_the_same_run(server):
    async def run():
        async with drawing_page(server, "lost") as (page, run):
            await page.draw(1)
            await page.answer(1)
            await page.socket.close()
            page.states.clear()
            await page.listen()
            await page.state("live")
            await page.draw(2, seed=9)
            header, _ = await page.answer(2)
            await page.socket.send_str('{"type": "stop"}')
            await page.state("ended")
            return run, header

    run_id, header = scenario(run())
    assert header["ms"]["text"] < 5  # the session was kept
    assert saved(server, run_id).shape == (SIDE, SIDE, 3)


def test_a_second_tab_takes_the_node_and_the_first_is_told(server):
    async def run():
        async with drawing_page(server, "tabs") as (page, run):
            first = page.socket
            second = await Page(server, "tabs").open()
            await second.listen()
            await second.state("live")
            await page.state("taken")
            await page.until(lambda: first.closed)
            await second.draw(1)
            await second.answer(1)
            await second.socket.send_str('{"type": "stop"}')
            await second.state("ended")
            await second.close()
            return run, first.close_code

    run_id, code = scenario(run())
    assert code == 4001 and saved(server, run_id).shape == (SIDE, SIDE, 3)


def test_without_a_controlnet_the_page_is_told_and_it_paints(server):
    async def run():
        async with drawing_page(server, "without", control_net=None) as (page, run):
            said = (await page.state("live"))["message"]
            await page.draw(1)
            await page.answer(1)
            await page.socket.send_str('{"type": "stop"}')
            await page.state("ended")
            return run, said

    run_id, said = scenario(run())
    assert said.startswith("no CONTROL_NET is connected") and saved(server, run_id).shape == (SIDE, SIDE, 3)


BAD = {
    "broken JSON": (struct.pack(">I", 3) + b"{a}", "frame: its header is not JSON"),
    "no header": (b"ab", "frame: its header is longer than the message"),
    "long header": (struct.pack(">I", 2**31) + b"{}", "frame: its header is longer than the message"),
    "too few pixels": (
        message({"seq": 1, "width": 256, "height": 256, "lines": True}, b"1"),
        "frame: 1 bytes of pixels",
    ),
    "other size": (message({"seq": 1, "width": 64, "height": 64}), "frame: its size is 64 x 64, not 256 x 256"),
    "no multiple": (message({"seq": 1, "width": 250, "height": 256}), "frame: its size is 250 x 256; sides are"),
    "NaN": (message({"seq": 1, "width": 256, "height": 256, "strength": float("nan")}), "frame: its strength is nan"),
    "text": ("draw", "message: not an object of JSON"),
    "unknown": ('{"type": "go"}', "message: its type is 'go', not 'stop'"),
}


def test_what_is_no_frame_is_refused_and_the_run_goes_on(server):
    async def run():
        async with drawing_page(server, "bad") as (page, run):
            for bad, _ in BAD.values():
                for _ in range(2):
                    await (page.socket.send_str(bad) if isinstance(bad, str) else page.socket.send_bytes(bad))
            await page.until(lambda: len(page.errors) == 2 * len(BAD))
            await page.draw(5, text="(a:1e9) weight")
            await page.until(lambda: len(page.errors) > 2 * len(BAD))
            await page.draw(6)
            await page.answer(6)
            await page.socket.send_str('{"type": "stop"}')
            await page.state("ended")
            return run, [error["message"] for error in page.errors]

    before = server.log_text().count("frame: its header is not JSON")
    run_id, errors = scenario(run())
    for (_, words), told in zip(BAD.values(), errors[:-1:2], strict=True):
        assert told.startswith(words)
    assert "a weight in the prompt is 1e+09" in errors[-1]
    assert np.array_equal(saved(server, run_id), still(server, live=False))
    assert server.log_text().count("frame: its header is not JSON") == before + 1


def test_a_message_of_100_mb_closes_the_line_and_nothing_else(server):
    async def run():
        async with drawing_page(server, "huge") as (page, run):
            with contextlib.suppress(ConnectionError):
                await page.socket.send_bytes(bytes(100 * 2**20))
            await page.until(lambda: page.socket.closed)
            code = page.socket.close_code
            page.states.clear()
            await page.listen()
            await page.state("live")
            await page.draw(1)
            await page.answer(1)
            await page.socket.send_str('{"type": "stop"}')
            await page.state("ended")
            return run, code

    run_id, code = scenario(run())
    assert code in (1009, 1006) and saved(server, run_id).shape == (SIDE, SIDE, 3)
    assert "frame: larger than" in server.log_text()


@pytest.mark.parametrize(
    ("query", "origin", "status"),
    [
        ("client=known&node=1", "http://evil.example", 403),
        ("client=known&node=1", "null", 403),
        ("client=stranger&node=1", None, 4003),
        ("client=known", None, 400),
        ("client=known&node=" + "1" * 300, None, 400),
        ("client=known&node=1", "own", 101),
    ],
)
def test_strangers_are_refused(server, query, origin, status):
    async def run():
        page = await Page(server, "known").open()
        headers = {} if origin is None else {"Origin": server.url if origin == "own" else origin}
        try:
            socket = await page.web.ws_connect(f"{server.url}/sana_sprint/live?{query}", headers=headers)
            with contextlib.suppress(TimeoutError):
                await socket.receive(1)  # the state, or the end
            await socket.close()
            return socket.close_code if socket.close_code in range(4000, 5000) else 101
        except aiohttp.WSServerHandshakeError as error:
            return error.status
        finally:
            await page.close()

    assert scenario(run()) == status
