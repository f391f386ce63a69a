"""Scenes: which sprites stand where on which ground, and their images.

A scene follows from a requirement (captions.py) and a seed; what the requirement leaves open is as usual:

    size    large of a single thing, unless a place is named; everything else is small
    place   the centre
    style   3d
    ground  white or sky blue
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .art import Art
from .captions import GROUNDS, USUAL_GROUNDS, Requirement, draw, write

CANVAS_PX = 256
LARGE_PX, SMALL_PX = 200, 112
MARGIN_PX = 10
JITTER_PX = 4
_BESIDE, _STACKED = ((1, 0), (1, 2)), ((0, 1), (2, 1))
SPOTS = {  # rows and columns of several things alike
    2: _BESIDE,
    3: ((0, 1), (2, 0), (2, 2)),
    4: ((0, 0), (0, 2), (2, 0), (2, 2)),
}


@dataclass(frozen=True)
class Thing:
    """A sprite of size_px whose top left corner is at x_px, y_px."""

    concept: int
    style: int
    size_px: int
    x_px: int
    y_px: int


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    ground: str


def compose(requirement: Requirement, rng: random.Random) -> Scene:
    """A scene that shows what is required."""
    ground = requirement.ground or rng.choice(USUAL_GROUNDS)
    style = requirement.style or 0
    concepts = requirement.concepts * requirement.count
    size, cells = layout(requirement)
    things = [
        Thing(concept, style, size, *_corner(cell, size, rng)) for concept, cell in zip(concepts, cells, strict=True)
    ]
    return Scene(tuple(things), ground)


def layout(requirement: Requirement) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The size in pixels and the cell (row, column) of each thing, in the order of the requirement's concepts."""
    if requirement.relation:
        cells = _BESIDE if requirement.relation in ("left", "right") else _STACKED
        cells = cells[::-1] if requirement.relation in ("right", "below") else cells
    else:
        cells = SPOTS.get(requirement.count) or (requirement.place or (1, 1),)
    is_large = requirement.kind == "one" and requirement.place is None and requirement.size != "small"
    return LARGE_PX if is_large else SMALL_PX, cells


FREE_PX = (216, 192, 168, 144, 120, 104)  # sizes of things in free scenes


def compose_free(requirement: Requirement, rng: random.Random) -> Scene:
    """A scene whose things stand anywhere in any size, as a drawing may want them: for ControlNets.

    They do not overlap: two things share the canvas as two halves, and more are small in their usual cells.
    """
    ground, style = requirement.ground or rng.choice(USUAL_GROUNDS), requirement.style or 0
    if requirement.count > 2:
        return compose(requirement, rng)
    concepts = requirement.concepts * requirement.count
    if len(concepts) == 1:
        size = rng.choice(FREE_PX)
        corners = [tuple(rng.randint(0, CANVAS_PX - size) for _ in range(2))]
    else:
        size, half = rng.choice(FREE_PX[4:]), CANVAS_PX // 2
        corners = [(start + rng.randint(0, half - size), rng.randint(0, CANVAS_PX - size)) for start in (0, half)]
        if requirement.relation in ("above", "below") or (requirement.relation is None and rng.random() < 0.5):
            corners = [corner[::-1] for corner in corners]
        if requirement.relation in ("right", "below"):
            corners.reverse()
    return Scene(tuple(Thing(c, style, size, *corner) for c, corner in zip(concepts, corners, strict=True)), ground)


def usual_corner(step: int, size: int) -> int:
    """x or y of the top left corner of a thing in a cell's column or row, before it is jittered."""
    return MARGIN_PX + (CANVAS_PX - size - 2 * MARGIN_PX) * step // 2


def _corner(cell: tuple[int, int], size: int, rng: random.Random) -> tuple[int, int]:
    """x and y of the top left corner of a thing in a cell (row, column) of three by three."""
    row, column = cell
    x, y = (usual_corner(step, size) + rng.randint(-JITTER_PX, JITTER_PX) for step in (column, row))
    return x, y


def backdrop(ground: str) -> Tensor:
    """[3, CANVAS_PX, CANVAS_PX] in [0, 255]."""
    top, bottom = (torch.tensor(colour, dtype=torch.float32)[:, None, None] for colour in GROUNDS[ground])
    rows = torch.linspace(0, 1, CANVAS_PX)[None, :, None]
    return torch.lerp(top, bottom, rows).expand(3, CANVAS_PX, CANVAS_PX)


def backdrops(device: torch.device | str) -> Tensor:
    """[grounds, 3, CANVAS_PX, CANVAS_PX] in [0, 255], in the order of GROUNDS."""
    return torch.stack([backdrop(ground) for ground in GROUNDS]).to(device)


THINGS = max(len(cells) for cells in SPOTS.values())


def pack(scenes: Sequence[Scene]) -> Tensor:
    """Scenes as numbers [b, 1 + THINGS * 5], int16: ground, then style, concept, size, x and y of each thing, or -1."""
    names = {name: number for number, name in enumerate(GROUNDS)}
    rows = torch.full((len(scenes), 1 + THINGS * 5), -1, dtype=torch.int16)
    for row, scene in zip(rows, scenes, strict=True):
        things = [n for t in scene.things for n in (t.style, t.concept, t.size_px, t.x_px, t.y_px)]
        row[: 1 + len(things)] = torch.tensor([names[scene.ground], *things])
    return rows


def paint(packed: Tensor, art: Art) -> Tensor:
    """Images [b, 3, CANVAS_PX, CANVAS_PX] in [0, 255], uint8, where the art is: thing by thing, size by size."""
    packed = packed.to(art.sprites.device, torch.long)
    canvas = backdrops(packed.device)[packed[:, 0]]
    for thing in packed[:, 1:].unflatten(1, (THINGS, 5)).unbind(1):
        for size in thing[:, 2].unique().tolist():
            if size > 0:
                image = (thing[:, 2] == size).nonzero()[:, 0]
                _paste(canvas, image, thing[image], art, size)
    return canvas.round_().clamp_(0, 255).to(torch.uint8)


def silhouettes(packed: Tensor, art: Art) -> Tensor:
    """How much of each pixel things cover: [b, CANVAS_PX, CANVAS_PX] in [0, 1], where the art is."""
    bare, full = (list(GROUNDS).index(name) for name in ("black", "white"))
    black, white = (paint(torch.cat([torch.full_like(packed[:, :1], g), packed[:, 1:]], 1), art) for g in (bare, full))
    ground = backdrops(black.device)
    shines_through = (white.float() - black.float()) / (ground[full] - ground[bare])
    return (1 - shines_through.mean(1)).clamp_(0, 1)


def _paste(canvas: Tensor, image: Tensor, things: Tensor, art: Art, size: int) -> None:
    """Sprites of one size over images [n] of canvas [b, 3, h, w]; things [n, 5]: style, concept, size, x, y."""
    style, concept, _, x, y = things.unbind(1)
    sprites = art.resized(style, concept, size)
    side = torch.arange(size, device=canvas.device)
    rows, columns = (y[:, None] + side)[:, None, :, None], (x[:, None] + side)[:, None, None, :]
    at = image[:, None, None, None], torch.arange(3, device=canvas.device)[None, :, None, None], rows, columns
    canvas[at] = canvas[at] * (1 - sprites[:, 3:] / 255) + sprites[:, :3]


def scene_and_caption(seed: int, split: str = "train") -> tuple[Scene, str]:
    """A scene and a caption that is true of it; the same seed and split give the same ones."""
    rng = random.Random(f"{split} {seed}")
    requirement = draw(rng, split)
    text = write(requirement, rng)
    return compose(requirement, rng), text
