"""The live canvas in ComfyUI's page against the real server: what each renderer draws in both, the rest in one."""

import io
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import sheet
from editor import open_editor
from PIL import Image
from renderers import CLASSIC, NODES2
from sight import middle, shows

from sprint_core.images import drawing as drawings

ROOT = Path(__file__).resolve().parents[2]


def outline(page) -> None:
    """Of an apple that fills most of the sheet, by mouse."""
    angles = [math.tau * i / 12 for i in range(13)]
    sheet.stroke(page, *((0.5 + 0.36 * math.cos(a), 0.54 + 0.34 * math.sin(a)) for a in angles), moves=2)


def shown(page) -> np.ndarray:
    """The picture beside the drawing: [h, w, 3]."""
    flat = np.array(page.evaluate(sheet.PIXELS), dtype=np.uint8)
    side = int(len(flat) / 4) ** 0.5
    return flat.reshape(int(side), int(side), 4)[..., :3]


def is_red(image: np.ndarray) -> bool:
    """Whether what fills the outline is, as the judge knows apples by their stalks, too."""
    red, green, _ = middle(image)
    return red > green + 100


def is_green(image: np.ndarray) -> bool:
    red, green, blue = middle(image)
    return green > red + 10 and green > blue + 80


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """The mean difference of two pictures, in levels."""
    return np.abs(one.astype(int) - other).mean()


def change(page, name: str, value) -> int:
    """Another value of the node while it is live; the number of the picture that it gives."""
    sheet.set_value(page, name, value)
    page.locator(f"{sheet.CANVAS} .picture[aria-busy=true]").wait_for()
    return sheet.wait_until_painted(page)


def wait_until_idle(server) -> None:
    deadline = time.monotonic() + 120
    while (queue := server.json("/queue"))["queue_running"] or queue["queue_pending"]:
        assert time.monotonic() < deadline, "live did not end"
        time.sleep(0.1)


def saved(server) -> list[np.ndarray]:
    """Pixels of what all runs have saved, in their order."""
    images = [image for run in server.json("/history").values() for image in server.images(run)]
    return [np.asarray(Image.open(io.BytesIO(server.view(image)))) for image in images if image["type"] == "output"]


@pytest.mark.oldest
def test_what_is_drawn_is_painted_at_once(page, server):
    """An outline by mouse becomes a red apple; prompt and strength act while live; Stop saves the picture."""
    sheet.go_live(page)
    outline(page)
    sheet.wait_until_painted(page)
    assert is_red(shown(page))
    assert page.locator(f"{sheet.CANVAS} .ms").inner_text().endswith(" ms")
    assert len(sheet.strokes(page)) == 1
    pictures = []
    for name, value in (("text", "a green apple"), ("strength", 0), ("strength", 1)):
        change(page, name, value)
        pictures.append(shown(page))
    green, free, again = pictures
    assert is_green(green)
    assert apart(free, green) > 5 and apart(again, green) < 2  # frames may be painted in other ways
    change(page, "text", "a red apple")
    page.locator(f"{sheet.CANVAS} .go").click()
    sheet.wait_for_state(page, "ended")
    wait_until_idle(server)
    assert is_red(saved(server)[-1])


def test_keys_stay_in_the_canvas(page):
    """B, E, [, ] and Ctrl+Z act on the drawing; ComfyUI undoes nothing of the graph, in any of its run modes."""
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


@CLASSIC
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


@NODES2
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


def test_a_saved_drawing_is_the_same_again(page, server):
    """Saved, loaded, run twice without a page that listens: the same strokes, the same bytes."""
    outline(page)
    text = sheet.value(page)
    assert len(text) < 500
    sheet.set_value(page, "live", False)
    ui = page.evaluate("() => app.graph.serialize()")
    images = []
    for _ in range(2):
        page.evaluate("async ui => { app.graph.clear(); await app.loadGraphData(ui) }", ui)
        page.locator(f"{sheet.CANVAS} .drawing").wait_for(timeout=60_000)
        assert sheet.value(page) == text
        prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
        (node,) = [node for node in prompt.values() if node["class_type"] == sheet.NODE]
        assert node["inputs"]["drawing"] == text
        server.request("/free", {"unload_models": False, "free_memory": True})  # or nothing would run again
        prompt = json.loads(json.dumps(prompt).replace("ComfyUI", f"run{len(images)}"))
        images += server.images(server.run(prompt, timeout=300))
    first, second = [np.asarray(Image.open(io.BytesIO(server.view(image)))) for image in images]
    assert np.array_equal(first, second)
    assert is_red(first)


def test_another_prompt_ends_live(page, server):
    """What was drawn last is saved, and the other one runs."""
    sheet.go_live(page)
    outline(page)
    sheet.wait_until_painted(page)
    count = len(saved(server))
    other = page.evaluate("async () => (await app.graphToPrompt()).output")
    (node,) = [node for node in other.values() if node["class_type"] == sheet.NODE]
    node["inputs"] |= {"live": False, "drawing": "", "strength": 0, "text": "a banana"}
    server.run(other, timeout=300)
    sheet.wait_for_state(page, "ended")
    live, asked = saved(server)[count:]
    assert is_red(live) and shows(asked, "banana")


@CLASSIC
def test_interrupt_ends_live(page, server):
    sheet.go_live(page)
    server.request("/interrupt", {})
    sheet.wait_for_state(page, "ended")
    wait_until_idle(server)
    sheet.stroke(page, (0.2, 0.2), (0.8, 0.2))
    assert len(sheet.strokes(page)) == 1


@NODES2
def test_a_node_deleted_while_live_ends_its_run(page, server):
    sheet.go_live(page)
    sheet.square(page, 0.3, 0.3, 0.35)
    sheet.wait_until_painted(page)
    page.evaluate("type => app.graph.remove(app.graph.nodes.find(node => node.type === type))", sheet.NODE)
    wait_until_idle(server)


@NODES2
def test_another_tab_takes_the_canvas_and_gives_it_back(page, chromium, server):
    """A duplicated tab has the same client id, and so the same canvas."""
    sheet.wait_for_state(page, "waiting")
    ui, client = page.evaluate("() => [app.graph.serialize(), app.api.clientId]")
    other = chromium.new_page(viewport={"width": 1400, "height": 900})
    other.add_init_script(f"sessionStorage.setItem('clientId', '{client}'); window.name = '{client}'")
    sheet_open(other, server, ui)
    sheet.wait_for_state(page, "taken")
    sheet.wait_for_state(other, "waiting")
    page.locator(f"{sheet.CANVAS} .go").click()
    sheet.wait_for_state(page, "waiting")
    sheet.wait_for_state(other, "taken")
    other.close()


def sheet_open(other, server, ui) -> None:
    open_editor(other, server)
    other.evaluate("async ui => { await app.loadGraphData(ui) }", ui)
    other.locator(f"{sheet.CANVAS} .drawing").wait_for(timeout=60_000)


SENT = """() => {
    window.sent = 0;
    const send = WebSocket.prototype.send;
    WebSocket.prototype.send = function (data) {
        if (typeof data !== 'string') window.sent++;
        return send.call(this, data);
    };
}"""
# A file with a red image, given to the canvas as a browser gives one that is dropped or pasted.
GIVE = """async ([kind, name]) => {
    const image = Object.assign(document.createElement('canvas'), { width: 64, height: 64 });
    const pen = image.getContext('2d');
    pen.fillStyle = '#e02010';
    pen.fillRect(0, 0, 64, 64);
    const blob = await new Promise(done => image.toBlob(done, 'image/png'));
    const data = new DataTransfer();
    data.items.add(new File([blob], name, { type: 'image/png' }));
    const sheet = document.querySelector('.sana-sprint-canvas .drawing');
    const options = { bubbles: true, cancelable: true };
    const event = kind === 'paste'
        ? new ClipboardEvent('paste', { ...options, clipboardData: data })
        : new DragEvent('drop', { ...options, dataTransfer: data });
    return [sheet.dispatchEvent(event), app.graph.nodes.length];
}"""
DRAWN = """() => {
    const canvas = document.querySelector('.sana-sprint-canvas .drawing');
    return Array.from(canvas.getContext('2d').getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data);
}"""


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_an_image_is_dropped_or_pasted_under_the_paint(page, server, kind):
    """It goes to input/ once, the drawing has its name alone, and ComfyUI makes no node of it; it can be removed."""
    sheet.set_value(page, "mode", "paint")
    name = f"{kind}ped.png"
    free, nodes = page.evaluate(GIVE, [kind, name])
    assert not free  # ComfyUI does not see the event
    page.locator(f"{sheet.CANVAS} [data-text=remove]").wait_for(state="visible", timeout=30_000)
    page.wait_for_function(f"({DRAWN})()[1] < 60", timeout=30_000)
    red, green, blue, _ = page.evaluate(DRAWN)
    assert red > 200 and green < 60 and blue < 60
    text = sheet.value(page)
    assert name[:-4] in text and len(text) < 400
    assert page.evaluate("app.graph.nodes.length") == nodes
    sheet.press(page, "remove")
    assert page.evaluate(DRAWN)[:3] == [255, 255, 255] and name[:-4] not in sheet.value(page)


@NODES2
def test_comfyui_hears_of_strokes_a_moment_later(page):
    """ComfyUI is told of a change a moment after it: once for strokes that follow each other quickly."""
    page.evaluate(LISTEN)
    for y in (0.2, 0.4, 0.6):
        sheet.stroke(page, (0.2, y), (0.8, y), moves=2)
    assert len(sheet.strokes(page)) == 3
    page.wait_for_timeout(800)
    assert page.evaluate("window.heard") == 1
    saved = page.evaluate("JSON.stringify(app.extensionManager.workflow.activeWorkflow.changeTracker.activeState)")
    assert saved.count("points") == 3


# How often a canvas tells ComfyUI of changes.
LISTEN = """async () => {
    const { LiveCanvas } = await import('/extensions/sana-sprint/live/canvas.js');
    const { tell } = LiveCanvas.prototype;
    window.heard = 0;
    LiveCanvas.prototype.tell = function () {
        const { changed } = this.host;
        if (!this.spied) this.host.changed = () => { window.heard++; return changed.call(this.host) };
        this.spied = true;
        return tell.call(this);
    };
}"""
# Frames of one sheet through everything that changes it, and of a fresh one at each point.
KEPT = """async ([texts, side]) => {
    const { Raster } = await import('/extensions/sana-sprint/live/raster.js');
    const { History, parseDrawing } = await import('/extensions/sana-sprint/live/strokes.js');
    const history = new History(), kept = new Raster();
    const [a, b, rubber] = texts.map(text => parseDrawing(text).strokes);
    const changes = [
        () => history.add(a), () => history.add(rubber), () => history.undo(), () => history.add(b),
        () => history.adjust({ ground: '#80c0ff' }), () => history.undo(), () => history.redo(),
        () => history.resize([512, 256]), () => history.add(rubber), () => history.change({ strokes: [] }),
        () => history.add(a), () => history.replace(parseDrawing(texts[1])), () => history.add(rubber),
    ];
    return changes.map((change, i) => {
        change();
        const size = i > 9 ? 2 * side : side;
        kept.render(history.now, size);
        const before = kept.frame(side, side, 'both').join();
        for (const stroke of a) kept.extend(stroke, 0); // a stroke that is then given up
        kept.render(history.now, size);
        const fresh = new Raster();
        fresh.render(history.now, size);
        const expected = fresh.frame(side, side, 'both').join();
        const after = kept.frame(side, side, 'both').join();
        return [before === expected, after === expected, new Set(expected.split(',')).size > 1];
    });
}"""


def test_a_sheet_that_keeps_its_strokes_is_as_one_drawn_anew(editor):
    """After strokes, the eraser, undo, another ground, another shape and size."""
    stroke = {"layer": "lines", "tool": "brush", "color": "#ffffff", "width": 30, "points": [60, 60, 1, 400, 400, 1]}
    paint = stroke | {"layer": "paint", "color": "#d03020", "points": [100, 400, 1, 400, 100, 1]}
    rubber = [one | {"tool": "eraser", "points": [20, 250, 1, 500, 250, 1]} for one in (stroke, paint)]
    texts = [
        json.dumps({"version": 1, "size": [512, 512], "ground": "#e0e0c0", "underlay": None, "strokes": strokes})
        for strokes in ([stroke, paint], [paint | {"color": "#2050d0"}], rubber)
    ]
    results = editor.evaluate(KEPT, [texts, 512])
    assert len(results) == 13 and all(before and after for before, after, _ in results)
    assert sum(drawn for *_, drawn in results) >= 12


ON_THE_WAY = """async () => {
    const { Connection, unpack } = await import('/extensions/sana-sprint/live/connection.js');
    const { send } = WebSocket.prototype, { receive } = Connection.prototype;
    window.ways = [];
    let newest = 0, answered = 0;
    WebSocket.prototype.send = function (data) {
        if (typeof data !== 'string') {
            const { header } = unpack(data.buffer ?? data);
            window.ways.push([header.final, newest > answered ? 1 : 0]);
            newest = header.seq;
        }
        return send.call(this, data);
    };
    Connection.prototype.receive = function (data) {
        if (typeof data !== 'string') answered = Math.max(answered, unpack(data).header.seq ?? 0);
        return receive.call(this, data);
    };
}"""
HIDE = """hidden => {
    Object.defineProperty(document, 'hidden', { configurable: true, get: () => hidden });
    document.dispatchEvent(new Event('visibilitychange'));
}"""


@CLASSIC
def test_a_lifted_pens_frame_does_not_wait_for_a_moving_ones(page):
    """It is sent while the one before is on its way; no second one is."""
    sheet.go_live(page)
    sheet.square(page, 0.3, 0.3, 0.35)
    sheet.wait_until_painted(page)
    page.evaluate(ON_THE_WAY)
    for i in range(4):
        sheet.stroke(page, (0.1, 0.2 + 0.15 * i), (0.9, 0.25 + 0.15 * i), moves=20)
        sheet.wait_until_painted(page)
    ways = page.evaluate("window.ways")  # of each frame: whether it is final, and how many were on their way
    assert max(count for final, count in ways if not final) == 0
    assert [count for final, count in ways if final].count(1) >= 2 and max(count for _, count in ways) == 1


@NODES2
def test_a_hidden_tab_sends_nothing(page):
    """Until it is seen again: then the newest drawing."""
    sheet.go_live(page)
    sheet.square(page, 0.3, 0.3, 0.35)
    before = sheet.wait_until_painted(page)
    page.wait_for_timeout(500)
    page.evaluate(SENT)
    page.evaluate(HIDE, True)
    sheet.square(page, 0.1, 0.1, 0.3)
    page.wait_for_timeout(500)
    assert page.evaluate("window.sent") == 0
    page.evaluate(HIDE, False)
    assert sheet.wait_until_painted(page) != before
    assert page.evaluate("window.sent") == 1


def heap_mib(page) -> float:
    """JavaScript's heap after a collection."""
    client = page.context.new_cdp_session(page)
    client.send("HeapProfiler.collectGarbage")
    size = client.send("Runtime.getHeapUsage")["usedSize"]
    client.detach()
    return size / 2**20


@CLASSIC
def test_200_strokes_grow_no_memory(page):
    """Drawn and undone while live, 50 at a time: the heap is what it was after the first ones."""
    sheet.go_live(page)
    heaps = []
    for _ in range(4):
        for i in range(50):
            y = 0.1 + 0.8 * i / 50
            sheet.stroke(page, (0.1, y), (0.9, y), moves=2)
        assert len(sheet.strokes(page)) == 50
        for _ in range(50):
            page.keyboard.press("Control+z")
        assert sheet.strokes(page) == []
        heaps.append(heap_mib(page))
    print(f"JavaScript's heap after each 50 strokes: {[round(heap, 1) for heap in heaps]} MiB")
    assert heaps[-1] - heaps[0] < 3


@CLASSIC
def test_a_server_that_starts_anew_has_the_canvas_again(page, server):
    sheet.square(page, 0.3, 0.3, 0.35)
    drawn = sheet.strokes(page)
    sheet.wait_for_state(page, "waiting")
    server.stop()
    sheet.wait_for_state(page, "lost")
    server.start()
    sheet.wait_for_state(page, "waiting")
    assert sheet.strokes(page) == drawn
    sheet.go_live(page)
    sheet.wait_until_painted(page)
