"""Scenes with captions, at random but the same for the same seed, and prompts to judge a model by.

A model trained in hours must not spend its capacity on chance, so a caption leaves little open. What it does not
name is as usual:

    colour  white          place   the centre; of two things left and right of it, as they are named; of three alike
    size    large, of one          one above two. A relation counts from the centre, too
    background  teal or purple, which is all that a seed decides

Only where things are drawn (see ControlNet) do they stand anywhere: `free` scenes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .captions import CATEGORIES, SPLITS, RequiredThing, Requirement, category, describe, parse, split_of, write
from .scenes import BACKGROUNDS, COLOURS, RADIUS_PX, SHAPES, Scene, Thing

STALE_DRAWS = 5000  # that many draws without a new prompt: there are no more
KINDS = {"one": 0.35, "pair": 0.45, "alike": 0.2}
KIND_OF = dict(zip(CATEGORIES, ("one", "pair", "alike", "one", "pair", "pair"), strict=True))

# Places, (row, column), as captions usually mean them.
CENTRE = (1, 1)
BESIDE = ((1, 0), (1, 2))
BELOW = ((0, 1), (2, 1))
PYRAMID = ((0, 1), (2, 0), (2, 2))
USUAL_COLOUR, USUAL_SIZE = "white", "large"  # of a single thing
USUAL_BACKGROUNDS = ("teal", "purple")  # two, as two seeds should show two images
# Cells of things that stand together in free scenes; no two of them are neighbours, not even diagonally.
PAIRS = [((i, 0), (i, 2)) for i in range(3)] + [((0, i), (2, i)) for i in range(3)]
TRIPLES = [((0, 0), (0, 2), (2, 1)), ((2, 0), (2, 2), (0, 1)), ((0, 0), (2, 0), (1, 2)), ((0, 2), (2, 2), (1, 0))]


@dataclass(frozen=True)
class Prompt:
    text: str
    category: str
    requirement: Requirement
    scene: Scene  # one that it is true of


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
        looks = list(zip(shapes, colours, strict=True))
    return Scene(tuple(Thing(*look, size, *cell) for look, cell in zip(looks, cells, strict=True)), background)


def _draw_requirement(scene: Scene, rng: random.Random, free: bool) -> Requirement:
    """Some of what is true of a scene. Sizes and places are said of single things only, as only they vary in size."""
    full = describe(scene)
    open_background = rng.random() < 0.6 and (free or full.background in USUAL_BACKGROUNDS)
    background = None if open_background else full.background

    def colour(thing: RequiredThing) -> str | None:
        return None if thing.colour == USUAL_COLOUR and rng.random() < 0.6 else thing.colour

    first = full.things[0]
    if len(full.things) == 1:
        open_size = rng.random() < 0.5 and (free or first.size == USUAL_SIZE)
        size = first.size if first.count == 1 and not open_size else None
        place = first.place if rng.random() < 0.4 or not (free or first.place == CENTRE) else None
        return Requirement((RequiredThing(first.shape, colour(first), size, place, first.count),), None, background)
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
    distinct: dict[str, Prompt] = {}
    stale = 0
    while len(distinct) < n:
        scene, requirement = _draw(KIND_OF[category_name], split, rng, free)
        text = write(requirement, rng)
        if category(requirement) == category_name and text not in distinct:
            distinct[text] = Prompt(text, category_name, parse(text), scene)
            stale = 0
        stale += 1
        if stale > STALE_DRAWS:
            raise ValueError(f"{category_name} has about {len(distinct)} different {split} prompts, not {n}")
    return list(distinct.values())
