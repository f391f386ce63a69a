"""The judge: does an image of the emoji world show what a caption says? From pixels alone.

    (1) ground   the line, from top to bottom, through the colours at the margin, which nothing covers; the known
                 ground nearest to it
    (2) things   at each place where the caption has one: the thumbnail, among all concepts and styles, that is
                 nearest to what stands there, wherever it is within some pixels
    (3) place    of all spots, a thing explains most of the image at its own
    (4) order    of all ways in which two things may stand, theirs explains most of the image
    (5) number   every spot is taken, and nothing is elsewhere

An image minus its ground is compared with a thumbnail minus the same ground, so that a cast of colour over all of it
does no harm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import scenes, templates
from .captions import GROUNDS, RELATIONS, Requirement
from .scenes import CANVAS_PX, LARGE_PX, SMALL_PX, Scene, usual_corner
from .templates import CELLS, Templates

CHUNK = 32  # images at a time
SHIFTS_PX = (-8, -4, 0, 4, 8)
RING_PX = 6
GROUND_REACH = 0.13  # RGB distance, of the mean over the rows, at which a ground is still a known one
RING_REACH = 0.12  # how far the margin may be from a line
MARGIN_REACH_PX = 14  # how far around its usual box a thing may reach
MURK_REACH, MURK_AREA = 0.16, 400  # RGB difference and number of pixels
TAKEN = 0.3  # share of a thumbnail's energy by which it must explain a spot better than bare ground does
TOP = 5

# Where a thing may stand: its size in pixels, and its cell (row, column).
SPOTS = (*((SMALL_PX, (row, column)) for row in range(3) for column in range(3)), (LARGE_PX, (1, 1)))


@dataclass(frozen=True)
class Verdicts:
    """What is right in b images, [b] each, true where a caption says nothing of it.

    names: every required thing is the nearest of all; top5: among the five nearest. nearest [b, THINGS]: the
    concept nearest at each place; ranks [b, THINGS]: of the required concept, from 1; -1 where there is none.
    """

    names: Tensor
    top5: Tensor
    ground: Tensor
    style: Tensor
    place: Tensor
    order: Tensor
    number: Tensor
    nearest: Tensor
    ranks: Tensor

    @property
    def right(self) -> Tensor:
        """All of it: [b]."""
        return self.names & self.ground & self.style & self.place & self.order & self.number


@torch.no_grad()
def judge(images: Tensor, requirements: Sequence[Requirement], known: Templates | None = None) -> Verdicts:
    """Images [b, 3, h, w] or [b, h, w, 3], in [0, 1] or uint8, by what they are to show, where the images are.

    Raises ValueError on other shapes, OSError and ValueError as templates.load does.
    """
    pixels = _canvases(images)
    if len(pixels) != len(requirements):
        raise ValueError(f"{len(pixels)} images, but {len(requirements)} requirements")
    known = (known or templates.load()).to(pixels.device)
    bank = _Bank(known)
    starts = range(0, len(pixels), CHUNK)
    parts = [_judge(pixels[i : i + CHUNK], requirements[i : i + CHUNK], bank) for i in starts]
    return Verdicts(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Verdicts)})


def _canvases(images: Tensor) -> Tensor:
    """[b, 3, CANVAS_PX, CANVAS_PX] in [0, 1]."""
    if images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]):
        raise ValueError(f"the judge sees images [b, 3, h, w] or [b, h, w, 3], not {list(images.shape)}")
    pixels = images if images.shape[1] == 3 else images.movedim(-1, 1)
    pixels = pixels.float() / 255.0 if pixels.dtype == torch.uint8 else pixels.float().nan_to_num().clamp(0, 1)
    if pixels.shape[2:] != (CANVAS_PX, CANVAS_PX):
        pixels = F.interpolate(pixels, (CANVAS_PX, CANVAS_PX), mode="bilinear", antialias=True)
    return pixels


@torch.no_grad()
def grounds(images: Tensor) -> Tensor:
    """Which ground of GROUNDS each image shows, by number; -1 where it is none of them. [b], where the images are."""
    ground = _ground(_canvases(images))
    return torch.where(ground.is_known, ground.nearest, -1)


@torch.no_grad()
def named_where_drawn(images: Tensor, drawn: Sequence[Scene], known: Templates | None = None) -> Tensor:
    """Whether each thing of a scene is the nearest of all concepts to what stands in its box, wherever that is: [b].

    images as `judge` takes them. Raises as it does.
    """
    pixels = _canvases(images)
    bank = _Bank((known or templates.load()).to(pixels.device))
    ground = _ground(pixels).field
    rest = pixels - ground[..., None]
    right = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
    for i, thing in ((i, thing) for i, scene in enumerate(drawn) for thing in scene.things):
        box = rest[i, None, :, thing.y_px : thing.y_px + thing.size_px, thing.x_px : thing.x_px + thing.size_px]
        rows = ground[i, None, :, thing.y_px : thing.y_px + thing.size_px]
        crop = F.interpolate(box, (CELLS, CELLS), mode="bilinear", antialias=True)
        under = F.interpolate(rows[..., None], (CELLS, 1), mode="bilinear", antialias=True)[..., 0]
        gains = bank.gains(crop[:, None], under).unflatten(1, bank.shape).amax(1)
        right[i] &= gains.argmax(1)[0] == thing.concept
    return right


@torch.no_grad()
def covered(images: Tensor) -> Tensor:
    """Where something stands on the ground: [b, CANVAS_PX, CANVAS_PX], true or false."""
    pixels = _canvases(images)
    return (pixels - _ground(pixels).field[..., None]).square().sum(1).sqrt() > MURK_REACH


# --- ground -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ground:
    """field [b, 3, CANVAS_PX]: of each row; nearest [b]: number of a known ground; is_known [b]."""

    field: Tensor
    nearest: Tensor
    is_known: Tensor


def _ground(pixels: Tensor) -> _Ground:
    """Eq. (1)."""
    sides = torch.cat([pixels[..., :RING_PX], pixels[..., -RING_PX:]], -1)
    rows = sides.median(-1).values
    across = torch.linspace(-1, 1, CANVAS_PX, device=pixels.device)
    slope = (rows * across).mean(-1, keepdim=True) / across.square().mean()
    field = rows.mean(-1, keepdim=True) + slope * across
    away = (field[:, None] - _known_fields(pixels.device)).square().sum(2).sqrt().mean(-1)
    distance, nearest = away.min(1)
    rough = (sides - field[..., None]).square().sum(1).sqrt().mean((1, 2))
    return _Ground(field, nearest, (distance < GROUND_REACH) & (rough < RING_REACH))


@cache
def _known_fields(device: torch.device) -> Tensor:
    """[grounds, 3, CANVAS_PX] in [0, 1]."""
    return scenes.backdrops(device)[..., 0] / 255.0


# --- things -----------------------------------------------------------------------------------------


class _Bank:
    """Thumbnails as matrices: colour [n, 3, k, k], cover [n, k, k] and what grounds of rows need of them."""

    def __init__(self, known: Templates):
        flat = known.thumbnails.flatten(0, 1)
        self.colour, self.cover = flat[:, :3], flat[:, 3]
        self.squared = self.colour.square().sum((1, 2, 3))
        self.mixed = (self.colour * self.cover[:, None]).sum(-1)  # [n, 3, k]
        self.cover_squared = self.cover.square().sum(-1)  # [n, k]
        self.has, self.shape = known.has.flatten(), known.has.shape

    def energies(self, ground: Tensor) -> Tensor:
        """|colour - cover * ground|^2, [m, n], over grounds of rows [m, 3, k]."""
        mixed = torch.einsum("mcr,ncr->mn", ground, self.mixed)
        cover = ground.square().sum(1) @ self.cover_squared.T
        return self.squared - 2 * mixed + cover

    def products(self, rest: Tensor, ground: Tensor) -> Tensor:
        """Inner products [m, s, n] of what lies over a ground, rest [m, s, 3, k, k], with the thumbnails over it."""
        darker = (rest * ground[:, None, :, :, None]).sum(2)
        return rest.flatten(2) @ self.colour.flatten(1).T - darker.flatten(2) @ self.cover.flatten(1).T

    def gains(self, rest: Tensor, ground: Tensor) -> Tensor:
        """By how much each thumbnail explains a spot better than bare ground does, [m, n], at its best shift."""
        gains = 2 * self.products(rest, ground).amax(1) - self.energies(ground)
        return gains.masked_fill(~self.has, -torch.inf)


@cache
def _readers(size: int, device: torch.device) -> Tensor:
    """[3, shifts, CELLS, CANVAS_PX]: means of pixels over the cells of a box at each of three steps, shifted."""
    eye = torch.eye(size)[None, None]
    means = F.interpolate(eye, (CELLS, size), mode="bilinear", antialias=True)[0, 0]
    readers = torch.zeros(3, len(SHIFTS_PX), CELLS, CANVAS_PX + 2 * max(SHIFTS_PX))
    for step in range(3):
        for i, shift in enumerate(SHIFTS_PX):
            start = max(SHIFTS_PX) + usual_corner(step, size) + shift
            readers[step, i, :, start : start + size] = means
    return readers[..., max(SHIFTS_PX) : -max(SHIFTS_PX)].to(device)


def _crops(rest: Tensor) -> Tensor:
    """What stands at every spot under every shift: [b, spots, shifts, 3, CELLS, CELLS] of [b, 3, h, w]."""
    parts = []
    for size, steps in ((SMALL_PX, slice(None)), (LARGE_PX, slice(1, 2))):
        read = _readers(size, rest.device)[steps]
        crops = torch.einsum("rskh,bchw->brsckw", read, rest)
        crops = torch.einsum("brsckw,utlw->brustckl", crops, read)
        parts.append(crops.flatten(3, 4).flatten(1, 2))
    return torch.cat(parts, 1)


def _rows(field: Tensor) -> Tensor:
    """The ground of rows [b, 3, CANVAS_PX] at every spot, unshifted: [b, spots, 3, CELLS]."""
    middle = SHIFTS_PX.index(0)
    small = torch.einsum("rkh,bch->brck", _readers(SMALL_PX, field.device)[:, middle], field)
    large = torch.einsum("rkh,bch->brck", _readers(LARGE_PX, field.device)[1:2, middle], field)
    return torch.cat([small.repeat_interleave(3, 1), large], 1)


# --- judging ----------------------------------------------------------------------------------------


def _spots_of(requirement: Requirement) -> list[int]:
    size, cells = scenes.layout(requirement)
    return [SPOTS.index((size, cell)) for cell in cells]


def _judge(pixels: Tensor, requirements: Sequence[Requirement], bank: _Bank) -> Verdicts:
    device = pixels.device
    ground = _ground(pixels)
    rest = pixels - ground.field[..., None]
    crops, rows = _crops(rest), _rows(ground.field)
    things = [(i, spot) for i, r in enumerate(requirements) for spot in _spots_of(r)]
    required = torch.tensor([c for r in requirements for c in r.concepts * r.count], device=device)
    image, spot = torch.tensor(things, device=device).T
    gains = bank.gains(crops[image, spot], rows[image, spot]).unflatten(1, bank.shape)  # [m, s, c]
    by_concept = gains.amax(1)
    ranks = 1 + (by_concept > by_concept.gather(1, required[:, None])).sum(1)
    nearest = by_concept.argmax(1)
    best = gains.flatten(1).argmax(1)
    energy = bank.energies(rows[image, spot]).gather(1, best[:, None])[:, 0]
    taken = by_concept.amax(1) > TAKEN * energy

    def every(of_things: Tensor) -> Tensor:
        wrong = torch.zeros(len(pixels), device=device).index_add(0, image, (~of_things).float())
        return wrong == 0

    return Verdicts(
        names=every(ranks == 1),
        top5=every(ranks <= TOP),
        ground=_ground_is_right(ground, requirements),
        style=_style_is_right(gains, required, nearest, image, requirements),
        place=_place_is_right(crops, rows, required, nearest, things, requirements, bank),
        order=_order_is_right(crops, rows, requirements, bank),
        number=every(taken) & ~_is_elsewhere(rest, requirements),
        nearest=_in_rows(nearest, image, requirements),
        ranks=_in_rows(ranks, image, requirements),
    )


def _in_rows(of_things: Tensor, image: Tensor, requirements: Sequence[Requirement]) -> Tensor:
    """[m] of things -> [b, THINGS], -1 where there is none."""
    column = torch.tensor([n for r in requirements for n in range(len(_spots_of(r)))], device=image.device)
    table = torch.full((len(requirements), scenes.THINGS), -1, dtype=torch.long, device=image.device)
    table[image, column] = of_things
    return table


def _ground_is_right(ground: _Ground, requirements: Sequence[Requirement]) -> Tensor:
    numbers = {name: number for number, name in enumerate(GROUNDS)}
    required = torch.tensor([-1 if r.ground is None else numbers[r.ground] for r in requirements])
    required = required.to(ground.nearest.device)
    return ground.is_known & ((required < 0) | (required == ground.nearest))


def _style_is_right(
    gains: Tensor, required: Tensor, nearest: Tensor, image: Tensor, requirements: Sequence[Requirement]
) -> Tensor:
    """By the sum over an image's things, each as what is required or as what is nearest."""
    at = torch.arange(len(required), device=required.device)
    by_style = torch.maximum(gains[at, :, required], gains[at, :, nearest])
    total = by_style.new_zeros(len(requirements), by_style.shape[1]).index_add(0, image, by_style)
    style = torch.tensor([-1 if r.style is None else r.style for r in requirements], device=required.device)
    return (style < 0) | (style == total.argmax(1))


def _gains_of(crops: Tensor, rows: Tensor, concepts: Tensor, bank: _Bank) -> Tensor:
    """Gains in pixels of concepts [m, k], in their better style, at every spot: [m, spots, k]."""
    styles, number = bank.shape
    index = concepts[:, None, :] + number * torch.arange(styles, device=crops.device)[None, :, None]  # [m, s, k]
    colour, cover = bank.colour[index], bank.cover[index]
    over = colour[:, None] - cover[:, None, :, :, None] * rows[:, :, None, None, :, :, None]
    products = torch.einsum("mpscyx,mpqkcyx->mpsqk", crops, over).amax(2)
    gains = (2 * products - over.square().sum((-1, -2, -3))).amax(2)
    areas = torch.tensor([(size / CELLS) ** 2 for size, _ in SPOTS], device=crops.device)
    return gains * areas[None, :, None]


def _place_is_right(
    crops: Tensor,
    rows: Tensor,
    required: Tensor,
    nearest: Tensor,
    things: Sequence[tuple[int, int]],
    requirements: Sequence[Requirement],
    bank: _Bank,
) -> Tensor:
    """Eq. (3), of single things, place and size at once."""
    right = torch.ones(len(requirements), dtype=torch.bool, device=crops.device)
    single = [n for n, (i, _) in enumerate(things) if requirements[i].kind == "one"]
    if single:
        image, spot = torch.tensor([things[n] for n in single], device=crops.device).T
        pair = torch.stack([required[single], nearest[single]], 1)
        gains = _gains_of(crops[image], rows[image], pair, bank).amax(2)
        right[image] = gains.argmax(1) == spot
    return right


def _order_is_right(crops: Tensor, rows: Tensor, requirements: Sequence[Requirement], bank: _Bank) -> Tensor:
    """Eq. (4), of pairs."""
    right = torch.ones(len(requirements), dtype=torch.bool, device=crops.device)
    pairs = [i for i, r in enumerate(requirements) if r.relation]
    if pairs:
        concepts = torch.tensor([requirements[i].concepts for i in pairs], device=crops.device)
        gains = _gains_of(crops[pairs], rows[pairs], concepts, bank)
        ways = [_spots_of(Requirement((0, 1), relation=relation)) for relation in RELATIONS]
        total = torch.stack([gains[:, first, 0] + gains[:, second, 1] for first, second in ways], 1)
        required = [list(RELATIONS).index(requirements[i].relation) for i in pairs]  # type: ignore[arg-type]
        right[pairs] = total.argmax(1) == torch.tensor(required, device=crops.device)
    return right


def _is_elsewhere(rest: Tensor, requirements: Sequence[Requirement]) -> Tensor:
    """Whether there is something outside of the boxes where things are to stand: [b]."""
    covered = torch.stack([_covered(tuple(_spots_of(r))) for r in requirements]).to(rest.device)
    murk = (rest.square().sum(1).sqrt() > MURK_REACH) & ~covered
    return murk.sum((1, 2)) > MURK_AREA


@cache
def _covered(spots: tuple[int, ...]) -> Tensor:
    """[CANVAS_PX, CANVAS_PX]: the boxes at some spots, and what may reach out of them."""
    mask = torch.zeros(CANVAS_PX, CANVAS_PX, dtype=torch.bool)
    for size, cell in (SPOTS[spot] for spot in spots):
        starts = [usual_corner(step, size) for step in cell]
        y, x = (slice(max(0, start - MARGIN_REACH_PX), start + size + MARGIN_REACH_PX) for start in starts)
        mask[y, x] = True
    return mask
