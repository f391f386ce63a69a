"""Drawing on a live canvas in ComfyUI's page, as a user does: mouse, keys, buttons."""

import json

from playwright.sync_api import Page

NODE = "SanaSprintLiveCanvas"
CANVAS = ".sana-sprint-canvas"
BUILD = """async ({values, model, control}) => {
    app.graph.clear();
    const add = (type, x, y) => {
        const node = LiteGraph.createNode(type);
        node.pos = [x, y];
        app.graph.add(node);
        return node;
    };
    const set = (node, values) => node.widgets.forEach(w => { if (w.name in values) w.value = values[w.name] });
    const slot = (node, name) => node.inputs.findIndex(input => input.name === name);
    const loader = add('SanaSprintLoader', -420, 0);
    const drawn = add('SanaSprintLiveCanvas', 0, 0);
    const saved = add('SaveImage', 760, 0);
    set(loader, {model});
    set(drawn, values);
    for (const [i, name] of ['model', 'clip', 'vae'].entries()) loader.connect(i, drawn, slot(drawn, name));
    if (control) {
        const steering = add('SanaSprintControlNetLoader', -420, 300);
        set(steering, {control_net: control});
        steering.connect(0, drawn, slot(drawn, 'control_net'));
    }
    drawn.connect(0, saved, 0);
    app.canvas.ds.scale = 0.8;
    app.canvas.ds.offset = [140, 60];
    app.graph.setDirtyCanvas(true, true);
    await new Promise(done => setTimeout(done, 500));
}"""
# A number that changes with the picture's pixels.
SUM = """() => {
    const canvas = document.querySelector('.sana-sprint-canvas .picture');
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    return data.reduce((sum, x, i) => (sum * 31 + x) % 1000003, 7)
}"""


def build(page: Page, model: str, control: str | None, **values) -> None:
    """A graph around one live canvas, whose picture is saved."""
    page.evaluate(BUILD, {"values": values, "model": model, "control": control})
    drawing = page.locator(f"{CANVAS} .drawing")
    drawing.wait_for(timeout=60_000)
    wait_for_state(page, "waiting")
    box = None
    while (now := drawing.bounding_box()) != box:  # until the page has laid it out
        box = now
        page.wait_for_timeout(300)


def stroke(page: Page, *points: tuple[float, float], moves: int = 6) -> None:
    """From point to point, in shares of the sheet, with the mouse."""
    box = page.locator(f"{CANVAS} .drawing").bounding_box()
    assert box
    first, *rest = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in points]
    page.mouse.move(*first)
    page.mouse.down()
    for point in rest:
        page.mouse.move(*point, steps=moves)
    page.mouse.up()


def press(page: Page, key: str) -> None:
    """A button of the toolbar, by the key of its text."""
    page.locator(f"{CANVAS} [data-text={key}]").click()


def set_value(page: Page, name: str, value) -> None:
    page.evaluate(
        "([type, name, value]) => { const node = app.graph.nodes.find(node => node.type === type);"
        "node.widgets.find(widget => widget.name === name).value = value }",
        [NODE, name, value],
    )


def value(page: Page) -> str:
    """What the graph saves of the drawing."""
    return page.evaluate(
        "type => app.graph.nodes.find(node => node.type === type).widgets.find(w => w.name === 'drawing').value", NODE
    )


def strokes(page: Page) -> list[dict]:
    text = value(page)
    return json.loads(text)["strokes"] if text else []


def wait_for_state(page: Page, state: str) -> None:
    page.locator(f"{CANVAS} .stage[data-state={state}]").wait_for(timeout=120_000)


def go_live(page: Page) -> None:
    wait_for_state(page, "waiting")
    page.locator(f"{CANVAS} .go").click()
    wait_for_state(page, "live")


def picture(page: Page) -> int:
    """A number for the pixels of the picture that is shown."""
    return page.evaluate(SUM)


def wait_until_painted(page: Page) -> int:
    """Until the picture is the newest drawing's; its number."""
    page.locator(f"{CANVAS} .picture[aria-busy=false]").wait_for(timeout=120_000)
    return picture(page)


PIXELS = """() => {
    const canvas = document.querySelector('.sana-sprint-canvas .picture');
    return Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data)
}"""


def square(page: Page, left: float, top: float, side: float) -> None:
    """Drawn without lifting the pen, in shares of the sheet."""
    right, bottom = left + side, top + side
    stroke(page, (left, top), (right, top), (right, bottom), (left, bottom), (left, top))
