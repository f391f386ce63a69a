"""The workflows in ComfyUI's own editor, in headless Chromium."""

import json
import statistics
from pathlib import Path

from launcher.prompt import api_prompt
from launcher.setup import PACK_NAME

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
STROKES = 5
SHOWN = "Array.from(document.images).map(image => image.src).filter(src => src.includes('temp')).join()"
UNKNOWN_NODES = "app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))"


def test_template_opens_runs_and_shows_its_image(editor, workflow_names, tmp_path):
    editor.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    editor.get_by_text(PACK_NAME, exact=True).click(timeout=60_000)
    for name in workflow_names:
        editor.get_by_text(name).first.wait_for(timeout=30_000)
    editor.get_by_text("SANA-Sprint 01 Text to Image").first.click()
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


def test_what_is_drawn_is_painted(editor, setting, tmp_path):
    """Strokes in ComfyUI's Painter, with Run (On Change): each one gives an image, at once. Prints the seconds."""
    setting("Comfy.VueNodes.Enabled", True, before=False)
    ui = json.loads((WORKFLOWS / "SANA-Sprint 06 Sketch to Image.json").read_text(encoding="utf-8"))
    editor.evaluate("async ui => { await app.loadGraphData(ui) }", ui)
    canvas = editor.locator("canvas.cursor-none")
    canvas.wait_for(timeout=60_000)
    editor.evaluate("() => { app.extensionManager.command.execute('Comfy.Canvas.FitView') }")
    editor.get_by_test_id("queue-mode-menu-trigger").click()
    editor.get_by_role("menuitem", name="Run (On Change)").click()
    editor.keyboard.press("Escape")
    editor.evaluate(WATCH)
    sources = []
    for i in range(STROKES):
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] * (0.2 + 0.1 * i), box["y"] + box["height"] * 0.3
        editor.mouse.move(x, y)
        editor.mouse.down()
        editor.mouse.move(x, y + box["height"] * 0.4, steps=8)
        editor.mouse.up()
        editor.wait_for_function(f"window.strokes.seconds.length > {i}", timeout=120_000)
        sources.append(editor.evaluate(SHOWN))
    seconds = editor.evaluate("window.strokes.seconds")
    editor.screenshot(path=tmp_path / "sketch.png")
    print(f"stroke to image: {[round(s, 2) for s in seconds]} s, median {statistics.median(seconds):.2f} s")
    assert len(set(sources)) == STROKES
