"""Latency against resolution and batch: the numbers, how they grow, and a chart of them."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.measure import Sides, Taken, measure
from benchmarks.networks import Ours
from sprint_core.latent import SCALE

SIZES_PX = (256, 512, 1024, 2048, 4096)
PAIRED_PX = 1024  # up to here both sides several times; beyond, ours once
UNTILED_PX = 2048  # up to here the decoder sees the whole image
BATCH_PX, BATCHES = 256, (1, 2, 4)


def sweep(ours: Ours, theirs, runs: int, sizes_px: Sequence[int]) -> dict:
    """Seconds by pixels of a side, and of an image by images at once: {"step": {"ours": {"512": sec}}, ..}."""
    sides = {"ours": ours} | ({"theirs": theirs} if theirs else {})
    measured: dict[str, dict] = {part: {side: {} for side in sides} for part in ("step", "decode", "batch")}

    def note(part: str, name: int, taken: Mapping[str, Taken], share: int = 1) -> None:
        for side, record in taken.items():
            measured[part][side][str(name)] = record.row()["median_sec"] / share

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
            for part, taken in measure(
                calls, runs if paired else 1, ours.device, warm=paired, kept=0, count=False
            ).items():
                note(part, px, taken)
        ours.size_px = BATCH_PX
        for count in BATCHES:
            calls = {"batch": {side: lambda seed, m=made, n=count: m.images(seed, n) for side, made in sides.items()}}
            note("batch", count, measure(calls, runs, ours.device, kept=0, count=False)["batch"], count)
    finally:
        ours.size_px = native
    untiled = {px: sec for px, sec in measured["decode"]["ours"].items() if int(px) <= UNTILED_PX}
    measured["exponent"] = {"step": exponent(measured["step"]["ours"]), "decode": exponent(untiled)}
    tiled = [sec / (int(px) ** 2 / 1e6) for px, sec in measured["decode"]["ours"].items() if int(px) > UNTILED_PX]
    return measured | ({"tiled_decode_sec_per_megapixel": tiled[0]} if tiled else {})


def _by_tiles(ours: Ours, seed: int) -> Tensor:
    return ours.autoencoder.decode_tiled(ours.latent(seed) / SCALE)


def exponent(seconds: Mapping[str, float]) -> float | None:
    """b of the least-squares fit seconds = a pixels^b, from 512 a side on: smaller images are mostly overhead."""
    points = [(math.log(int(px) ** 2), math.log(sec)) for px, sec in seconds.items() if int(px) >= 512]
    if len(points) < 2:
        return None
    x_mean, y_mean = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread


# --- chart --------------------------------------------------------------------------------------------

BY_SIZE, BY_BATCH = "pixels of a side", "images at once"
PANELS = {BY_SIZE: ("step", "decode"), BY_BATCH: ("batch",)}  # parts by what is on the x axis
SIZE_IN, DPI = (11.0, 5.0), 100
GREY = "#d0d0d0"
LINES = {  # colour by part and side
    ("decode", "ours"): "#1f5fb0",
    ("decode", "theirs"): "#9dbfe6",
    ("step", "ours"): "#b5521b",
    ("step", "theirs"): "#e8b48f",
    ("batch", "ours"): "#2f7d3b",
    ("batch", "theirs"): "#a5d3ac",
}
TITLES = {"step": "transformer, one step", "decode": "decoder", "batch": f"prompt to image, {BATCH_PX} px, per image"}


def require_matplotlib() -> None:
    """Raises ValueError where it is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: the chart needs matplotlib; install it with pip install matplotlib")


def chart(measured: Mapping[str, Mapping], title: str, path: Path) -> None:
    """Write what `sweep` measured as an image of two panels: seconds against pixels of a side, both axes logarithmic,
    and seconds per image, from 0, against images at once. Raises ValueError where matplotlib is missing."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(SIZE_IN, DPI, layout="constrained")
    figure.suptitle(title)
    for axes, (label, parts) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        lines = {(part, side): line for part in parts for side, line in measured[part].items() if line}
        for (part, side), line in lines.items():
            name = f"{TITLES[part]}: {'ours' if side == 'ours' else 'diffusers'}"
            axes.plot([int(x) for x in line], list(line.values()), "o-", color=LINES[part, side], label=name, lw=2.5)
        ticks = sorted({int(x) for line in lines.values() for x in line})
        axes.set(xlabel=label, xscale="log", ylabel="seconds")
        axes.set_xticks(ticks, [str(x) for x in ticks])
        axes.set_xticks([], minor=True)
        if label == BY_SIZE:
            logs = [math.log10(sec) for line in lines.values() for sec in line.values()]
            axes.set(yscale="log", ylim=(10.0 ** math.floor(min(logs)), 10.0 ** math.ceil(max(logs))))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(bottom=0)
        axes.grid(color=GREY)
        axes.legend()
    figure.savefig(path)
