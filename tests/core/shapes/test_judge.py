"""The judge against true pictures: they pass, blurred and noisy too, and nothing else does."""

import random

import numpy as np
import pytest
from drawings import blurred, noisy, painted, picture

from sprint_core.shapes import scenes
from sprint_core.shapes.captions import CATEGORIES, category, parse
from sprint_core.shapes.examples import scene_and_caption
from sprint_core.shapes.judge import components, detect, fault, judge, observe
from sprint_core.shapes.scenes import COLOURS, SHAPES, render, render_batch


@pytest.fixture(scope="module")
def by_category(drawn) -> dict[str, list]:
    """70 held-out scenes of each category."""
    found = {name: [] for name in CATEGORIES}
    for scene, text in drawn["test"]:
        found[category(parse(text))].append((scene, text))
    return {name: pairs[:70] for name, pairs in found.items()}


@pytest.mark.parametrize("name", CATEGORIES)
def test_true_pictures_pass(by_category, name):
    pairs = by_category[name]
    assert len(pairs) == 70
    images = render_batch([scene for scene, _ in pairs])
    assert [fault(image, text) for image, (_, text) in zip(images, pairs, strict=True)] == [None] * 70
    worn = [judge(noisy(blurred(image)), text) for image, (_, text) in zip(images, pairs, strict=True)]
    assert np.mean(worn) >= 0.99
    soft = [judge(blurred(image, 4), text) for image, (_, text) in zip(images, pairs, strict=True)]
    assert np.mean(soft) >= 0.95


def test_shuffled_pictures_fail(by_category):
    pairs = [pair for name in CATEGORIES for pair in by_category[name]]
    texts = [text for _, text in pairs]
    random.Random(0).shuffle(texts)
    passed = [judge(render(scene), text) for (scene, _), text in zip(pairs, texts, strict=True)]
    assert np.mean(passed) <= 0.06


@pytest.mark.parametrize("size", [128, 200, 512])
def test_any_size_of_picture(drawn, size):
    assert all(judge(render(scene, size), text) for scene, text in drawn["train"][:20])


def test_requirement_serves_as_text():
    assert judge(picture(("circle", "red", 1, 1)), parse("a red circle"))


CIRCLE, SQUARE = ("circle", "red", 1, 0), ("square", "blue", 1, 2)


@pytest.mark.parametrize(
    "right, things, text",
    [
        (True, [CIRCLE], "a circle"),
        (True, [CIRCLE], "A small red circle on the left, on a grey background."),
        (False, [CIRCLE], "a square"),  # shape
        (False, [CIRCLE], "a green circle"),  # colour
        (False, [CIRCLE], "a large red circle"),  # size
        (False, [CIRCLE], "a red circle on the right"),  # place
        (False, [CIRCLE], "a red circle at the top left"),
        (False, [CIRCLE], "a red circle on a brown background"),  # background
        (False, [CIRCLE], "a red circle on a teal to grey background"),
        (False, [CIRCLE], "two red circles"),  # count
        (False, [CIRCLE], "a red circle and a blue square"),
        (True, [CIRCLE, SQUARE], "a blue square and a red circle"),
        (True, [CIRCLE, SQUARE], "a square right of a circle"),
        (False, [CIRCLE, SQUARE], "a square left of a circle"),  # relation
        (False, [CIRCLE, SQUARE], "a circle above a square"),
        (False, [CIRCLE, SQUARE], "a blue circle and a red square"),  # attribution
        (False, [CIRCLE, SQUARE], "a red circle"),  # one too many
        (False, [CIRCLE, SQUARE], "a red circle and a cross"),
        (True, [CIRCLE, (*CIRCLE[:3], 2)], "two red circles"),
        (False, [CIRCLE, (*CIRCLE[:3], 2)], "three red circles"),
        (False, [CIRCLE, (*CIRCLE[:3], 2)], "two blue circles"),
        (False, [CIRCLE, ("circle", "blue", 1, 2)], "two red circles"),
        (False, [CIRCLE, SQUARE], "two circles"),
        (True, [("cross", "white", 0, 0), ("square", "red", 1, 2)], "a white cross left of a red square"),
        (False, [("cross", "white", 0, 0), ("square", "red", 1, 2)], "a white cross above a red square"),
        (False, [], "a red circle"),
    ],
)
def test_verdicts(right, things, text):
    assert judge(picture(*things), text) is right


@pytest.mark.parametrize(
    "inside",
    [
        lambda x, y: abs(x) + abs(y) < 1.2,  # diamond
        lambda x, y: (x / 1.3) ** 2 + (y * 1.3) ** 2 < 1,  # ellipse
        lambda x, y: (np.hypot(x, y) < 1) & (np.hypot(x, y) > 0.5),  # ring
        lambda x, y: (np.hypot(x, y) < 1) & (y < 0),  # half
        lambda x, y: np.hypot(x, y) < 0.5,  # too small
        lambda x, y: np.hypot(x, y) < 2,  # too large
        lambda x, y: (abs(x) < 1) & (abs(y) < 0.7),  # rectangle
        lambda x, y: abs(x) < (1 - y) / 2 * (abs(y) < 0.9),  # triangle, upside down
        lambda x, y: (abs(x - y) < 0.5) & (abs(x + y) < 1.4) | (abs(x + y) < 0.5) & (abs(x - y) < 1.4),  # cross, tilted
    ],
)
def test_other_shapes_are_none_of_ours(inside):
    assert [judge(painted(inside), f"a red {shape}") for shape in SHAPES] == [False] * len(SHAPES)


def test_murk_and_odd_colours_fail():
    image = picture(("circle", "red", 0, 0))
    assert judge(image, "a red circle")
    ghost = image.copy()
    ghost[180:220, 180:220] = (225, 120, 60)
    assert "neither background nor thing" in fault(ghost, "a red circle")
    orange = np.where((image == COLOURS["red"]).all(-1, keepdims=True), np.uint8((225, 130, 40)), image)
    assert not judge(orange, "a red circle") and not judge(orange, "a yellow circle")
    for flat in (0, 128, 255):
        assert not judge(np.full((256, 256, 3), flat, np.uint8), "a black square")
    assert not judge(np.random.default_rng(0).random((256, 256, 3)), "a red circle")
    assert not judge(np.full((256, 256, 3), np.nan), "a black square")


def test_specks_are_forgiven_and_blobs_are_not():
    image = picture(("circle", "red", 0, 0))
    image[200:210, 200:210] = COLOURS["blue"]
    assert judge(image, "a red circle")
    image[200:220, 200:220] = COLOURS["blue"]
    assert fault(image, "a red circle") == "2 things, not 1"


def test_detections_say_what_was_drawn():
    for scene, _ in [scene_and_caption(seed) for seed in range(60)]:
        sight = observe(render(scene))
        seen = {(d.shape, d.colour, d.size, *d.centre) for d in sight.detections}
        assert sight.background == scene.background and sight.murk_area == 0
        for thing in scene.things:
            x, y = (scenes.centre_px(thing.size, i) for i in (thing.column, thing.row))
            near = [s for s in seen if s[:3] == (thing.shape, thing.colour, thing.size)]
            assert any(max(abs(x - s[3]), abs(y - s[4])) <= 2 for s in near)
    areas = [d.area for d in detect(picture(("square", "red", 0, 0), ("square", "red", 2, 2, "large")))]
    assert areas == pytest.approx([(1.8 * 56) ** 2, (1.8 * 38) ** 2], rel=0.05)


def test_components_against_flood_fill():
    rng = np.random.default_rng(0)
    for _ in range(20):
        classes = rng.integers(-1, 2, (17, 23))
        labels = components(classes)
        assert ((labels == 0) == (classes < 0)).all()
        seen = np.zeros_like(labels)
        count = 0
        for start in zip(*np.nonzero(classes >= 0), strict=True):
            if seen[start]:
                continue
            count += 1
            stack = [start]
            while stack:
                r, c = cell = stack.pop()
                if 0 <= r < 17 and 0 <= c < 23 and not seen[cell] and classes[cell] == classes[start]:
                    seen[cell] = count
                    stack += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
        assert labels.max() == count == len(set(zip(seen[seen > 0].tolist(), labels[seen > 0].tolist(), strict=True)))


def test_judge_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match=r"\[h, w, 3\]"):
        judge(np.zeros((3, 256, 256)), "a red circle")
