"""What the templates with a live canvas have on their sheets: a mushroom in lines, a soft ice cream in paint.

Points are in pixels of a sheet of 512 x 512; sprint_core/images/drawing.py says what a drawing is.
"""

import json
import math

SIDE_PX = 512
LINE_PX = 14
Points = list[tuple[float, float]]


def arc(centre: tuple[float, float], radii: tuple[float, float], start: float, end: float, moves: int) -> Points:
    """Along an ellipse. start, end: in half turns from the right, clockwise as y goes down."""
    turns = [math.pi * (start + (end - start) * move / moves) for move in range(moves + 1)]
    (x, y), (across, down) = centre, radii
    return [(x + across * math.cos(turn), y + down * math.sin(turn)) for turn in turns]


def stroke(layer: str, color: str, width_px: int, points: Points) -> dict:
    """With full pressure everywhere."""
    flat = [value for x, y in points for value in (round(x, 1), round(y, 1), 1)]
    return {"layer": layer, "tool": "brush", "color": color, "width": width_px, "points": flat}


def line(points: Points) -> dict:
    return stroke("lines", "#ffffff", LINE_PX, points)


def patch(color: str, width_px: int, centre: tuple[float, float], radii: tuple[float, float]) -> list[dict]:
    """An ellipse filled by ever smaller rings."""
    (across, down), count = radii, math.ceil(max(radii) / (0.7 * width_px))
    shares = [1 - 0.7 * width_px * ring / max(radii) for ring in range(count)]
    rings = [arc(centre, (across * share, down * share), 0, 2, 14) for share in shares]
    return [stroke("paint", color, width_px, ring) for ring in rings]


def sheet(ground: str, strokes: list[dict]) -> str:
    """A drawing as the canvas stores it."""
    drawing = {"version": 1, "size": [SIDE_PX, SIDE_PX], "ground": ground, "underlay": None, "strokes": strokes}
    return json.dumps(drawing, separators=(",", ":"))


CAP = arc((256, 268), (170, 178), 1, 2, 18) + arc((256, 268), (170, 30), 0, 1, 10)[1:]
STEM: Points = [(206, 300), (202, 352), (194, 404), *arc((256, 404), (62, 32), 1, 0, 8)[1:], (310, 352), (306, 300)]
CONE: Points = [(215, 260), (256, 430), (297, 260), (256, 300), (256, 400)]
MUSHROOM = sheet("#ffffff", [line(CAP), line(STEM)])
ICE_CREAM = sheet("#81c7f5", [stroke("paint", "#d9a05b", 70, CONE), *patch("#f8c9dc", 70, (256, 170), (75, 60))])
