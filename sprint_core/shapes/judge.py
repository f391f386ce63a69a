"""The judge: does an image show what a caption says? From pixels alone.

    (1) colours     each pixel takes the nearest colour of the world, or none where all are far
    (2) blobs       connected pixels of one object colour; specks are forgotten
    (3) shapes      the template of highest IoU over the blob's own box, if clearly ahead of the second;
                    its size from the box
    (4) background  the empty scene nearest to what is left; what neither explains is murk
    (5) verdict     the blobs are exactly the required things: none missing, none more, nothing murky

The thresholds let through what a small autoencoder does to edges (blur, ringing, faint noise) and nothing that
the eye would call another shape, colour, size, place or number.
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image
from scipy import ndimage

from .captions import RequiredThing, Requirement, outline, parse
from .scenes import (
    BACKGROUNDS,
    CANVAS_PX,
    COLOURS,
    RADIUS_PX,
    SHAPES,
    SQUARE_SIDE,
    TRIANGLE_HEIGHT,
    Scene,
    backdrop,
    centre_px,
    distance,
)

GRID_PX = 128  # images are judged at this size; all lengths below are in canvas pixels of 256
STEP_PX = CANVAS_PX // GRID_PX
COLOUR_REACH = 85  # farthest RGB distance, of 255, at which a pixel still has a colour
SPECK_AREA = 250  # a small cross covers 3700
IOU_LEAST, IOU_LEAD = 0.77, 0.06
ASPECT_SLACK = 1.2
RADIUS_RANGE_PX = (28, 68)
PLACE_SLACK_PX = 24  # 64 px or more lie between two places
RELATION_LEAST_PX = 64
BACKDROP_REACH, MURK_REACH = 40, 60
EDGE_PX = 10  # how far around a blob its blurred edge may reach
MURK_AREA = 400

_HALF_EXTENTS = {"circle": (1, 1), "square": (SQUARE_SIDE,) * 2, "triangle": (1, TRIANGLE_HEIGHT), "cross": (1, 1)}
_OBJECT_RGB = np.array(list(COLOURS.values()), np.float32)
_GROUND_RGB = np.unique(np.array(list(BACKGROUNDS.values()), np.float32).reshape(-1, 3), axis=0)


@dataclass(frozen=True)
class Detection:
    """One blob; lengths in canvas pixels. `shape` is None where no template fits, `size` where no size does."""

    shape: str | None
    colour: str
    size: str | None
    centre: tuple[float, float]  # x right, y down, of its box
    area: int


@dataclass(frozen=True)
class Sight:
    """All that is seen in an image. `background` is None where it is none of the world's."""

    detections: tuple[Detection, ...]
    background: str | None
    murk_area: int


# --- seeing -----------------------------------------------------------------------------------------


def _shrink(image: np.ndarray) -> np.ndarray:
    """[h, w, 3] uint8, or float in [0, 1], to [GRID_PX, GRID_PX, 3] float32 in [0, 255], each pixel a mean."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the judge sees images [h, w, 3], not {list(image.shape)}")
    if image.dtype != np.uint8:
        image = (np.nan_to_num(image.astype(np.float32)).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    if image.shape[:2] != (CANVAS_PX, CANVAS_PX):
        image = np.asarray(Image.fromarray(image).resize((CANVAS_PX, CANVAS_PX), Image.Resampling.BOX))
    offsets = range(STEP_PX)
    return np.stack([image[i::STEP_PX, j::STEP_PX] for i in offsets for j in offsets]).mean(0, np.float32)


def _distance(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(image - other, -1, 0)
    return np.sqrt(red**2 + green**2 + blue**2)


def _nearest(image: np.ndarray, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of and distance to the nearest of rgb [n, 3], per pixel."""
    distances = np.stack([_distance(image, one) for one in rgb])
    return distances.argmin(0), distances.min(0)


def _colours(image: np.ndarray) -> np.ndarray:
    """Eq. (1): per pixel the index of its object colour, or -1."""
    index, reach = _nearest(image, _OBJECT_RGB)
    return np.where((reach < COLOUR_REACH) & (reach < _nearest(image, _GROUND_RGB)[1]), index, -1)


def components(classes: np.ndarray) -> np.ndarray:
    """Eq. (2): labels [h, w] of the 4-connected regions of equal class, counted from 1; class -1 is labelled 0."""
    labels, own = np.zeros(classes.shape, np.int32), np.empty(classes.shape, np.int32)
    for index in np.unique(classes[classes >= 0]):
        region = classes == index
        ndimage.label(region, output=own)
        labels[region] = own[region] + labels.max()
    return labels


@cache
def _template(shape: str, h: int, w: int) -> np.ndarray:
    """A shape that fills a box of h by w pixels: bool."""
    half_w, half_h = _HALF_EXTENTS[shape]
    x = ((np.arange(w) + 0.5) / w * 2 - 1) * half_w
    y = ((np.arange(h) + 0.5) / h * 2 - 1) * half_h
    return distance(shape, x[None, :], y[:, None]) <= 0


def _shape(mask: np.ndarray) -> str | None:
    """Eq. (3): which shape fills its box as the mask does, if one does."""
    scores = []
    for shape in SHAPES:
        template = _template(shape, *mask.shape)
        scores.append(((mask & template).sum() / (mask | template).sum(), shape))
    (second, _), (best, shape) = sorted(scores)[-2:]
    half_w, half_h = _HALF_EXTENTS[shape]
    aspect = mask.shape[1] / mask.shape[0] * half_h / half_w
    fits = best >= IOU_LEAST and best - second >= IOU_LEAD and 1 / ASPECT_SLACK <= aspect <= ASPECT_SLACK
    return shape if fits else None


def _size(shape: str | None, h: int, w: int) -> str | None:
    if shape is None:
        return None
    radius = STEP_PX * np.sqrt(h * w / np.prod(_HALF_EXTENTS[shape])) / 2
    if not RADIUS_RANGE_PX[0] <= radius <= RADIUS_RANGE_PX[1]:
        return None
    return min(RADIUS_PX, key=lambda size: abs(RADIUS_PX[size] - radius))


def _detection(mask: np.ndarray, colour: str) -> Detection:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top = rows[0]
    bottom = rows[-1] + 1
    left = columns[0]
    right = columns[-1] + 1
    box = mask[top:bottom, left:right]
    shape = _shape(box)
    centre = (float(left + right) * STEP_PX / 2, float(top + bottom) * STEP_PX / 2)
    return Detection(shape, colour, _size(shape, *box.shape), centre, int(mask.sum()) * STEP_PX**2)


def _background(image: np.ndarray, things: np.ndarray) -> tuple[str | None, int]:
    """Eq. (4): the nearest empty scene outside of the things, and the area there that it does not explain."""
    rest = np.logical_not(ndimage.maximum_filter(things, 2 * (EDGE_PX // STEP_PX) + 1))  # dilated by a square
    if not rest.any():
        return None, 0
    away = {name: _distance(image, backdrop(name, GRID_PX))[rest] for name in BACKGROUNDS}
    name = min(away, key=lambda name: away[name].mean())
    murk = int((away[name] > MURK_REACH).sum()) * STEP_PX**2
    return (name if np.median(away[name]) < BACKDROP_REACH else None), murk


def observe(image: np.ndarray) -> Sight:
    """Everything in an image [h, w, 3], uint8 or float in [0, 1]; largest blobs first."""
    image = _shrink(image)
    classes = _colours(image)
    labels = components(classes)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    blobs = np.flatnonzero(areas * STEP_PX**2 >= SPECK_AREA)
    blobs = blobs[np.argsort(-areas[blobs], kind="stable")]
    colours = list(COLOURS)
    masks = [labels == label for label in blobs]
    detections = tuple(_detection(mask, colours[classes[mask][0]]) for mask in masks)
    return Sight(detections, *_background(image, np.isin(labels, blobs)))


def detect(image: np.ndarray) -> list[Detection]:
    """The blobs of object colours in an image [h, w, 3], largest first."""
    return list(observe(image).detections)


# --- judging ----------------------------------------------------------------------------------------


def _matches(detection: Detection, thing: RequiredThing) -> bool:
    """Whether a blob is what a caption says of one thing."""
    if detection.shape != thing.shape or detection.size is None:
        return False
    if thing.colour not in (None, detection.colour) or thing.size not in (None, detection.size):
        return False
    if thing.place is None:
        return True
    row, column = thing.place
    return _is_near(detection, (centre_px(detection.size, column), centre_px(detection.size, row)))


def _is_near(detection: Detection, place: tuple[float, float]) -> bool:
    """Whether a blob stands at (x, y) in canvas pixels, but for a slack."""
    return max(abs(a - b) for a, b in zip(detection.centre, place, strict=True)) <= PLACE_SLACK_PX


def _relation_holds(relation: str | None, first: Detection, second: Detection) -> bool:
    """The relation by centres, by a clear distance, and more so than across it."""
    if relation is None:
        return True
    right, down = (b - a for a, b in zip(first.centre, second.centre, strict=True))
    along, across = (right, down) if relation == "left" else (down, right)
    return along >= RELATION_LEAST_PX and along > abs(across)


def fault(image: np.ndarray, text: str | Requirement) -> str | None:
    """Why an image [h, w, 3] does not show what a caption says, or None where it does. Raises ValueError on a
    text that is no caption."""
    requirement = parse(text) if isinstance(text, str) else text
    sight = observe(image)
    if sight.murk_area > MURK_AREA:
        return f"{sight.murk_area} px are neither background nor thing"
    if sight.background is None or requirement.background not in (None, sight.background):
        return f"the background is {sight.background or 'none of the world'}, not {requirement.background or 'known'}"
    things = [thing for thing in requirement.things for _ in range(thing.count)]
    if len(sight.detections) != len(things):
        return f"{len(sight.detections)} things, not {len(things)}"
    orders = [order for order in permutations(sight.detections) if all(map(_matches, order, things))]
    if not orders:
        seen = ", ".join(f"{thing.size} {thing.colour} {thing.shape}" for thing in sight.detections)
        return f"other things, or elsewhere: {seen}"
    if not any(_relation_holds(requirement.relation, order[0], order[-1]) for order in orders):
        return f"not {requirement.relation}"
    return None


def judge(image: np.ndarray, text: str | Requirement) -> bool:
    """Whether an image [h, w, 3], uint8 or float in [0, 1], shows what a caption says, and nothing else."""
    return fault(image, text) is None


def outlined(image: np.ndarray, scene: Scene) -> bool:
    """Whether an image has a scene's shapes, sizes and places, and nothing else, whatever the colours are.

    What edges say: a thing is what is not background, so that one of two colours is still one thing.
    """
    small = _shrink(image)
    away = min((_distance(small, backdrop(name, GRID_PX)) for name in BACKGROUNDS), key=np.median)
    labels = components(np.where(away > MURK_REACH, 0, -1))
    areas = np.bincount(labels.ravel())[1:] * STEP_PX**2
    detections = [_detection(labels == i + 1, "") for i in np.flatnonzero(areas >= SPECK_AREA)]
    things = outline(scene).things
    return len(detections) == len(things) and any(
        all(map(_matches, order, things)) for order in permutations(detections)
    )


def coloured(image: np.ndarray, text: str | Requirement, scene: Scene) -> bool | None:
    """Whether what stands in the places of a scene's things has the colours that a caption says; None: it says none.

    The scene is one that the caption is true of, so that a thing's shape tells which of its colours is meant.
    """
    requirement = parse(text) if isinstance(text, str) else text
    colours = {thing.shape: thing.colour for thing in requirement.things if thing.colour}
    detections, right = observe(image).detections, []
    for thing in scene.things:
        if thing.shape in colours:
            place = (centre_px(thing.size, thing.column), centre_px(thing.size, thing.row))
            there = [d for d in detections if _is_near(d, place)]
            right.append(any(d.colour == colours[thing.shape] for d in there))
    return all(right) if right else None
