"""Latency against resolution and batch: the numbers, how they grow, and a chart of them."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.measure import Sides, Taken, measure
from benchmarks.networks import Ours
from sprint_core.latent import SCALE

SIZES_PX = (256, 512, 1024, 2048, 4096)
PAIRED_PX = 1024  # up to here both sides several times; beyond, ours once
UNTILED_PX = 2048  # up to here the decoder sees the whole picture
BATCH_PX, BATCHES = 256, (1, 2, 4)


def sweep(ours: Ours, theirs, runs: int, sizes_px: Sequence[int]) -> dict:
    """Seconds by pixels of a side, and of a picture by pictures at once: {"step": {"ours": {"512": sec}}, ..}."""
    sides = {"ours": ours} | ({"theirs": theirs} if theirs else {})
    found: dict[str, dict] = {part: {side: {} for side in sides} for part in ("step", "decode", "batch")}

    def note(part: str, name: int, taken: Mapping[str, Taken], share: int = 1) -> None:
        for side, record in taken.items():
            found[part][side][str(name)] = record.row()["median_sec"] / share

    native = ours.size_px
    try:
        for px in sizes_px:
            ours.size_px, paired = px, px <= PAIRED_PX
            calls: dict[str, Sides] = {
                part: {side: getattr(made, part) for side, made in sides.items() if paired or side == "ours"}
                for part in ("step", "decode")
            }
            if px > UNTILED_PX:
                calls["decode"] = {"ours": lambda seed: _by_tiles(ours, seed)}
            for part, taken in measure(calls, runs if paired else 1, ours.device, warm=paired, kept=0).items():
                note(part, px, taken)
        ours.size_px = BATCH_PX
        for count in BATCHES:
            calls = {"batch": {side: lambda seed, m=made, n=count: m.pictures(seed, n) for side, made in sides.items()}}
            note("batch", count, measure(calls, runs, ours.device, kept=0)["batch"], count)
    finally:
        ours.size_px = native
    whole = {px: sec for px, sec in found["decode"]["ours"].items() if int(px) <= UNTILED_PX}
    found["exponent"] = {"step": exponent(found["step"]["ours"]), "decode": exponent(whole)}
    tiled = [sec / (int(px) ** 2 / 1e6) for px, sec in found["decode"]["ours"].items() if int(px) > UNTILED_PX]
    return found | ({"tiled_decode_sec_per_megapixel": tiled[0]} if tiled else {})


def _by_tiles(ours: Ours, seed: int) -> Tensor:
    return ours.autoencoder.decode_tiled(ours.latent(seed) / SCALE)


def exponent(seconds: Mapping[str, float]) -> float | None:
    """b of the least-squares fit seconds = a pixels^b, from 512 a side on: smaller pictures are mostly overhead."""
    points = [(math.log(int(px) ** 2), math.log(sec)) for px, sec in seconds.items() if int(px) >= 512]
    if len(points) < 2:
        return None
    x_mean, y_mean = (sum(axis) / len(points) for axis in zip(*points))
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread


# --- chart --------------------------------------------------------------------------------------------

PANEL_PX, TOP_PX, LEFT_PX, GAP_PX = (420, 360), 60, 80, 110
INK, GREY = "#202020", "#d0d0d0"
LINE_PX = 4
LINES = {  # colour by part and side
    ("decode", "ours"): "#1f5fb0",
    ("decode", "theirs"): "#9dbfe6",
    ("step", "ours"): "#b5521b",
    ("step", "theirs"): "#e8b48f",
    ("batch", "ours"): "#2f7d3b",
    ("batch", "theirs"): "#a5d3ac",
}
TITLES = {"step": "transformer, one step", "decode": "decoder", "batch": f"a picture, all of it, at {BATCH_PX} px"}


def chart(found: Mapping[str, Mapping], title: str) -> Image.Image:
    """Two panels, both logarithmic: seconds against the side in pixels, seconds a picture against the batch."""
    size = (LEFT_PX + 2 * PANEL_PX[0] + GAP_PX + 40, TOP_PX + PANEL_PX[1] + 60 + 26 * 4)
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=16)
    draw.text((LEFT_PX, 16), title, INK, ImageFont.load_default(size=18))
    for i, (parts, label) in enumerate(((("step", "decode"), "pixels of a side"), (("batch",), "pictures at once"))):
        lines = {(part, side): found[part][side] for part in parts for side in found[part] if found[part][side]}
        _panel(draw, font, LEFT_PX + i * (PANEL_PX[0] + GAP_PX), lines, label)
    return image


def _panel(draw: ImageDraw.ImageDraw, font, left: int, lines: Mapping, label: str) -> None:
    names = sorted({int(name) for line in lines.values() for name in line})
    seconds = [sec for line in lines.values() for sec in line.values()]
    low, high = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))
    bottom = TOP_PX + PANEL_PX[1]

    def at(name: int, sec: float) -> tuple[float, float]:
        along = math.log(name / names[0]) / max(1e-9, math.log(names[-1] / names[0]))
        return left + along * PANEL_PX[0], bottom - (math.log10(sec) - low) / max(1, high - low) * PANEL_PX[1]

    for power in range(low, high + 1):
        y = at(names[0], 10.0**power)[1]
        draw.line((left, y, left + PANEL_PX[0], y), GREY)
        draw.text((left - 10, y), f"{10.0**power:g} s", INK, font, "rm")
    for name in names:
        x = at(name, 10.0**low)[0]
        draw.line((x, TOP_PX, x, bottom), GREY)
        draw.text((x, bottom + 6), str(name), INK, font, "mt")
    draw.text((left + PANEL_PX[0] / 2, bottom + 28), label, INK, font, "mt")
    for i, ((part, side), line) in enumerate(lines.items()):
        colour = LINES[part, side]
        points = [at(int(name), sec) for name, sec in line.items()]
        draw.line(points, colour, LINE_PX, joint="curve")
        for x, y in points:
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), colour)
        y = bottom + 62 + 26 * i
        draw.line((left, y, left + 30, y), colour, LINE_PX)
        draw.text((left + 40, y), f"{TITLES[part]}: {'ours' if side == 'ours' else 'diffusers'}", INK, font, "lm")
