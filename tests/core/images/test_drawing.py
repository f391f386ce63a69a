"""A drawing's pixels against geometry, and drawings that are none."""

import hashlib
import json
import math

import numpy as np
import pytest
from PIL import Image

from sprint_core.images import drawing


def text(*strokes, **entries) -> str:
    return json.dumps({"version": 1, "size": [128, 96], "strokes": list(strokes)} | entries)


def stroke(*points, layer="lines", tool="brush", color="#ff8000", width=12.0):
    """points: (x, y) or (x, y, pressure)."""
    flat = [number for x, y, *pressure in points for number in (x, y, *(pressure or [1.0]))]
    return {"layer": layer, "tool": tool, "color": color, "width": width, "points": flat}


def lines(*strokes, size=(128, 96)) -> np.ndarray:
    return drawing.lines(drawing.parse(text(*strokes)), *size)


def area(pixels: np.ndarray) -> float:
    return float(pixels.astype(np.float64).sum() / 255)


# --- geometry ---------------------------------------------------------------------------------------


def test_a_point_is_a_disc():
    pixels = lines(stroke((40, 50), width=30))
    assert area(pixels) == pytest.approx(math.pi * 15**2, rel=0.005)
    y, x = np.mgrid[:96, :128] + 0.5
    distance = np.hypot(x - 40, y - 50)
    assert (pixels[distance <= 14.4] == 255).all() and (pixels[distance >= 15.6] == 0).all()


def test_a_segment_is_a_capsule():
    pixels = lines(stroke((20, 20), (90, 60), width=10))
    length = math.hypot(70, 40)
    assert area(pixels) == pytest.approx(length * 10 + math.pi * 25, rel=0.005)


def test_pressure_is_the_width_from_end_to_end():
    pixels = lines(stroke((10, 48, 0.25), (110, 48, 1.0), width=40))
    for x in (30, 60, 90):
        across = area(pixels[:, x : x + 1])
        assert across == pytest.approx(40 * (0.25 + 0.75 * (x + 0.5 - 10) / 100), abs=0.6)


def test_the_corner_of_a_stroke_is_covered_once():
    """A stroke is the union of its segments: its half covered edge pixels are not covered twice."""
    once, twice = stroke((20, 48), (100, 48)), stroke((20, 48), (100, 48), (20, 48))
    assert np.array_equal(lines(once), lines(twice))


def test_an_eraser_takes_away_what_lies_before_it():
    cross = stroke((64, 10), (64, 90), width=20)
    bar = stroke((10, 48), (120, 48))
    erased = lines(bar, cross | {"tool": "eraser"})
    assert (erased[20:80, 56:72] == 0).all() and (erased[45:51, 20:50] == 255).all()
    assert np.array_equal(lines(cross | {"tool": "eraser"}, bar), lines(bar))


def test_a_sheet_of_another_size_is_the_drawing_scaled():
    large = lines(stroke((20, 20), (90, 60), width=16), size=(256, 192))
    half = large.reshape(96, 2, 128, 2).astype(float).mean((1, 3))
    assert np.abs(half - lines(stroke((20, 20), (90, 60), width=16))).mean() < 0.5


def test_the_width_follows_the_smaller_scale():
    pixels = drawing.lines(drawing.parse(text(stroke((64, 10), (64, 90), width=20))), 384, 96)
    assert area(pixels[48:49]) == pytest.approx(20, abs=0.6)


def test_strokes_beyond_the_sheet_are_cut_off():
    whole = lines(stroke((-500, 48), (500, 48)))
    assert (whole[44:52] == 255).all() and (whole[:40] == 0).all()
    assert not lines(stroke((-50, -50), (-20, -90))).any()


def test_layers_do_not_touch_each_other():
    both = drawing.parse(text(stroke((40, 40)), stroke((80, 40), layer="paint")))
    assert area(drawing.lines(both, 128, 96)[:, 60:]) == 0
    paint = drawing.sheet(both, 128, 96)
    assert (paint[:, :60] == 255).all() and tuple(paint[40, 80]) == (255, 128, 0)


# --- paint ------------------------------------------------------------------------------------------


def test_paint_lies_over_the_ground_and_the_underlay():
    """By hand: 0.25 of the underlay over the ground, and where the paint was erased, they show again."""
    strokes = [
        stroke((30, 48), (100, 48), layer="paint", width=40),
        stroke((64, 48), layer="paint", tool="eraser", width=20),
    ]
    under = np.full((96, 128, 3), (200, 100, 0), np.uint8)
    entries = {"ground": "#0000ff", "underlay": {"name": "a.png", "opacity": 0.25}}
    paint = drawing.sheet(drawing.parse(text(*strokes, **entries)), 128, 96, under)
    below = (round(0.25 * 200), 25, round(0.75 * 255))
    assert tuple(paint[5, 5]) == below and tuple(paint[48, 64]) == below
    assert tuple(paint[48, 40]) == (255, 128, 0)


def test_an_underlay_fills_the_sheet_from_its_middle():
    image = Image.new("RGB", (400, 100), "red")
    image.paste("green", (150, 0, 250, 100))
    fitted = drawing.fitted(image, 64, 64)
    assert fitted.shape == (64, 64, 3) and (fitted[:, 2:-2] == (0, 128, 0)).all()


def test_the_same_strokes_are_the_same_bytes_everywhere():
    """Made once; other bytes would change the images of every saved drawing."""
    strokes = [
        stroke((7.3, 9.1, 0.4), (61.7, 80.2, 0.9), (120.1, 33.3), layer=layer, width=9.7) for layer in drawing.LAYERS
    ]
    sheet = drawing.parse(text(*strokes))
    pixels = drawing.lines(sheet, 128, 96).tobytes() + drawing.sheet(sheet, 128, 96).tobytes()
    assert hashlib.sha256(pixels).hexdigest()[:16] == "ab6175d4c83da163"


# --- what is read -----------------------------------------------------------------------------------


def test_no_text_is_an_empty_sheet():
    assert not drawing.lines(drawing.parse(""), 64, 64).any() and drawing.parse("{}") == drawing.parse("")
    assert (drawing.sheet(drawing.parse(" \n"), 64, 64) == 255).all()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not of version 1"),
        ('{"version": 2}', "not of version 1"),
        ('{"version": 1}', "KeyError"),
        (text(size=[0, 64]), "its size is 0 x 64"),
        (text(size=[1e400, 64]), "cannot convert float infinity"),
        (text(ground="red"), "'red' is no colour"),
        (text({"layer": "lines"}), "not one of a live canvas"),
        (text(stroke((1, 1), layer="sky")), "stroke 1 is of layer 'sky'"),
        (text(stroke((1, 1)), stroke((1, 1), width=-1)), "the width of stroke 2 is -1"),
        (text(stroke((1, 1)) | {"points": [1, 2]}), "the points of stroke 1 are not threes"),
        (text(stroke((1, math.nan))), "stroke 1 has points that lie nowhere"),
        (text(stroke((1, 1e9))), "stroke 1 has points that lie nowhere"),
        (text(stroke((1, 1)) | {"points": ["a", 1, 1]}), "points that are no numbers"),
        (text(underlay={"opacity": 2}), "the underlay's opacity is 2"),
        (text(underlay="a.png"), "not one of a live canvas"),
    ],
)
def test_what_is_no_drawing_is_refused_in_one_sentence(bad, words):
    with pytest.raises(ValueError, match=r"^drawing: ") as caught:
        drawing.parse(bad)
    assert words in str(caught.value) and len(str(caught.value)) < 200
