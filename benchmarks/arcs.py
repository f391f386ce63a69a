"""What the benchmarks of the live canvas draw: arcs, one after another."""

import json
import math
from collections.abc import Sequence

MOVES = 8  # frames while the pen is down
WARM_UP = 8  # strokes that do not count: by then a live canvas has tried each way of painting


def arc(i: int, along: Sequence[float]) -> list[tuple[float, float]]:
    """Points of arc i, in shares of the sheet. along: where on it they lie, from 0 to 1."""
    return [(0.5 + 0.35 * math.sin(0.3 * i + 0.8 * x), 0.5 + 0.35 * math.cos(0.37 * i + 0.8 * x)) for x in along]


def strokes(count: int) -> str:
    """A drawing of so many arcs."""
    arcs = []
    for i in range(count):
        points = [(256 * x, 256 * y, 1.0) for x, y in arc(i, [j / 8 for j in range(9)])]
        flat = [round(number, 1) for point in points for number in point]
        arcs.append({"layer": "lines", "tool": "brush", "color": "#ffffff", "width": 6, "points": flat})
    return json.dumps({"version": 1, "size": [256, 256], "strokes": arcs})
