"""Open template 01 in a real ComfyUI, run it, and photograph its graph for the README: assets/graph.png.

    python run.py python tools/make_graph.py

Not a test: run it when that workflow, its nodes or the bundled model change, and look at the image. Needs Chromium.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

from editor import graph_clip, launch_chromium, open_editor, plain_canvas  # noqa: E402
from playwright.sync_api import Page, sync_playwright  # noqa: E402

from launcher import setup  # noqa: E402
from launcher.browser import chromium  # noqa: E402

MARGIN_PX = 24
SHOWN = "app.graph.nodes.some(node => node.imgs?.some(image => image.complete && image.naturalWidth > 0))"


def photograph(page: Page, ui: dict, path: Path) -> None:
    """The graph of a workflow after a run, as large as the page allows."""
    page.evaluate("async ui => { await app.loadGraphData(ui) }", ui)
    page.evaluate("() => { app.queuePrompt(0) }")
    page.wait_for_function(SHOWN, timeout=300_000)
    page.evaluate("() => { app.extensionManager.command.execute('Comfy.Canvas.FitView') }")
    page.wait_for_timeout(3000)  # the view glides there, and messages fade
    page.screenshot(path=path, clip=graph_clip(page, MARGIN_PX))


def main() -> None:
    ui = json.loads((ROOT / "workflows" / "SANA-Sprint 01 Text to Image.json").read_text(encoding="utf-8"))
    path = chromium() or sys.exit("no Chromium or Chrome found")
    with setup.comfyui_server() as server, sync_playwright() as playwright, plain_canvas(server):
        browser = launch_chromium(playwright, path)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        open_editor(page, server)
        photograph(page, ui, ROOT / "assets" / "graph.png")
        browser.close()


if __name__ == "__main__":
    main()
