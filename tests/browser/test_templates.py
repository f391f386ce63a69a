"""The workflows in ComfyUI's own editor, in headless Chromium."""

import json
import os
import statistics
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from comfy_client import PACK_NAME
from comfy_prompt import api_prompt

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
STROKES = 5
SHOWN = "Array.from(document.images).map(image => image.src).filter(src => src.includes('temp')).join()"
READY = "window.app?.graph && window.app.canvas && window.app.extensionManager?.command"
UNKNOWN_NODES = "app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))"


@pytest.fixture(scope="module")
def chromium():
    path = os.environ.get("SPRINT_CHROMIUM")
    if not path:
        pytest.fail("SPRINT_CHROMIUM names no browser: install Chromium, run `python run.py test`", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def editor(chromium, server):
    """ComfyUI's page, ready, without its first-run dialog; at the end no error may have come from this pack."""
    server.request("/settings", {"Comfy.TutorialCompleted": True})
    page = chromium.new_page(viewport={"width": 1400, "height": 900})
    errors = []
    page.on("console", lambda m: m.type == "error" and errors.append(f"{m.text} ({m.location['url']})"))
    page.on("pageerror", lambda error: errors.append(error.stack or str(error)))
    page.goto(server.url)
    page.wait_for_function(READY, timeout=90_000)
    yield page
    page.close()
    assert not [error for error in errors if PACK_NAME in error]


def test_template_opens_runs_and_shows_its_image(editor, workflow_names, tmp_path):
    editor.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    editor.get_by_text(PACK_NAME, exact=True).click(timeout=60_000)
    for name in workflow_names:
        editor.get_by_text(name).first.wait_for(timeout=30_000)
    editor.get_by_text("01_text_to_image").first.click()
    editor.wait_for_function("app.graph.nodes.some(node => node.type.startsWith('SanaSprint'))", timeout=30_000)
    assert editor.evaluate(UNKNOWN_NODES) == []
    editor.evaluate("() => { app.queuePrompt(0) }")
    editor.wait_for_function(
        "app.graph.nodes.some(node => node.imgs?.some(image => image.complete && image.naturalWidth > 0))",
        timeout=300_000,
    )
    editor.screenshot(path=tmp_path / "image.png")


def test_editor_sends_what_we_send(editor, server, workflow):
    ui = json.loads(workflow.read_text(encoding="utf-8"))
    theirs = editor.evaluate(
        "async ui => { await app.loadGraphData(ui); return (await app.graphToPrompt()).output }", ui
    )
    assert editor.evaluate(UNKNOWN_NODES) == []
    assert theirs == api_prompt(ui, server.object_info())


# --- drawing ----------------------------------------------------------------------------------------

WATCH = """() => {
    window.strokes = { released: 0, seconds: [] };
    addEventListener('pointerup', () => { window.strokes.released = performance.now() }, true);
    const shown = name => Array.from(document.images).some(image => image.src.includes(name) && image.complete);
    app.api.addEventListener('executed', ({ detail }) => {
        const type = app.graph.getNodeById(detail.node)?.type;
        const name = detail.output?.images?.[0]?.filename;
        const { released } = window.strokes;
        if (type !== 'PreviewImage' || !name || !released) return;
        const wait = () => shown(name) ? window.strokes.seconds.push((performance.now() - released) / 1000)
                                       : requestAnimationFrame(wait);
        window.strokes.released = 0;
        wait();
    });
}"""


def test_what_is_drawn_is_painted(editor, server, tmp_path):
    """Strokes in ComfyUI's Painter, with Run (On Change): each one gives a picture, at once. Prints the seconds."""
    server.request("/settings", {"Comfy.VueNodes.Enabled": True})
    try:
        editor.reload()
        editor.wait_for_function(READY, timeout=90_000)
        ui = json.loads((WORKFLOWS / "06_sketch.json").read_text(encoding="utf-8"))
        editor.evaluate("async ui => { await app.loadGraphData(ui) }", ui)
        canvas = editor.locator("canvas.cursor-none")
        canvas.wait_for(timeout=60_000)
        editor.evaluate("() => { app.extensionManager.command.execute('Comfy.Canvas.FitView') }")
        editor.get_by_test_id("queue-mode-menu-trigger").click()
        editor.get_by_role("menuitem", name="Run (On Change)").click()
        editor.keyboard.press("Escape")
        editor.evaluate(WATCH)
        pictures = []
        for i in range(STROKES):
            box = canvas.bounding_box()
            x, y = box["x"] + box["width"] * (0.2 + 0.1 * i), box["y"] + box["height"] * 0.3
            editor.mouse.move(x, y)
            editor.mouse.down()
            editor.mouse.move(x, y + box["height"] * 0.4, steps=8)
            editor.mouse.up()
            editor.wait_for_function(f"window.strokes.seconds.length > {i}", timeout=120_000)
            pictures.append(editor.evaluate(SHOWN))
        seconds = editor.evaluate("window.strokes.seconds")
        editor.screenshot(path=tmp_path / "sketch.png")
        print(f"stroke to picture: {[round(s, 2) for s in seconds]} s, median {statistics.median(seconds):.2f} s")
        assert len(set(pictures)) == STROKES
    finally:
        server.request("/settings", {"Comfy.VueNodes.Enabled": False})
