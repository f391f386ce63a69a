"""Milliseconds from the end of a stroke to its image on a live canvas, in a real ComfyUI on this machine.

    python run.py python benchmarks/live.py [--strokes 40]                # in headless Chromium
    python benchmarks/live.py --url http://127.0.0.1:8188 --strokes 40    # a ComfyUI that runs already, no page

Not a test. In Chromium the mouse draws on the canvas: from the pointer's release to the frame that shows the image of
two steps, and how many of one step it shows in between. Without the page a client sends over the canvas's own WebSocket
what a page sends: each stroke is MOVES frames of one step, the next when the last is answered, and then one of two.
Beside it, the way without a live canvas: each stroke as a prompt of its own, from the POST to ComfyUI's word that it is
done. The last line is one JSON document.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

from benchmarks.arcs import MOVES, WARM_UP, arc, strokes  # noqa: E402
from launcher import setup  # noqa: E402
from launcher.browser import chromium  # noqa: E402
from sprint_core.images import drawing  # noqa: E402
from sprint_core.images.frames import pack, unpack  # noqa: E402
from sprint_core.weights import presets  # noqa: E402

CLIENT, NODE = "benchmark", "canvas"
MOUSE_MOVES, MOUSE_MS = 60, 16  # of a stroke in the page, and between two of them
AUTO = {"dtype": "auto", "time_scale": "auto", "wiring": "auto"}


def prompt(live: bool, text: str) -> dict:
    inputs = {
        "model": ["loader", 0], "clip": ["loader", 1], "vae": ["loader", 2], "control_net": ["control", 0],
        "text": "a red apple", "seed": 7, "mode": "lines", "size": "auto", "steps": 1, "final_steps": 2,
        "guidance": presets.GUIDANCE, "strength": 1.0, "denoise": 0.6, "live": live, "drawing": text,
    }  # fmt: skip
    control = {"control_net": presets.BUNDLED_CONTROL_NAME} | AUTO
    return {
        "loader": {"class_type": "SanaSprintLoader", "inputs": {"model": presets.BUNDLED_NAME, "dtype": "auto"}},
        "control": {"class_type": "SanaSprintControlNetLoader", "inputs": control},
        NODE: {"class_type": "SanaSprintLiveCanvas", "inputs": inputs},
        "show": {"class_type": "PreviewImage", "inputs": {"images": [NODE, 0]}},
    }


class Line:
    """ComfyUI's WebSocket and the canvas's own, without a page."""

    main: aiohttp.ClientWebSocketResponse
    socket: aiohttp.ClientWebSocketResponse

    def __init__(self, url: str, web: aiohttp.ClientSession):
        self.url, self.web = url, web

    async def queue(self, body: dict) -> str:
        async with self.web.post(f"{self.url}/prompt", json={"prompt": body, "client_id": CLIENT}) as reply:
            return (await reply.json())["prompt_id"]

    async def done(self, run: str) -> None:
        async for message in self.main:
            if message.type == aiohttp.WSMsgType.TEXT:
                event = json.loads(message.data)
                if event["type"] in ("execution_success", "execution_error") and event["data"]["prompt_id"] == run:
                    return

    async def live(self, state: str) -> dict:
        async for message in self.socket:
            if message.type == aiohttp.WSMsgType.TEXT and (data := json.loads(message.data)).get("state") == state:
                return data
        raise ConnectionError("the line closed")

    async def frame(self, number: int, pixels: bytes, size: tuple[int, int], **header: Any) -> dict:
        """Send a frame and wait for its image. Returns the answer's header."""
        start = {"seq": number, "width": size[0], "height": size[1], "lines": True}
        await self.socket.send_bytes(pack(start | header, pixels))
        async for message in self.socket:
            if message.type == aiohttp.WSMsgType.BINARY and (answer := unpack(message.data)[0]).get("seq") == number:
                return answer
        raise ConnectionError("the line closed")


async def measure(url: str, count: int) -> dict:
    """Without a page."""
    async with aiohttp.ClientSession() as web:
        line = Line(url, web)
        line.main = await web.ws_connect(f"{url}/ws?clientId={CLIENT}", max_msg_size=0)
        line.socket = await web.ws_connect(f"{url}/sana_sprint/live?client={CLIENT}&node={NODE}", max_msg_size=0)
        run = await line.queue(prompt(True, ""))
        state = await line.live("live")
        size, ended, moving, stages = (state["width"], state["height"]), [], [], []
        sheets = [
            drawing.lines(drawing.parse(strokes(1 + i)), *size).tobytes() for i in range(count + WARM_UP)
        ]  # drawn beforehand: a page's own canvas does that
        for i, sheet in enumerate(sheets):
            begun = time.perf_counter()
            for j in range(MOVES):
                pixels = bytearray(sheet)
                pixels[: size[0] * (j + 1)] = bytes([255]) * (size[0] * (j + 1))
                stages.append(await line.frame(i * 100 + j + 1, bytes(pixels), size))
            released = time.perf_counter()
            await line.frame(i * 100 + 99, sheet, size, final=True)
            ended.append(time.perf_counter() - released)
            moving.append((released - begun) / MOVES)
        await line.socket.send_str(json.dumps({"type": "stop"}))
        await line.done(run)
        await line.socket.close()
        old = []
        for i in range(count + WARM_UP):
            text, begun = strokes(1 + i), time.perf_counter()
            await line.done(await line.queue(prompt(False, text)))
            old.append(time.perf_counter() - begun)
    names = stages[0]["ms"]
    return {
        "strokes": count,
        "stroke_ms": round(1000 * statistics.median(ended[WARM_UP:]), 1),
        "images_per_second": round(1 / statistics.median(moving[WARM_UP:]), 2),
        "old_path_ms": round(1000 * statistics.median(old[WARM_UP:]), 1),
        "stages": {
            name: round(statistics.median(s["ms"][name] for s in stages[WARM_UP * MOVES :]), 2) for name in names
        },
    }


# Notes of each stroke when its image was seen, and how many were seen on the way.
WATCH = """() => {
    const canvas = name => document.querySelector(`.sana-sprint-canvas ${name}`);
    const seen = window.seen = { strokes: [], on: null };
    seen.next = () => new Promise(done => seen.done = done);
    canvas('.drawing').addEventListener('pointerdown', e => seen.on = { down: e.timeStamp, images: 0 }, true);
    canvas('.drawing').addEventListener('pointerup', e => seen.on.up = e.timeStamp, true);
    new MutationObserver(() => { if (seen.on && !seen.on.up) seen.on.images++ })
        .observe(canvas('.ms'), { childList: true });
    new MutationObserver(() => {
        const { on } = seen;
        if (!on?.up || canvas('.picture').getAttribute('aria-busy') !== 'false') return;
        seen.on = null;
        requestAnimationFrame(() => seen.done(seen.strokes.push({ ...on, end: performance.now() })));
    }).observe(canvas('.picture'), { attributeFilter: ['aria-busy'] });
}"""


def measure_page(server: Any, count: int) -> dict:
    """In headless Chromium, drawn by mouse."""
    import sheet
    from editor import launch_chromium, open_editor
    from playwright.sync_api import sync_playwright

    path = chromium() or sys.exit("no Chromium or Chrome found")
    ways = [j / MOUSE_MOVES for j in range(MOUSE_MOVES + 1)]
    with sync_playwright() as playwright:
        browser = launch_chromium(playwright, path)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        open_editor(page, server)
        values = {"text": "a red apple", "seed": 7, "control_after_generate": "fixed", "mode": "lines"}
        sheet.build(page, presets.BUNDLED_NAME, presets.BUNDLED_CONTROL_NAME, **values)
        sheet.go_live(page)
        sheet.wait_until_painted(page)
        page.evaluate(WATCH)
        box = page.locator(f"{sheet.CANVAS} .drawing").bounding_box()
        assert box
        for i in range(count + WARM_UP):
            (x, y), *rest = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in arc(i, ways)]
            page.mouse.move(x, y)
            page.mouse.down()
            for x, y in rest:
                page.mouse.move(x, y)
                page.wait_for_timeout(MOUSE_MS)
            page.evaluate("() => { seen.shown = seen.next() }")
            page.mouse.up()
            page.evaluate("() => seen.shown")
        seen = page.evaluate("seen.strokes")[WARM_UP:]
        browser.close()
    return {
        "stroke_ms": round(statistics.median(one["end"] - one["up"] for one in seen), 1),
        "images_per_second": round(
            statistics.median(1000 * one["images"] / (one["up"] - one["down"]) for one in seen), 2
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds from a stroke to its image on a live canvas.")
    parser.add_argument("--strokes", type=int, default=40)
    parser.add_argument("--url", help="of a ComfyUI with this pack that runs already")
    arguments = parser.parse_args()
    if arguments.url:
        print(json.dumps(asyncio.run(measure(arguments.url.rstrip("/"), arguments.strokes))))
        return
    with setup.comfyui_server() as server:
        page = measure_page(server, arguments.strokes)
        client = asyncio.run(measure(server.url, arguments.strokes))
        own = {name: client.pop(name) for name in page}
        print(json.dumps({"strokes": client.pop("strokes"), **page, **client, "without_page": own}))


if __name__ == "__main__":
    main()
