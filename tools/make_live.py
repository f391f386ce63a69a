"""Draw on the live canvas in ComfyUI's own page, and film it for the README: assets/live.gif.

    python run.py python tools/make_live.py

Not a test: run it when the canvas, its template or the bundled model change, and watch it. Needs Chromium.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

import sheet  # noqa: E402
from editor import launch_chromium, open_editor, plain_canvas  # noqa: E402

from launcher import setup  # noqa: E402
from launcher.browser import chromium  # noqa: E402
from tools.template_drawings import CAP, SIDE_PX, STEM  # noqa: E402

TEMPLATE = ROOT / "workflows" / "SANA-Sprint 06 Sketch to Image.json"
FILM = ROOT / "assets" / "live.gif"
WIDTH_PX, COLOURS = 640, 128  # of the film
FRAME_MS, LAST_MS = 110, 1500
MOVES = 14  # of the mouse along one stroke, with one frame of the film for each
STROKES = [[(x / SIDE_PX, y / SIDE_PX) for x, y in points] for points in (CAP, STEM)]
TO_THE_CANVAS = """() => {
    const [x, y] = app.graph.nodes.find(node => node.type === 'SanaSprintLiveCanvas').pos;
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [100 - x, 60 - y];
    app.canvas.setDirty(true, true);
}"""
PROMPTS = ("an umbrella", "a jellyfish", "a mushroom")


def photograph(page: Page) -> Image.Image:
    clip = page.locator(f"{sheet.CANVAS} .stage").bounding_box()
    image = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    return image.resize((WIDTH_PX, round(image.height * WIDTH_PX / image.width)), Image.Resampling.LANCZOS)


def along(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """MOVES + 1 points on the way from point to point."""
    ways = np.linspace(0, len(points) - 1, MOVES + 1)
    x, y = (np.interp(ways, range(len(points)), side) for side in zip(*points, strict=True))
    return list(zip(x.tolist(), y.tolist(), strict=True))


def film_stroke(page: Page, points: list[tuple[float, float]]) -> list[Image.Image]:
    """Draw with the mouse, photographing after each move; at last the picture of the lifted pen."""
    box = page.locator(f"{sheet.CANVAS} .drawing").bounding_box()
    assert box
    (x, y), *rest = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in along(points)]
    page.mouse.move(x, y)
    page.mouse.down()
    frames = []
    for x, y in rest:
        page.mouse.move(x, y)
        page.wait_for_timeout(FRAME_MS)
        frames.append(photograph(page))
    page.mouse.up()
    sheet.wait_until_painted(page)
    return [*frames, *[photograph(page)] * 4]


def film(page: Page) -> list[Image.Image]:
    """A mushroom is drawn, and becomes what else has its outline."""
    sheet.press(page, "clear")
    sheet.go_live(page)
    frames = [photograph(page)] * 3
    for points in STROKES:
        frames += film_stroke(page, points)
    for words in PROMPTS:
        sheet.set_value(page, "text", words)
        page.wait_for_timeout(300)
        sheet.wait_until_painted(page)
        frames += [photograph(page)] * 8
    page.locator(f"{sheet.CANVAS} .go").click()
    return frames


def save(frames: list[Image.Image]) -> None:
    shown = Image.new("RGB", (WIDTH_PX, frames[0].height * len(frames[::8])))
    for i, frame in enumerate(frames[::8]):
        shown.paste(frame, (0, i * frame.height))
    palette = shown.quantize(COLOURS)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    times = [FRAME_MS] * len(rest) + [LAST_MS]
    first.save(FILM, save_all=True, append_images=rest, duration=times, loop=0, optimize=True)
    print(f"{FILM.name}: {len(frames)} frames, {FILM.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    ui = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    path = chromium() or sys.exit("no Chromium or Chrome found")
    with setup.comfyui_server() as server, sync_playwright() as playwright, plain_canvas(server):
        browser = launch_chromium(playwright, path)
        page = browser.new_page(viewport={"width": 1400, "height": 1200})
        open_editor(page, server)
        page.wait_for_timeout(3000)  # the page's first graph may come late
        page.evaluate("async ui => { await app.loadGraphData(ui) }", ui)
        page.evaluate(TO_THE_CANVAS)
        page.locator(f"{sheet.CANVAS} .drawing").wait_for(timeout=60_000)
        save(film(page))
        browser.close()


if __name__ == "__main__":
    main()
