"""The scenes against their judge: true pictures pass, blurred and noisy too, and nothing else does."""

import random
import time
from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sprint_core import scenes
from sprint_core.judge import components, detect, fault, judge, see
from sprint_core.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    PLACES,
    SHAPES,
    VOCABULARY,
    Requirement,
    Scene,
    Thing,
    Wanted,
    another_caption,
    category,
    combination,
    describe,
    parse,
    prompts,
    render,
    render_batch,
    scene_and_caption,
    split_of,
    words,
    write,
)

SEEDS = range(3000)


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[tuple[Scene, str]]]:
    return {split: [scene_and_caption(seed, split) for seed in SEEDS] for split in scenes.SPLITS}


@pytest.fixture(scope="module")
def by_category(drawn) -> dict[str, list[tuple[Scene, str]]]:
    """70 held-out scenes of each category."""
    found = {name: [] for name in CATEGORIES}
    for scene, text in drawn["test"]:
        found[category(parse(text))].append((scene, text))
    return {name: pairs[:70] for name, pairs in found.items()}


def blurred(image: np.ndarray, sigma: float = 2) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(image: np.ndarray, sigma: float = 0.03) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(image.shape, np.float32)
    return (image.astype(np.float32) / 255 + sigma * noise).clip(0, 1)


def picture(*things: tuple, background: str = "grey") -> np.ndarray:
    """A picture of (shape, colour, row, column[, size]) things."""
    return render(Scene(tuple(Thing(*t[:2], *(t[4:] or ("small",)), *t[2:4]) for t in things), background))


def painted(inside, colour: str = "red", background: str = "grey") -> np.ndarray:
    """A picture of whatever `inside(x, y)` says, x and y in units of 38 px from the centre."""
    y, x = (np.mgrid[:256, :256] - 127.5) / 38
    image = scenes.backdrop(background, 256).copy()
    image[inside(x, y)] = COLOURS[colour]
    return image.astype(np.uint8)


# --- the judge --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CATEGORIES)
def test_true_pictures_pass(by_category, name):
    pairs = by_category[name]
    assert len(pairs) == 70
    images = render_batch([scene for scene, _ in pairs])
    assert [fault(image, text) for image, (_, text) in zip(images, pairs)] == [None] * 70
    worn = [judge(noisy(blurred(image)), text) for image, (_, text) in zip(images, pairs)]
    assert np.mean(worn) >= 0.99
    soft = [judge(blurred(image, 4), text) for image, (_, text) in zip(images, pairs)]
    assert np.mean(soft) >= 0.95


def test_shuffled_pictures_fail(by_category):
    pairs = [pair for name in CATEGORIES for pair in by_category[name]]
    texts = [text for _, text in pairs]
    random.Random(0).shuffle(texts)
    passed = [judge(render(scene), text) for (scene, _), text in zip(pairs, texts)]
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
        sight = see(render(scene))
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
        for start in zip(*np.nonzero(classes >= 0)):
            if seen[start]:
                continue
            count += 1
            stack = [start]
            while stack:
                r, c = cell = stack.pop()
                if 0 <= r < 17 and 0 <= c < 23 and not seen[cell] and classes[cell] == classes[start]:
                    seen[cell] = count
                    stack += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
        assert labels.max() == count == len(set(zip(seen[seen > 0].tolist(), labels[seen > 0].tolist())))


def test_judge_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match=r"\[h, w, 3\]"):
        judge(np.zeros((3, 256, 256)), "a red circle")


# --- pictures ---------------------------------------------------------------------------------------


def test_same_seed_same_bytes(drawn):
    for split in scenes.SPLITS:
        again = [scene_and_caption(seed, split) for seed in range(50)]
        assert again == drawn[split][:50]
    first = [scene for scene, _ in drawn["train"][:20]]
    batch = render_batch(first)
    assert batch.shape == (20, 256, 256, 3) and batch.dtype == np.uint8
    assert all((render(scene) == image).all() for scene, image in zip(first, batch))
    assert scene_and_caption(1, "test") != scene_and_caption(1, "train")


def test_edges_are_anti_aliased():
    """The area of every shape is right to 0.5 %, and a circle's edge has many greys."""
    exact = {"circle": np.pi, "square": 1.8**2, "triangle": 1.8, "cross": 4 * (2 * 0.4 - 0.4**2)}
    for shape, area in exact.items():
        for size, radius in scenes.RADIUS_PX.items():
            cover = (160 - picture((shape, "black", 0, 2, size)).astype(float)[..., 0]) / (160 - 15)
            assert cover.sum() == pytest.approx(area * radius**2, rel=5e-3)
    assert len(np.unique(picture(("circle", "black", 0, 0)))) > 15


def test_things_never_come_near(drawn):
    for scene, _ in drawn["train"][:500] + drawn["test"][:500]:
        for a, b in combinations(scene.things, 2):
            gap = max(
                abs(scenes.centre_px(a.size, i) - scenes.centre_px(b.size, j))
                for i, j in ((a.row, b.row), (a.column, b.column))
            )
            assert gap - scenes.RADIUS_PX[a.size] - scenes.RADIUS_PX[b.size] >= 16


def test_colours_are_far_apart():
    things = np.array(list(COLOURS.values()), float)
    for a, b in combinations(things, 2):
        assert np.linalg.norm(a - b) > 150
    for name in BACKGROUNDS:
        column = scenes.backdrop(name, 256)[:, 0]
        assert np.linalg.norm(column[:, None] - things, axis=-1).min() > 108


def test_rendering_is_fast(drawn):
    some = [scene for scene, _ in drawn["train"][:200]]
    render_batch(some)
    start = time.process_time()
    render_batch(some)
    assert (time.process_time() - start) / 200 < 2e-3


# --- captions ---------------------------------------------------------------------------------------


def test_captions_stay_within_the_vocabulary(drawn):
    used = Counter()
    for pairs in drawn.values():
        for _, text in pairs:
            assert text == " ".join(words(text)) and len(words(text)) <= 20
            used.update(words(text))
    assert set(used) == set(VOCABULARY) and len(VOCABULARY) < 80


def test_captions_are_true_and_read_back(drawn):
    """Everything a caption says agrees with the scene's facts, not with pixels."""
    for scene, text in drawn["train"][:1000] + drawn["test"][:1000]:
        requirement = parse(text)
        assert requirement.background in (None, scene.background)
        assert sum(wanted.count for wanted in requirement.things) == len(scene.things)
        agreeing = [
            order
            for order in permutations(scene.things)
            if all(
                wanted.shape == thing.shape
                and wanted.colour in (None, thing.colour)
                and wanted.size in (None, thing.size)
                and wanted.place in (None, (thing.row, thing.column))
                for wanted, thing in zip(requirement.things * (3 if requirement.things[0].count > 1 else 1), order)
            )
        ]
        assert agreeing
        if requirement.relation:
            first, second = agreeing[0]
            axis = "column" if requirement.relation == "left" else "row"
            assert getattr(first, axis) < getattr(second, axis)


def test_every_wording_reads_back():
    rng = random.Random(0)
    red, big, blue = Wanted("circle", "red"), Wanted("cross", None, "large"), Wanted("square", "blue")
    cases = [Requirement((replace(big, place=place),), None, name) for place in PLACES for name in BACKGROUNDS]
    cases += [Requirement((red, blue), relation) for relation in (None, "left", "above")]
    cases += [Requirement((replace(red, count=count),), None, "teal") for count in (2, 3)]
    for case in cases:
        texts = {write(case, rng) for _ in range(40)}
        assert len(texts) >= 3
        assert all(parse(text) == case for text in texts)


def test_punctuation_and_capitals_do_not_matter():
    wanted = parse("a red circle at the top left on a grey background")
    assert parse("A red circle, at the top-left, on a grey background.") == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red dog",
        "a pink circle",
        "two circle",
        "a circles",
        "red circle",
        "a red circle a blue square",
        "two circles at the top",
        "two circles and a square",
        "a grey background with a circle on a teal background",
        "a circle to the left of",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError):
        parse(text)


# --- splits and prompts -----------------------------------------------------------------------------


def test_other_captions_of_a_scene(drawn):
    """As true as its first one, of the training split, the same for the same seed, and many."""
    scene = next(scene for scene, _ in drawn["train"] if category(describe(scene)) == "color_attr")
    texts = [another_caption(scene, seed) for seed in range(40)]
    assert len(set(texts)) > 20 and texts == [another_caption(scene, seed) for seed in range(40)]
    assert all(judge(render(scene), text) for text in texts)
    assert {split_of(parse(text)) for text in texts} == {"train"}


def test_splits_are_disjoint(drawn):
    said = {
        split: {combination(parse(text)) for _, text in pairs if split_of(parse(text)) == split}
        for split, pairs in drawn.items()
    }
    assert not said["train"] & said["test"]
    assert all(split_of(parse(text)) == split for split, pairs in drawn.items() for _, text in pairs)
    assert all(split_of(describe(scene)) == "train" for scene, _ in drawn["train"])


def test_wording_size_background_and_side_do_not_move_the_split():
    """'left of' and 'right of' with the things swapped say the same, as 'and' does either way round."""
    a, b = Wanted("circle", "red"), Wanted("square", "blue")
    same = {split_of(Requirement(pair, r)) for pair in ((a, b), (b, a)) for r in (None, "left", "above")}
    assert len(same) == 1
    for colour in COLOURS:
        sized = [
            split_of(parse(f"a {size}{colour} circle{on}"))
            for size in ("", "big ")
            for on in ("", " on a teal background")
        ]
        assert len(set(sized)) == 1
    assert parse("a red cross under a square") == parse("a square above a red cross")


FAMILIES = {
    "shape and place": [(Wanted(s, None, None, p),) for s in SHAPES for p in PLACES],
    "shape and colour": [(Wanted(s, c),) for s in SHAPES for c in COLOURS],
    "shape, colour and place": [(Wanted(s, c, None, p),) for s in SHAPES for c in COLOURS for p in PLACES],
    "count, shape and colour": [(Wanted(s, c, count=n),) for s in SHAPES for c in COLOURS for n in (2, 3)],
    "two shapes, one colour": [(Wanted(a, c), Wanted(b)) for a, b in permutations(SHAPES, 2) for c in COLOURS],
    "two shapes, two colours": [
        (Wanted(a, c), Wanted(b, d)) for a, b in combinations(SHAPES, 2) for c, d in permutations(COLOURS, 2)
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seventh_is_held_out_of_every_family(family):
    """Of every family of combinations about 15 %, and some of each shape and colour."""
    held_out = [things for things in FAMILIES[family] if split_of(Requirement(things)) == "test"]
    assert 0.09 <= len(held_out) / len(FAMILIES[family]) <= 0.26
    assert {thing.shape for things in held_out for thing in things} == set(SHAPES)
    colours = {thing.colour for things in held_out for thing in things} - {None}
    assert family == "shape and place" or colours == set(COLOURS)


def test_captions_of_shapes_alone_are_for_training():
    texts = ("a circle", "a big cross on a teal background", "two triangles", "a circle and a square")
    assert {split_of(parse(text)) for text in texts} == {"train"}


@pytest.mark.parametrize("name", CATEGORIES)
@pytest.mark.parametrize("split", scenes.SPLITS)
def test_prompts(name, split):
    found = prompts(name, 50, seed=3, split=split)
    assert len({prompt.text for prompt in found}) == 50
    assert found[:20] == prompts(name, 20, seed=3, split=split) != prompts(name, 20, seed=4, split=split)
    for prompt in found:
        assert prompt.category == category(prompt.requirement) == name
        assert parse(prompt.text) == prompt.requirement and split_of(prompt.requirement) == split


def test_what_captions_leave_open():
    """Which of two backgrounds: all else is as usual where it is not named."""
    for scene, text in [scene_and_caption(seed) for seed in range(400)]:
        said, cells = parse(text), [(thing.row, thing.column) for thing in scene.things]
        if len(cells) == 1:
            assert cells[0] == (said.things[0].place or (1, 1))
            assert scene.things[0].size == (said.things[0].size or "large")
        elif said.things[0].count == 3:
            assert cells == [(0, 1), (2, 0), (2, 2)]
        else:
            assert cells == ([(0, 1), (2, 1)] if said.relation == "above" else [(1, 0), (1, 2)])
        named = [(thing.shape, thing.colour or "white") for thing in said.things for _ in range(thing.count)]
        assert named == [(thing.shape, thing.colour) for thing in scene.things]
        assert scene.background in ([said.background] if said.background else ["teal", "purple"])


def test_free_scenes_stand_anywhere():
    drawn = [scene_and_caption(seed, free=True) for seed in range(300)]
    assert all(judge(render(scene), text) for scene, text in drawn)
    assert {tuple((t.row, t.column) for t in scene.things) for scene, _ in drawn} == {
        *[(place,) for place in PLACES],
        *scenes.PAIRS,
        *scenes.TRIPLES,
    }
    scene = next(s for s, _ in drawn if len(s.things) == 1 and (s.things[0].row, s.things[0].column) == (0, 0))
    assert {parse(another_caption(scene, seed, free=True)).things[0].place for seed in range(20)} == {None, (0, 0)}
    assert [p.scene for p in prompts("colors", 9, free=True)] != [p.scene for p in prompts("colors", 9)]


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="categories"):
        prompts("colours", 1)
    with pytest.raises(ValueError, match="splits"):
        scene_and_caption(0, "validation")
    monkeypatch.setattr(scenes, "STALE_DRAWS", 20)
    with pytest.raises(ValueError, match="different test prompts, not 100000"):
        prompts("single_object", 100_000)
