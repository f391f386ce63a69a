"""The sheet of the live canvas in ComfyUI's page, in both of its renderers."""

import json
from pathlib import Path

import numpy as np
import pytest
import sheet

from sprint_core.images import drawing as drawings
from sprint_core.weights.presets import BUNDLED_NAME

ROOT = Path(__file__).resolve().parents[2]
CONTROL = f"{BUNDLED_NAME} ControlNet"
RED_SQUARE = {"text": "a red square", "seed": 4, "control_after_generate": "fixed", "mode": "lines"}


@pytest.fixture(params=["classic", "nodes2"])
def page(request, editor, setting):
    """The editor with one live canvas, in each renderer."""
    if request.param == "nodes2":
        setting("Comfy.VueNodes.Enabled", True, before=False)
    sheet.build(editor, BUNDLED_NAME, CONTROL, **RED_SQUARE)
    yield editor
    editor.evaluate("() => app.graph.clear()")  # closes the connection, and with it what is live


def test_keys_stay_in_the_canvas(page):
    """B, E, [, ] and Ctrl+Z act on the drawing; ComfyUI undoes nothing of the graph."""
    page.evaluate("() => { app.graph.add(Object.assign(LiteGraph.createNode('Note'), { pos: [0, -400] })) }")
    page.mouse.click(1200, 750)  # ComfyUI notes the change, which an undo would take back
    sheet.stroke(page, (0.2, 0.2), (0.8, 0.2))
    sheet.stroke(page, (0.2, 0.4), (0.8, 0.4))
    drawn = sheet.strokes(page)
    for key, left in (("Control+z", 1), ("Control+z", 0), ("Control+Shift+z", 1), ("Control+y", 2)):
        page.keyboard.press(key)
        page.wait_for_timeout(200)  # ComfyUI would undo in the frame after
        assert sheet.strokes(page) == drawn[:left]
        assert page.evaluate("app.graph.nodes.filter(node => node.type === 'Note').length") == 1
    width = page.locator(f"{sheet.CANVAS} [data-text=size]")
    before = float(width.input_value())
    page.keyboard.press("]")
    page.keyboard.press("e")
    assert float(width.input_value()) > before
    sheet.stroke(page, (0.5, 0.1), (0.5, 0.9))
    erased = sheet.strokes(page)[-1]
    assert (erased["tool"], erased["width"]) == ("eraser", float(width.input_value()))
    page.keyboard.press("[")
    page.keyboard.press("b")
    page.keyboard.press("Space")  # the pen goes down in the middle
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert sheet.strokes(page)[-1]["points"] == [256, 256, 1, 264, 256, 1]
    sheet.press(page, "clear")
    assert sheet.strokes(page) == []


def test_everything_has_a_label_and_a_key(page):
    """In the user's language; the tab key reaches all that can be used."""
    words = json.loads((ROOT / "locales" / "en" / "main.json").read_text(encoding="utf-8"))["sanaSprintCanvas"]
    labels = page.evaluate(LABELS)
    assert len(labels) > 15 and all(words[key] == label for key, label in labels)
    page.locator(f"{sheet.CANVAS} [data-text=brush]").focus()
    reached = []
    for _ in range(16):
        reached.append(page.evaluate("document.activeElement.dataset.text ?? document.activeElement.className"))
        page.keyboard.press("Tab")
    assert {"brush", "eraser", "size", "symmetry", "underlay", "dice", "lock", "view", "sheet"} <= set(reached)


def test_symmetry_and_fewer_points(page):
    """The mirror image is a stroke of its own, and a straight line needs its two ends alone."""
    page.locator(f"{sheet.CANVAS} [data-text=symmetry]").select_option("x")
    sheet.stroke(page, (0.25, 0.5), (0.25, 0.75), moves=20)
    (x, top, _, _, bottom, _), (mirrored, *_) = [stroke["points"] for stroke in sheet.strokes(page)]
    assert abs(x - 128) < 2 and abs(top - 256) < 2 and abs(bottom - 384) < 2
    assert mirrored == pytest.approx(512 - x)


LABELS = """() => Array.from(document.querySelectorAll('.sana-sprint-canvas [data-text]'))
    .map(each => [each.dataset.text, each.tagName === 'OPTION' ? each.textContent : each.getAttribute('aria-label')])"""
FRAME = """async ([text, mode, side]) => {
    const { Raster } = await import('/extensions/sana-sprint/live/raster.js');
    const { parseDrawing } = await import('/extensions/sana-sprint/live/strokes.js');
    const raster = new Raster();
    raster.render(parseDrawing(text), side);
    return Array.from(raster.frame(side, side, mode));
}"""


def test_the_page_draws_what_the_server_draws(editor):
    """Pixels of the page and of the server's rasteriser, from the same strokes: pen pressure, eraser, paint."""
    stroke = {"layer": "lines", "tool": "brush", "color": "#ffffff", "width": 30}
    points = [60, 60, 0.2, 250, 90, 1.0, 300, 400, 0.6]
    drawn = [
        {**stroke, "points": points},
        {**stroke, "tool": "eraser", "points": [20, 250, 1, 500, 250, 1]},
        {**stroke, "layer": "paint", "color": "#d03020", "points": [100, 400, 1]},
        {**stroke, "layer": "paint", "color": "#2050d0", "width": 60, "points": [256, 0, 1, 256, 512, 1]},
    ]
    text = json.dumps({"version": 1, "size": [512, 512], "ground": "#e0e0c0", "underlay": None, "strokes": drawn})
    ours = np.array(editor.evaluate(FRAME, [text, "both", 512]), dtype=np.float32)
    theirs = drawings.parse(text)
    lines = np.asarray(drawings.lines(theirs, 512, 512), dtype=np.float32)
    paint = np.asarray(drawings.sheet(theirs, 512, 512, None), dtype=np.float32)
    for a, b in ((ours[: 512**2].reshape(512, 512), lines), (ours[512**2 :].reshape(512, 512, 3), paint)):
        assert b.max() > 200
        assert np.abs(a - b).mean() < 0.5 and np.quantile(np.abs(a - b), 0.995) < 40
