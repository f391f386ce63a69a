"""Milliseconds from the end of a stroke to its image on a live canvas, in a real ComfyUI on this machine.

    python run.py python benchmarks/live.py [--strokes 40]
    python benchmarks/live.py --url http://127.0.0.1:8188 --strokes 40    # a ComfyUI that runs already

Not a test. A client draws over the canvas's own WebSocket, as a page does: each stroke is MOVES frames of one step, the
next when the last is answered, and then one of two steps, whose answer ends it. So it has all but what a page adds,
which is to read its canvas and to show a JPEG. Beside it, the way without: each stroke as a prompt of its own, from the
POST to ComfyUI's word that it is done. The last line is one JSON document.
"""

import argparse
import asyncio
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from launcher import setup  # noqa: E402
from sprint_core.images import drawing  # noqa: E402
from sprint_core.images.frames import pack, unpack  # noqa: E402
from sprint_core.weights import presets  # noqa: E402

CLIENT, NODE = "benchmark", "canvas"
MOVES = 8  # frames while the pen is down
WARM_UP = 3
AUTO = {"dtype": "auto", "time_scale": "auto", "wiring": "auto"}


def strokes(count: int) -> str:
    """A drawing of so many arcs, each elsewhere."""
    arcs = []
    for i in range(count):
        points = [
            (128 + 90 * math.sin(0.3 * i + 0.1 * j), 128 + 90 * math.cos(0.37 * i + 0.1 * j), 1.0) for j in range(9)
        ]
        flat = [round(number, 1) for point in points for number in point]
        arcs.append({"layer": "lines", "tool": "brush", "color": "#ffffff", "width": 6, "points": flat})
    return json.dumps({"version": 1, "size": [256, 256], "strokes": arcs})


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


class Page:
    """ComfyUI's WebSocket and the canvas's own."""

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
    async with aiohttp.ClientSession() as web:
        page = Page(url, web)
        page.main = await web.ws_connect(f"{url}/ws?clientId={CLIENT}", max_msg_size=0)
        page.socket = await web.ws_connect(f"{url}/sana_sprint/live?client={CLIENT}&node={NODE}", max_msg_size=0)
        run = await page.queue(prompt(True, ""))
        state = await page.live("live")
        size, ended, moving, stages = (state["width"], state["height"]), [], [], []
        sheets = [
            drawing.lines(drawing.parse(strokes(1 + i)), *size).tobytes() for i in range(count + WARM_UP)
        ]  # drawn beforehand: a page's own canvas does that
        for i, sheet in enumerate(sheets):
            begun = time.perf_counter()
            for j in range(MOVES):
                pixels = bytearray(sheet)
                pixels[: size[0] * (j + 1)] = bytes([255]) * (size[0] * (j + 1))
                stages.append(await page.frame(i * 100 + j + 1, bytes(pixels), size))
            released = time.perf_counter()
            await page.frame(i * 100 + 99, sheet, size, final=True)
            ended.append(time.perf_counter() - released)
            moving.append((released - begun) / MOVES)
        await page.socket.send_str(json.dumps({"type": "stop"}))
        await page.done(run)
        await page.socket.close()
        old = []
        for i in range(count + WARM_UP):
            text, begun = strokes(1 + i), time.perf_counter()
            await page.done(await page.queue(prompt(False, text)))
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds from a stroke to its image on a live canvas.")
    parser.add_argument("--strokes", type=int, default=40)
    parser.add_argument("--url", help="of a ComfyUI with this pack that runs already")
    arguments = parser.parse_args()
    if arguments.url:
        print(json.dumps(asyncio.run(measure(arguments.url.rstrip("/"), arguments.strokes))))
        return
    with setup.comfyui_server() as server:
        print(json.dumps(asyncio.run(measure(server.url, arguments.strokes))))


if __name__ == "__main__":
    main()
