"""A finger and a pen on the live canvas; the mouse is in test_live.py."""

import pytest
import sheet
from renderers import CLASSIC

POINT = """([x, y]) => {
    const box = document.querySelector('.sana-sprint-canvas .drawing').getBoundingClientRect();
    return [box.x + box.width * x, box.y + box.height * y];
}"""
# An event of a pen's tip, button 0, or of its other end, button 5, as a browser has it.
PEN = """([kind, x, y, button]) => {
    const sheet = document.querySelector('.sana-sprint-canvas .drawing');
    const box = sheet.getBoundingClientRect();
    const place = { clientX: box.x + box.width * x, clientY: box.y + box.height * y };
    const down = kind !== 'pointerup';
    sheet.dispatchEvent(new PointerEvent(kind, {
        ...place, bubbles: true, cancelable: true, pointerId: 1, pointerType: 'pen', pressure: down ? 0.5 : 0,
        button: kind === 'pointermove' ? -1 : button, buttons: down ? (button === 5 ? 32 : 1) : 0,
    }));
}"""


def test_a_finger_draws(page):
    """One finger is a pen, and does not move the graph."""
    client = page.context.new_cdp_session(page)
    client.send("Emulation.setTouchEmulationEnabled", {"enabled": True})
    offset = page.evaluate("Array.from(app.canvas.ds.offset)")
    places = [page.evaluate(POINT, [0.2 + 0.1 * i, 0.3]) for i in range(6)]
    for kind, place in (("touchStart", places[0]), *(("touchMove", place) for place in places[1:]), ("touchEnd", None)):
        points = [] if place is None else [{"x": place[0], "y": place[1]}]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_timeout(100)
    (drawn,) = sheet.strokes(page)
    (left, top, pressure), (right, bottom, _) = drawn["points"][:3], drawn["points"][-3:]
    assert abs(left - 0.2 * 512) < 3 and abs(right - 0.7 * 512) < 3 and abs(top - bottom) < 3 and pressure == 1
    assert page.evaluate("Array.from(app.canvas.ds.offset)") == offset
    client.detach()


@CLASSIC
def test_a_pen_presses(page):
    """Its pressure is the width of the stroke, point by point."""
    client = page.context.new_cdp_session(page)

    def pen(kind: str, x: float, force: float, buttons: int = 1) -> None:
        left, top = page.evaluate(POINT, [x, 0.5])
        button = "left" if kind != "mouseMoved" else "none"
        client.send(
            "Input.dispatchMouseEvent",
            {"type": kind, "x": left, "y": top, "button": button, "buttons": buttons, "clickCount": 1,
             "pointerType": "pen", "force": force},
        )  # fmt: skip

    pen("mousePressed", 0.2, 0.2)
    for i in range(1, 7):
        pen("mouseMoved", 0.2 + 0.1 * i, 0.2 + 0.1 * i)
    pen("mouseReleased", 0.8, 0.8, 0)
    page.wait_for_timeout(100)
    (drawn,) = sheet.strokes(page)
    assert drawn["tool"] == "brush"
    pressures = drawn["points"][2::3]
    assert pressures[0] == pytest.approx(0.2, abs=0.02) and max(pressures) == pytest.approx(0.8, abs=0.02)
    assert pressures == sorted(pressures)
    client.detach()


@CLASSIC
def test_a_pens_other_end_rubs_out(page):
    """What it passes over is gone; the tip is the brush as before."""
    for button in (0, 5, 0):
        for kind, x in (("pointerdown", 0.3), ("pointermove", 0.5), ("pointermove", 0.7), ("pointerup", 0.7)):
            page.evaluate(PEN, [kind, x, 0.5, button])
    page.wait_for_timeout(100)
    drawn = sheet.strokes(page)
    assert [stroke["tool"] for stroke in drawn] == ["brush", "eraser", "brush"]
    assert drawn[1]["points"][0] == pytest.approx(0.3 * 512, abs=3) and drawn[1]["points"][2] == 0.5
