"""A small world of captioned pictures: what a tiny text-to-image model is trained on and asked for.

One to three plain shapes stand on a muted background, on a grid of three by three places and never in
neighbouring ones, so nothing overlaps or touches. A scene decides every pixel: no jitter, no noise, few words,
because a model trained in hours must not spend its capacity on chance. For the same reason a caption leaves little
open. What it does not name is as usual:

    colour  white          place   the centre; of two things left and right of it, as they are named; of three alike
    size    large, of one          one above two. A relation counts from the centre, too
    background  teal or purple, which is all that a seed decides

Only where things are drawn (see ControlNet) do they stand anywhere: `free` scenes.

A caption says part of what its scene holds, and `parse` reads any caption back, so the judge (judge.py) needs the
text alone. The *combination* that a caption names, without its size, background and wording, decides the split: a
stable hash sends about 15 % of the combinations to the test split, and training shows neither those captions nor
a scene whose full description is such a combination:

    one thing       shape, colour and place, or as many of them as are named
    things alike    count, shape and colour
    two things      both shapes and colours, whatever the relation; with a colour unsaid, the relation too

Captions that name nothing but shapes and counts ("a circle", "two crosses") are too few to hold out: all are train.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np

COLOURS = {
    "red": (225, 35, 40),
    "green": (30, 170, 45),
    "blue": (30, 60, 225),
    "yellow": (245, 215, 35),
    "white": (252, 252, 252),
    "black": (15, 15, 15),
}
BACKGROUNDS = {  # top and bottom colour; all, and all between, lie 108 or more from every object colour
    "grey": ((160, 160, 160), (160, 160, 160)),
    "brown": ((140, 100, 75), (140, 100, 75)),
    "teal": ((80, 130, 145), (80, 130, 145)),
    "purple": ((130, 95, 155), (130, 95, 155)),
    "teal to grey": ((80, 130, 145), (160, 160, 160)),
    "purple to brown": ((130, 95, 155), (140, 100, 75)),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
RADIUS_PX = {"small": 38, "large": 56}
SQUARE_SIDE, TRIANGLE_HEIGHT, CROSS_ARM = 0.9, 0.9, 0.4  # half the extents, in radii
CANVAS_PX, MARGIN_PX = 256, 8

# Each meaning's wordings, written equally often.
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
NUMBERS = {1: "a", 2: "two", 3: "three"}
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
PLACES = {
    (0, 0): ("at the top left", "in the top left corner", "in the upper left corner"),
    (0, 1): ("at the top",),
    (0, 2): ("at the top right", "in the top right corner", "in the upper right corner"),
    (1, 0): ("on the left", "on the left side"),
    (1, 1): ("in the centre", "in the middle"),
    (1, 2): ("on the right", "on the right side"),
    (2, 0): ("at the bottom left", "in the bottom left corner", "in the lower left corner"),
    (2, 1): ("at the bottom",),
    (2, 2): ("at the bottom right", "in the bottom right corner", "in the lower right corner"),
}
BACKDROPS = {
    name: (f"a {name} background", *([f"a gradient from {name}"] if " to " in name else [])) for name in BACKGROUNDS
}
OPENINGS = {"one": ("a picture of", "there is"), "many": ("a picture of", "there are")}

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's tags
SPLITS = ("train", "test")
TEST_SHARE, SPLIT_SEED = 0.15, 2505  # a seed whose share is even over the categories, shapes and colours
STALE_DRAWS = 5000  # that many draws without a new prompt: there are no more
KINDS = {"one": 0.35, "pair": 0.45, "alike": 0.2}
KIND_OF = dict(zip(CATEGORIES, ("one", "pair", "alike", "one", "pair", "pair")))

CENTRE, BESIDE, BELOW, PYRAMID = (1, 1), ((1, 0), (1, 2)), ((0, 1), (2, 1)), ((0, 1), (2, 0), (2, 2))  # as usual
USUAL_COLOUR, USUAL_SIZE = "white", "large"  # of a single thing
USUAL_BACKGROUNDS = ("teal", "purple")  # two, as two seeds should show two pictures
# Cells of things that stand together in free scenes; no two of them are neighbours, not even diagonally.
PAIRS = [((i, 0), (i, 2)) for i in range(3)] + [((0, i), (2, i)) for i in range(3)]
TRIPLES = [((0, 0), (0, 2), (2, 1)), ((2, 0), (2, 2), (0, 1)), ((0, 0), (2, 0), (1, 2)), ((0, 2), (2, 2), (1, 0))]


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str


@dataclass(frozen=True)
class Wanted:
    """What a caption says of one thing, or of `count` things alike; None is unsaid."""

    shape: str
    colour: str | None = None
    size: str | None = None
    place: tuple[int, int] | None = None
    count: int = 1


@dataclass(frozen=True)
class Requirement:
    """All that a caption says. `relation` is None, 'left' or 'above': where the first thing is from the second."""

    things: tuple[Wanted, ...]
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Prompt:
    text: str
    category: str
    requirement: Requirement
    scene: Scene  # one that it is true of


# --- pictures ---------------------------------------------------------------------------------------


def centre_px(size: str, index: int) -> int:
    """Canvas position of the centre of a thing of that size in row or column `index`."""
    edge = MARGIN_PX + RADIUS_PX[size]
    return (edge, CANVAS_PX // 2, CANVAS_PX - edge)[index]


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance of points (x right, y down, in radii) to the outline, negative inside; corners bevelled."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - SQUARE_SIDE
    if shape == "triangle":
        height = 2 * TRIANGLE_HEIGHT
        side = (abs(x) * height - (y + TRIANGLE_HEIGHT)) / np.hypot(height, 1)
        return np.maximum(side, y - TRIANGLE_HEIGHT)
    if shape == "cross":
        long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
        return np.maximum(long - 1, short - CROSS_ARM)
    raise ValueError(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}")


@lru_cache(maxsize=2000)
def _stencil(shape: str, size: str, y: int, x: int, px: int) -> tuple[slice, slice, np.ndarray]:
    """A thing with its centre at (x, y) of the canvas, in a picture of px pixels: where it stands there, and how much
    of each pixel it covers, [h, w, 1]."""
    radius = RADIUS_PX[size] * px / CANVAS_PX
    spans, axes = [], []
    for position in (y, x):
        centre = position * px / CANVAS_PX
        first, last = max(0, int(centre - radius) - 1), min(px, int(centre + radius) + 2)
        spans.append(slice(first, last))
        axes.append((np.arange(first, last) + 0.5 - centre) / radius)
    outline = distance(shape, axes[1][None, :], axes[0][:, None]) * radius
    return *spans, np.clip(0.5 - outline, 0, 1).astype(np.float32)[..., None]


@cache
def backdrop(name: str, px: int) -> np.ndarray:
    """An empty scene: [px, px, 3] float32 in [0, 255]. Shared: copy before changing."""
    top, bottom = np.float32(BACKGROUNDS[name])
    down = ((np.arange(px, dtype=np.float32) + 0.5) / px)[:, None]
    return np.repeat((top * (1 - down) + bottom * down)[:, None], px, axis=1)


def moves(scene: Scene, seed: int, reach_px: int = 40) -> list[tuple[int, int]]:
    """How far (right, down) each thing may stand from its place, in canvas pixels, at random within the canvas."""
    rng, found = random.Random(f"moves {seed}"), []
    for thing in scene.things:
        first, last = centre_px(thing.size, 0), centre_px(thing.size, 2)
        places = [centre_px(thing.size, index) for index in (thing.column, thing.row)]
        ends = [(max(first - p, -reach_px), min(last - p, reach_px)) for p in places]
        found.append(tuple(rng.randint(low, high) for low, high in ends))
    return found


def render(scene: Scene, px: int = CANVAS_PX, moved: Sequence[tuple[int, int]] = ()) -> np.ndarray:
    """The picture of a scene, anti-aliased: [px, px, 3] uint8. moved: how far each thing stands from its place."""
    image = backdrop(scene.background, px).copy()
    for thing, (right, down) in zip(scene.things, moved or [(0, 0)] * len(scene.things)):
        y, x = centre_px(thing.size, thing.row) + down, centre_px(thing.size, thing.column) + right
        rows, columns, cover = _stencil(thing.shape, thing.size, y, x, px)
        image[rows, columns] += cover * (np.float32(COLOURS[thing.colour]) - image[rows, columns])
    return (image + 0.5).astype(np.uint8)


def render_batch(scenes: Sequence[Scene], px: int = CANVAS_PX) -> np.ndarray:
    """The pictures of several scenes: [n, px, px, 3] uint8."""
    return np.stack([render(scene, px) for scene in scenes])


# --- captions ---------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The words of a text as the vocabulary has them: lower case, no punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def _meanings(table: dict, before: str = "", after: str = "") -> dict:
    """Wording to meaning, of a table of meaning to wordings."""
    return {before + wording + after: meaning for meaning, wordings in table.items() for wording in wordings}


SIZE_OF, PLACE_OF, RELATION_OF = _meanings(SIZE_WORDS), _meanings(PLACES), _meanings(RELATIONS)
SHAPE_OF = {word: (shape, word != shape) for shape, plural in SHAPES.items() for word in (shape, plural)}
COUNT_OF = {word: count for count, word in NUMBERS.items()}
BEHIND_OF = _meanings(BACKDROPS, after=" with")
ON_OF = _meanings(BACKDROPS, "on ") | _meanings(BACKDROPS, "with ")
OPENING_OF = _meanings(OPENINGS)
_TABLES = (SIZE_OF, PLACE_OF, RELATION_OF, SHAPE_OF, COUNT_OF, BEHIND_OF, ON_OF, OPENING_OF, COLOURS)
VOCABULARY = tuple(sorted({"and"} | {word for table in _TABLES for text in table for word in words(text)}))


def _any(table: dict) -> str:
    return f"({'|'.join(sorted(table, key=len, reverse=True))})"


_THING = f"{_any(COUNT_OF)}(?: {_any(SIZE_OF)})?(?: {_any(COLOURS)})? {_any(SHAPE_OF)}"
_CAPTION = re.compile(
    f"(?:{_any(BEHIND_OF)} |{_any(OPENING_OF)} )?{_THING}"
    f"(?: {_any(PLACE_OF)}| {_any(RELATION_OF | {'and': None})} {_THING})?(?: {_any(ON_OF)})?"
)


def _wanted(text: str, number: str, size: str | None, colour: str | None, shape_word: str) -> Wanted:
    count, (shape, plural) = COUNT_OF[number], SHAPE_OF[shape_word]
    if plural != (count > 1):
        raise ValueError(f"{number!r} does not agree with {shape_word!r} in {text!r}")
    return Wanted(shape, colour, SIZE_OF.get(size), None, count)


def parse(text: str) -> Requirement:
    """What a caption says; capitals and punctuation do not matter. Raises ValueError where it is no caption."""
    match = _CAPTION.fullmatch(" ".join(words(text)))
    if match is None:
        raise ValueError(f"not a caption of this world: {text!r}; one is 'a red circle to the left of a blue square'")
    behind, _, *first, place, joint = match.groups()[:8]
    second, on = match.groups()[8:12], match.group(13)
    things = [replace(_wanted(text, *first), place=PLACE_OF.get(place))]
    if joint:
        things.append(_wanted(text, *second))
    if (behind and on) or (max(thing.count for thing in things) > 1 and (joint or place)):
        raise ValueError(f"a caption has one background, and several things alike stand alone: {text!r}")
    relation = RELATION_OF.get(joint)
    if relation in ("right", "below"):
        things, relation = things[::-1], {"right": "left", "below": "above"}[relation]
    return Requirement(tuple(things), relation, BEHIND_OF.get(behind) or ON_OF.get(on))


def write(requirement: Requirement, rng: random.Random) -> str:
    """One of the wordings of a requirement, such that `parse` gives it back."""
    things, relation = list(requirement.things), requirement.relation
    if relation and rng.random() < 0.5:
        things, relation = things[::-1], {"left": "right", "above": "below"}[relation]
    phrases = []
    for thing in things:
        name = thing.shape if thing.count == 1 else SHAPES[thing.shape]
        size = thing.size and rng.choice(SIZE_WORDS[thing.size])
        phrases.append(" ".join(filter(None, (NUMBERS[thing.count], size, thing.colour, name))))
    text = f" {rng.choice(RELATIONS[relation]) if relation else 'and'} ".join(phrases)
    if things[0].place:
        text += " " + rng.choice(PLACES[things[0].place])
    behind = requirement.background and rng.choice(BACKDROPS[requirement.background])
    form = rng.random()
    if behind and form < 0.25:
        return f"{behind} with {text}"
    if form > 0.75:
        text = f"{rng.choice(OPENINGS['one' if things[0].count == 1 else 'many'])} {text}"
    return f"{text} {rng.choice(('on', 'with'))} {behind}" if behind else text


# --- combinations and splits ------------------------------------------------------------------------


def describe(scene: Scene) -> Requirement:
    """All that a caption can say of a scene, but for a relation."""
    first = scene.things[0]
    if len(scene.things) == 1:
        things = (Wanted(first.shape, first.colour, first.size, (first.row, first.column)),)
    elif len({(thing.shape, thing.colour) for thing in scene.things}) == 1:
        things = (Wanted(first.shape, first.colour, first.size, count=len(scene.things)),)
    else:
        things = tuple(Wanted(thing.shape, thing.colour, thing.size) for thing in scene.things)
    return Requirement(things, None, scene.background)


def outline(scene: Scene) -> Requirement:
    """What the edges of a scene say: shapes, sizes and places, no colours."""
    things = tuple(Wanted(thing.shape, None, thing.size, (thing.row, thing.column)) for thing in scene.things)
    return Requirement(things)


def category(requirement: Requirement) -> str:
    """Which of GenEval's six kinds of prompt it is."""
    coloured = all(thing.colour for thing in requirement.things)
    if requirement.things[0].count > 1:
        return "counting"
    if len(requirement.things) == 1:
        return "colors" if coloured else "single_object"
    return "position" if requirement.relation else "color_attr" if coloured else "two_object"


def combination(requirement: Requirement) -> str:
    """What the split is decided by, as text; see the head of this file."""
    names = [f"{thing.count} {thing.colour} {thing.shape} {thing.place}" for thing in requirement.things]
    relation = requirement.relation
    if relation is None or all(thing.colour for thing in requirement.things):
        relation, names = None, sorted(names)
    return f"{relation}: {', '.join(names)}"


def split_of(requirement: Requirement) -> str:
    """'train' or 'test', by the combination alone."""
    if not (requirement.relation or any(thing.colour or thing.place for thing in requirement.things)):
        return "train"
    digest = hashlib.sha256(f"{SPLIT_SEED} {combination(requirement)}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32 else "train"


# --- drawing scenes and captions --------------------------------------------------------------------


def _draw_colour(rng: random.Random) -> str:
    return USUAL_COLOUR if rng.random() < 0.3 else rng.choice(list(COLOURS))


def _draw_background(rng: random.Random) -> str:
    return rng.choice(USUAL_BACKGROUNDS if rng.random() < 0.5 else list(BACKGROUNDS))


def _draw_cells(kind: str, rng: random.Random, free: bool) -> Sequence[tuple[int, int]]:
    if kind == "one":
        usual = not free and rng.random() < 0.4
        return [CENTRE if usual else (rng.randrange(3), rng.randrange(3))]
    if kind == "pair":
        return rng.choice(PAIRS if free else (BESIDE, BESIDE, BELOW))
    many = rng.random() < 0.5
    return rng.choice(TRIPLES if many else PAIRS) if free else PYRAMID if many else BESIDE


def _draw_scene(kind: str, rng: random.Random, free: bool) -> Scene:
    background, cells = _draw_background(rng), _draw_cells(kind, rng, free)
    shapes, colours = rng.sample(list(SHAPES), 2), [_draw_colour(rng), _draw_colour(rng)]
    size = rng.choice(list(RADIUS_PX)) if kind == "one" else "small"
    if kind != "pair":
        looks = [(shapes[0], colours[0])] * len(cells)
    else:
        while colours[0] == colours[1] != USUAL_COLOUR:
            colours[1] = _draw_colour(rng)
        looks = list(zip(shapes, colours))
    return Scene(tuple(Thing(*look, size, *cell) for look, cell in zip(looks, cells)), background)


def _draw_requirement(scene: Scene, rng: random.Random, free: bool) -> Requirement:
    """Some of what is true of a scene. Sizes and places are said of single things only, as only they vary in size."""
    full = describe(scene)
    open_background = rng.random() < 0.6 and (free or full.background in USUAL_BACKGROUNDS)
    background = None if open_background else full.background

    def colour(thing: Wanted) -> str | None:
        return None if thing.colour == USUAL_COLOUR and rng.random() < 0.6 else thing.colour

    first = full.things[0]
    if len(full.things) == 1:
        open_size = rng.random() < 0.5 and (free or first.size == USUAL_SIZE)
        size = first.size if first.count == 1 and not open_size else None
        place = first.place if rng.random() < 0.4 or not (free or first.place == CENTRE) else None
        return Requirement((Wanted(first.shape, colour(first), size, place, first.count),), None, background)
    things = tuple(replace(thing, size=None, colour=colour(thing)) for thing in full.things)
    # The cells of a pair run from left to right or from top to bottom.
    relation = "left" if scene.things[0].row == scene.things[1].row else "above"
    return Requirement(things, None if relation == "left" and rng.random() < 0.5 else relation, background)


def _draw(kind: str | None, split: str, rng: random.Random, free: bool) -> tuple[Scene, Requirement]:
    if split not in SPLITS:
        raise ValueError(f"the splits are {' and '.join(SPLITS)}, not {split!r}")
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    while True:
        scene = _draw_scene(kind, rng, free)
        requirement = _draw_requirement(scene, rng, free)
        if split_of(requirement) == split and (split == "test" or split_of(describe(scene)) == "train"):
            return scene, requirement


def another_caption(scene: Scene, seed: int, free: bool = False) -> str:
    """A caption of the training split that is true of a (free) scene; the same seed gives the same one."""
    rng = random.Random(seed)
    while True:
        requirement = _draw_requirement(scene, rng, free)
        if split_of(requirement) == "train":
            return write(requirement, rng)


def scene_and_caption(seed: int, split: str = "train", free: bool = False) -> tuple[Scene, str]:
    """A scene and a caption that is true of it; the same seed and split give the same ones. free: things anywhere."""
    rng = random.Random(f"{split} {seed}")
    scene, requirement = _draw(None, split, rng, free)
    return scene, write(requirement, rng)


def prompts(category_name: str, n: int, seed: int = 0, split: str = "test", free: bool = False) -> list[Prompt]:
    """n different prompts of one of CATEGORIES, in the order of drawing: fewer are the beginning of more."""
    if category_name not in CATEGORIES:
        raise ValueError(f"the categories are {', '.join(CATEGORIES)}, not {category_name!r}")
    rng = random.Random(f"{category_name} {split} {seed}")
    found: dict[str, Prompt] = {}
    stale = 0
    while len(found) < n:
        scene, requirement = _draw(KIND_OF[category_name], split, rng, free)
        text = write(requirement, rng)
        if category(requirement) == category_name and text not in found:
            found[text] = Prompt(text, category_name, parse(text), scene)
            stale = 0
        stale += 1
        if stale > STALE_DRAWS:
            raise ValueError(f"{category_name} has about {len(found)} different {split} prompts, not {n}")
    return list(found.values())
