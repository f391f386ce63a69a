"""A small world: what a tiny text-to-image model is trained to paint, and how it looks.

One to three plain shapes stand on a muted background, on a grid of three by three places and never in
neighbouring ones, so nothing overlaps or touches. A scene decides every pixel: no jitter, no noise, because a model
trained in hours must not spend its capacity on chance. What is said of scenes is in captions.py, and which of them
there are in examples.py.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
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
# Half the extents, in radii.
SQUARE_SIDE = 0.9
TRIANGLE_HEIGHT = 0.9
CROSS_ARM = 0.4
CANVAS_PX, MARGIN_PX = 256, 8
REACH_PX = 40  # how far a thing may stand from its place


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
    """A thing with its centre at (x, y) of the canvas, in an image of px pixels: where it stands there, and how much
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
    top, bottom = np.array(BACKGROUNDS[name], np.float32)
    down = ((np.arange(px, dtype=np.float32) + 0.5) / px)[:, None]
    return np.repeat((top * (1 - down) + bottom * down)[:, None], px, axis=1)


def moves(scene: Scene, seed: int) -> list[tuple[int, int]]:
    """How far (right, down) each thing may stand from its place, in canvas pixels, at random within the canvas."""
    rng, offsets = random.Random(f"moves {seed}"), []
    for thing in scene.things:
        first, last = centre_px(thing.size, 0), centre_px(thing.size, 2)
        places = [centre_px(thing.size, index) for index in (thing.column, thing.row)]
        ends = [(max(first - p, -REACH_PX), min(last - p, REACH_PX)) for p in places]
        offsets.append(tuple(rng.randint(low, high) for low, high in ends))
    return offsets


def render(scene: Scene, px: int = CANVAS_PX, moved: Sequence[tuple[int, int]] = ()) -> np.ndarray:
    """The image of a scene, anti-aliased: [px, px, 3] uint8. moved: how far each thing stands from its place."""
    image = backdrop(scene.background, px).copy()
    for thing, (right, down) in zip(scene.things, moved or [(0, 0)] * len(scene.things), strict=True):
        y, x = centre_px(thing.size, thing.row) + down, centre_px(thing.size, thing.column) + right
        rows, columns, cover = _stencil(thing.shape, thing.size, y, x, px)
        image[rows, columns] += cover * (np.array(COLOURS[thing.colour], np.float32) - image[rows, columns])
    return (image + 0.5).astype(np.uint8)


def render_batch(scenes: Sequence[Scene]) -> np.ndarray:
    """The images of several scenes: [n, 256, 256, 3] uint8."""
    return np.stack([render(scene) for scene in scenes])
