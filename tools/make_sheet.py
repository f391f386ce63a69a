"""One contact sheet of all templates in both renderers, as ComfyUI's own page draws them: classic, then Nodes 2.0.

    python run.py python tools/make_sheet.py [SHEET.png] [NAME ...]

Look at it before a release. It also prints what overlaps, and the nodes that have become larger than they were saved.
Needs Chromium.
"""

import io
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

from editor import BOXES, launch_chromium, open_editor, overlaps, plain_canvas, wait_until_ready  # noqa: E402
from playwright.sync_api import Page, sync_playwright  # noqa: E402

from launcher import setup  # noqa: E402
from launcher.browser import chromium  # noqa: E402
from launcher.client import Client  # noqa: E402

VIEW = {"width": 1600, "height": 720}
TILE_PX, LABEL_PX, COLUMNS = (1600, 720), 28, 2
FULL_TEXT = {"LiteGraph.Canvas.MinFontSizeForLOD": 0}  # draw words however small the graph
RENDERERS = {"classic": False, "Nodes 2.0": True}
OPEN = "async ui => { await app.loadGraphData(ui); app.extensionManager.command.execute('Comfy.Canvas.FitView') }"
# A live canvas paints its drawing once, rather than wait a minute for another.
RUN = """() => {
    window.over = false;
    for (const node of app.graph.nodes)
        for (const widget of node.widgets ?? []) if (widget.name === 'live') widget.value = false;
    for (const end of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(end, () => { window.over = true }, { once: true });
    app.queuePrompt(0);
}"""
SETTLE_MS, RUN_MS = 1500, 120_000
LATE_MS = 5000  # the page's first graph may come late, and take another's place


def photograph(page: Page, ui: dict) -> Image.Image:
    """The graph as it is once it has run; of models that are not there, as it opens."""
    page.evaluate(OPEN, ui)
    page.wait_for_timeout(SETTLE_MS)
    if not any(node["properties"].get("models") for node in ui["nodes"]):
        page.evaluate(RUN)
        page.wait_for_function("window.over", timeout=RUN_MS)
    else:
        page.keyboard.press("Escape")  # what tells of missing models
    page.wait_for_timeout(SETTLE_MS)
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def outgrown(page: Page, ui: dict) -> list[str]:
    """Nodes that are larger than they were saved: {type: size now}."""
    saved = {str(node["id"]): (node["type"], *node["size"]) for node in ui["nodes"]}
    lines = []
    for name, left, top, right, bottom in page.evaluate(BOXES):
        kind, width, height = saved[name.split()[0]]
        if right - left > width + 1 or bottom - top > height + 31:
            lines.append(f"{kind}: {right - left:.0f} x {bottom - top - 30:.0f}, saved {width} x {height}")
    return lines


def sheet(tiles: list[tuple[str, Image.Image]]) -> Image.Image:
    """The photographs under their names, in rows of COLUMNS."""
    width, height = TILE_PX
    rows = -(-len(tiles) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * width, rows * (height + LABEL_PX)), "#101010")
    pen = ImageDraw.Draw(whole)
    for i, (label, image) in enumerate(tiles):
        x, y = i % COLUMNS * width, i // COLUMNS * (height + LABEL_PX)
        pen.text((x + 8, y + 4), label, "#e0e0e0", ImageFont.load_default(18))
        whole.paste(image.resize(TILE_PX), (x, y + LABEL_PX))
    return whole


def photograph_all(page: Page, server: Client, workflows: list[Path]) -> list[tuple[str, Image.Image]]:
    """Each template in each renderer, under its name."""
    before = server.json("/settings").get("Comfy.VueNodes.Enabled", False)
    tiles = []
    for renderer, on in RENDERERS.items():
        server.request("/settings", {"Comfy.VueNodes.Enabled": on, **FULL_TEXT})
        page.reload()
        wait_until_ready(page)
        page.wait_for_timeout(LATE_MS)
        for workflow in workflows:
            ui = json.loads(workflow.read_text(encoding="utf-8"))
            tiles.append((f"{workflow.stem}: {renderer}", photograph(page, ui)))
            for line in (*overlaps(page), *outgrown(page, ui)):
                print(f"{tiles[-1][0]}: {line}", flush=True)
    server.request("/settings", {"Comfy.VueNodes.Enabled": before, "LiteGraph.Canvas.MinFontSizeForLOD": 8})
    return tiles


def main() -> None:
    out, *names = sys.argv[1:] or ["templates.png"]
    workflows = [file for file in sorted((ROOT / "workflows").glob("*.json")) if not names or file.stem in names]
    path = chromium() or sys.exit("no Chromium or Chrome found")
    with setup.comfyui_server() as server, sync_playwright() as playwright, plain_canvas(server):
        browser = launch_chromium(playwright, path)
        page = browser.new_page(viewport=VIEW)
        open_editor(page, server)
        sheet(photograph_all(page, server, workflows)).save(out)
        browser.close()


if __name__ == "__main__":
    main()
