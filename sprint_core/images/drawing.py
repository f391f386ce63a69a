"""A drawing's strokes, as the live canvas keeps them, and its pixels: the same bytes from the same strokes everywhere.

A stroke is the union of its segments. Each is a capsule whose radius goes linearly from one end to the other, and a
pixel's coverage is `radius + 1/2 - distance` of its centre, in [0, 1]. Only arithmetic that IEEE 754 rounds in one way.

    {"version": 1, "size": [w, h], "ground": "#ffffff", "underlay": {"name", "subfolder", "type", "opacity"} or null,
     "strokes": [{"layer": "lines" or "paint", "tool": "brush" or "eraser", "color": "#rrggbb", "width": px,
                  "points": [x, y, pressure, ...]}]}

Points are in pixels of `size`, the pressure in [0, 1] scales the width; a sheet of another size scales the width by its
smaller side's share.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from . import sizes

VERSION = 1
LAYERS, TOOLS = ("lines", "paint"), ("brush", "eraser")
MAX_CHARACTERS = 16 * 2**20
WIDEST_PX = 4096.0
FARTHEST_PX = 1e5  # of a point, beyond every sheet
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Stroke:
    """One line of the pen. points: fp32 [n, 3] of x, y and pressure; it covers `width` pixels at pressure 1."""

    layer: str
    erases: bool
    color: tuple[int, int, int]
    width: float
    points: np.ndarray


@dataclass(frozen=True)
class Underlay:
    """An image of ComfyUI's folders, below the paint; without a name, the one that the node gets."""

    name: str
    subfolder: str
    type: str
    opacity: float


@dataclass(frozen=True)
class Drawing:
    """Strokes on a sheet of `size`, (width, height) in pixels; None where it names none."""

    size: tuple[int, int] | None = None
    ground: tuple[int, int, int] = WHITE
    underlay: Underlay | None = None
    strokes: tuple[Stroke, ...] = ()


# --- reading ----------------------------------------------------------------------------------------


def parse(text: str) -> Drawing:
    """The drawing of a widget's text; an empty text or object is an empty sheet. Raises ValueError."""
    if not text.strip():
        return Drawing()
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"drawing: {len(text)} characters, {MAX_CHARACTERS} are the most; draw with fewer strokes")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("drawing: not JSON; draw on the canvas, or leave it empty") from None
    try:
        return _drawing(data)
    except (KeyError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(f"drawing: not one of a live canvas ({error!r}); draw it anew") from None


def _drawing(data: dict) -> Drawing:
    if data == {}:
        return Drawing()
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise ValueError(f"drawing: not of version {VERSION}; draw it anew, or update this pack")
    width, height = (int(side) for side in data["size"])
    if not all(0 < side <= sizes.MAX_PX for side in (width, height)):
        raise ValueError(f"drawing: its size is {width} x {height}; sides lie in 1 to {sizes.MAX_PX} pixels")
    under = data.get("underlay")
    return Drawing(
        (width, height),
        color_of(data.get("ground") or "#ffffff"),
        None if under is None else _underlay(under),
        tuple(_stroke(i, stroke) for i, stroke in enumerate(data.get("strokes") or (), 1)),
    )


def _underlay(data: dict) -> Underlay:
    opacity = _number(data.get("opacity", 1.0), "the underlay's opacity", 0.0, 1.0)
    return Underlay(
        str(data.get("name") or ""), str(data.get("subfolder") or ""), str(data.get("type") or "input"), opacity
    )


def _stroke(number: int, data: dict) -> Stroke:
    layer, tool = data["layer"], data["tool"]
    if layer not in LAYERS or tool not in TOOLS:
        raise ValueError(f"drawing: stroke {number} is of layer {layer!r} with tool {tool!r}; draw it anew")
    width = _number(data["width"], f"the width of stroke {number}", 0.0, WIDEST_PX)
    numbers = data["points"]
    if not all(isinstance(number, int | float) for number in numbers):
        raise TypeError("points that are no numbers")
    points = np.array(numbers, dtype=np.float64)
    if points.ndim != 1 or not len(points) or len(points) % 3:
        raise ValueError(f"drawing: the points of stroke {number} are not threes of x, y and pressure; draw it anew")
    if not (np.isfinite(points).all() and (np.abs(points) <= FARTHEST_PX).all()):
        raise ValueError(f"drawing: stroke {number} has points that lie nowhere; draw it anew")
    points = points.reshape(-1, 3)
    points[:, 2] = points[:, 2].clip(0.0, 1.0)
    return Stroke(layer, tool == "eraser", color_of(data.get("color") or "#ffffff"), width, points.astype(np.float32))


def color_of(text: str) -> tuple[int, int, int]:
    """(red, green, blue) in 0 to 255 of '#rrggbb'. Raises ValueError."""
    if not isinstance(text, str) or not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise ValueError(f"drawing: {text!r} is no colour; write it as #rrggbb")
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def _number(value: Any, name: str, least: float, most: float) -> float:
    number = float(value)
    if not (math.isfinite(number) and least <= number <= most):
        raise ValueError(f"drawing: {name} is {number:g}; it lies in {least:g} to {most:g}")
    return number


# --- pixels -----------------------------------------------------------------------------------------


def lines(drawing: Drawing, width: int, height: int) -> np.ndarray:
    """The control image of a drawing, scaled to this size: white lines on black, uint8 [h, w]."""
    sheet = np.zeros((height, width), np.float32)
    for stroke, window, coverage in _covered(drawing, "lines", width, height):
        before = sheet[window]
        sheet[window] = before * (1 - coverage) if stroke.erases else before + (1 - before) * coverage
    return _bytes(sheet)


def sheet(drawing: Drawing, width: int, height: int, underlay: np.ndarray | None = None) -> np.ndarray:
    """The paint of a drawing, scaled to this size, over its ground and an underlay, both uint8 [h, w, 3]."""
    color = np.zeros((height, width, 3), np.float32)  # times alpha
    alpha = np.zeros((height, width, 1), np.float32)
    for stroke, window, coverage in _covered(drawing, "paint", width, height):
        covered = coverage[..., None]
        color[window] *= 1 - covered
        alpha[window] *= 1 - covered
        if not stroke.erases:
            color[window] += covered * (np.asarray(stroke.color, np.float32) / 255)
            alpha[window] += covered
    below = np.broadcast_to(np.asarray(drawing.ground, np.float32) / 255, color.shape)
    if underlay is not None:
        opacity = np.float32(1.0 if drawing.underlay is None else drawing.underlay.opacity)
        below = below + opacity * (underlay.astype(np.float32) / 255 - below)
    return _bytes(color + (1 - alpha) * below)


def fitted(image: Image.Image, width: int, height: int) -> np.ndarray:
    """An underlay that fills a sheet: cropped in the middle to its proportions and resized, uint8 [h, w, 3]."""
    return np.asarray(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC))


def _bytes(levels: np.ndarray) -> np.ndarray:
    return np.rint(levels.clip(0, 1) * 255).astype(np.uint8)


def _covered(drawing: Drawing, layer: str, width: int, height: int) -> Iterator[tuple[Stroke, Any, np.ndarray]]:
    """Of each stroke of a layer that touches the sheet: a window of the sheet, and how much of it is covered, fp32."""
    across, down = drawing.size or (width, height)
    scale = np.array([width / across, height / down], np.float32)
    for stroke in drawing.strokes:
        if stroke.layer != layer:
            continue
        radii = stroke.points[:, 2] * np.float32(stroke.width / 2) * scale.min()
        centres = stroke.points[:, :2] * scale
        window = _window(centres, radii, width, height)
        if window is not None:
            yield stroke, window, _coverage(centres, radii, window)


def _window(centres: np.ndarray, radii: np.ndarray, width: int, height: int) -> tuple[slice, slice] | None:
    """Rows and columns of the pixels whose centres lie within half a pixel of capsules; None without any."""
    left, top = np.floor((centres - radii[:, None]).min(0) - 1).astype(int)
    right, bottom = np.ceil((centres + radii[:, None]).max(0) + 1).astype(int)
    rows, columns = slice(max(0, top), min(height, bottom)), slice(max(0, left), min(width, right))
    return None if rows.start >= rows.stop or columns.start >= columns.stop else (rows, columns)


def _coverage(centres: np.ndarray, radii: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
    """The union of capsules within a window: how much of each pixel is covered, fp32 [rows, columns]."""
    rows, columns = window
    covered = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.float32)
    origin = np.array([columns.start, rows.start], np.float32)
    height, width = covered.shape
    for i in range(max(1, len(centres) - 1)):
        ends = slice(i, i + 2)
        part = _window(centres[ends] - origin, radii[ends], width, height)
        if part is not None:
            np.maximum(covered[part], _capsule(centres[ends] - origin, radii[ends], part), out=covered[part])
    return covered


def _capsule(centres: np.ndarray, radii: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
    """Coverage by one segment, or by the disc of a single point."""
    y = np.arange(window[0].start, window[0].stop, dtype=np.float32)[:, None] + np.float32(0.5)
    x = np.arange(window[1].start, window[1].stop, dtype=np.float32)[None] + np.float32(0.5)
    (from_x, from_y), (to_x, to_y) = centres[0], centres[-1]
    run_x, run_y = to_x - from_x, to_y - from_y
    length = run_x * run_x + run_y * run_y
    if length == 0.0:
        distance = np.sqrt((x - from_x) ** 2 + (y - from_y) ** 2)
        return (radii.max() + np.float32(0.5) - distance).clip(0, min(1, 2 * radii.max()))
    along = (((x - from_x) * run_x + (y - from_y) * run_y) / length).clip(0, 1)
    distance = np.sqrt((x - from_x - along * run_x) ** 2 + (y - from_y - along * run_y) ** 2)
    radius = radii[0] + along * (radii[-1] - radii[0])
    return np.minimum((radius + np.float32(0.5) - distance).clip(0, 1), 2 * radius)
