"""What the ablations' results say: intervals, our numbers beside the paper's (arXiv 2503.09641), tables, a chart.

A result is what ablations.py writes for a run and a seed; `pooled` makes one of all seeds, and what is `found`
is that for every run, by name. A measure is a value with the ends of its interval, low and high.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...evaluate import frechet as features

NORMAL_95 = 1.959964  # standard deviations on either side that hold 95 %
BOOTSTRAPS = 50
NORMS = {"grad_norm": "gradient", "tangent_norm": "tangent"}


@dataclass(frozen=True)
class Row:
    """A row of a table of the paper, and the run that stands for it here."""

    label: str
    run: str
    fid: float
    clip: float


# fmt: off
PAPER = {
    #                                             run here       FID   CLIP score
    "T1 Parametrisation": (Row("flow, Euler steps",     "flow",         5.81, 28.81),
                           Row("TrigFlow, rotations",   "trigflow",     5.73, 28.81)),
    "T3 Objective":       (Row("sCM alone",             "scm",          8.93, 27.51),
                           Row("LADD alone",            "ladd",        12.20, 27.00),
                           Row("both",                  "base",         8.11, 28.02)),
    "T4 Guidance":        (Row("not embedded",          "no-guidance",  9.23, 27.15),
                           Row("embedded",              "base",         8.72, 28.09)),
    "T5 sCM : LADD":      (Row("1 : 1",                 "weight-1",     8.81, 27.93),
                           Row("1 : 0.5",               "base",         8.43, 27.85),
                           Row("1 : 0.1",               "weight-0.1",   8.90, 27.76)),
    "T6 Max-time share":  (Row("0 %",                   "share-0",      9.44, 27.65),
                           Row("50 %",                  "base",         8.32, 27.94),
                           Row("70 %",                  "share-0.7",    8.11, 28.02)),
}
# fmt: on
STABILISERS = {  # the first is the stable teacher, with which the paper's norms are lower
    "dense time, q/k norm": "scm",
    "time 0..1000, q/k norm": "sparse-time",
    "dense time, no norm": "no-norm",
    "time 0..1000, no norm": "neither",
}


# --- numbers ------------------------------------------------------------------------------------------


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    share, z2 = right / count, NORMAL_95**2 / count
    half = NORMAL_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, (share + z2 / 2 - half) / (1 + z2)), min(1.0, (share + z2 / 2 + half) / (1 + z2))


def judged(right: int, count: int) -> dict:
    """The measure of a share."""
    low, high = wilson(right, count)
    return {"value": right / count, "low": low, "high": high, "right": right, "prompts": count}


def distance(painted: Tensor, true: Tensor) -> dict | None:
    """Frechet distance of features [n, d], its interval from pictures drawn again; None for too few of them."""
    if len(true) < features.SAMPLES_PER_FEATURE * true.shape[1]:
        return None
    value, n = features.frechet(painted, true), len(true)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(n, (2, n), generator=generator) for _ in range(BOOTSTRAPS)]
    again = [features.frechet(painted[a], true[b]) for a, b in draws]
    half = NORMAL_95 * statistics.stdev(again)  # their mean lies above the value: their spread alone is meant
    return {"value": value, "low": value - half, "high": value + half}


def spread(norms: Sequence[float]) -> dict | None:
    """The median of those that are finite, its interval by ranks, and their maximum; None without any."""
    finite = sorted(norm for norm in norms if math.isfinite(norm))
    if not finite:
        return None
    last = len(finite) - 1
    reach = NORMAL_95 * math.sqrt(len(finite)) / 2  # of the binomial number of values below the true median
    ends = {"low": finite[max(0, math.floor(last / 2 - reach))], "high": finite[min(last, math.ceil(last / 2 + reach))]}
    rest = {"max": finite[-1], "not_finite": len(norms) - len(finite)}
    return {"median": statistics.median(finite), **ends, **rest}


def pooled(results: Sequence[Mapping]) -> dict:
    """One result of all seeds'. Intervals know of pictures only: where seeds differ by more, they are widened."""
    row = {"judge": {n: _pooled_judge([r["judge"][n] for r in results]) for n in results[0]["judge"]}}
    row["frechet"] = _pooled_distance([r["frechet"] for r in results])
    for name in NORMS:
        norms = [r[name] for r in results if r.get(name)]
        row[name] = _pooled_norm(norms) if norms else None
    row["seconds"] = round(statistics.mean(r["seconds"] for r in results), 1)
    if "largest_difference" in results[0]:
        row["largest_difference"] = max(r["largest_difference"] for r in results)
    return row


def _pooled_judge(shares: Sequence[Mapping]) -> dict:
    """Of all pictures together."""
    seeds = [share["value"] for share in shares]
    whole = judged(sum(share["right"] for share in shares), sum(share["prompts"] for share in shares))
    return whole | {"low": min(whole["low"], *seeds), "high": max(whole["high"], *seeds), "seeds": seeds}


def _pooled_distance(distances: Sequence[Mapping | None]) -> dict | None:
    """The mean."""
    if None in distances:
        return None
    seeds = [one["value"] for one in distances]
    value = statistics.mean(seeds)
    half = math.hypot(*(one["high"] - one["value"] for one in distances)) / len(distances)
    return {"value": value, "low": min(value - half, *seeds), "high": max(value + half, *seeds), "seeds": seeds}


def _pooled_norm(norms: Sequence[Mapping]) -> dict:
    """The mean of the medians, an interval that holds those of all seeds, the highest maximum."""
    ends = {"low": min(one["low"] for one in norms), "high": max(one["high"] for one in norms)}
    rest = {"max": max(one["max"] for one in norms), "not_finite": sum(one["not_finite"] for one in norms)}
    return {"value": statistics.mean(one["median"] for one in norms), **ends, **rest}


# --- tables -------------------------------------------------------------------------------------------


def order(a: Mapping, b: Mapping, paper_a: float, paper_b: float) -> str:
    """Whether two measures lie in the order of the paper's numbers."""
    if a["low"] <= b["high"] and b["low"] <= a["high"]:
        return "within noise"
    if paper_a == paper_b:
        return "differs, where the paper's are equal"
    return "agrees" if (a["value"] > b["value"]) == (paper_a > paper_b) else "disagrees"


def verdict(row: Row, rows: Sequence[Row], found: Mapping[str, Mapping]) -> str:
    """One line: how a row does here against all that have a lower FID in the paper."""
    better = sorted((other for other in rows if other.fid < row.fid), key=lambda other: other.fid)
    if not better:
        return f"- {row.label}: the lowest FID in the paper"
    mine, parts = found[row.run], []
    for other in better:
        theirs = found[other.run]
        shares = [next(iter(one["judge"].values())) for one in (mine, theirs)]
        said = [f"judge {order(*shares, row.clip, other.clip)}"]
        if mine["frechet"]:
            said.append(f"Frechet {order(mine['frechet'], theirs['frechet'], row.fid, other.fid)}")
        parts.append(f"against {other.label}: {', '.join(said)}")
    return f"- {row.label} {'; '.join(parts)}"


def paper_table(rows: Sequence[Row], found: Mapping[str, Mapping]) -> str:
    """Markdown: a table, and a line for each of its rows."""
    first, *fewer = found[rows[0].run]["judge"]
    head = [_steps(first), "each seed", *map(_steps, fewer), "Frechet distance", "seconds", "paper's FID", "CLIP"]
    cells = [["judge, %", *head]]
    for row in rows:
        one = found[row.run]
        seeds = " / ".join(f"{100 * share:.1f}" for share in one["judge"][first]["seeds"])
        shares = [_shown(one["judge"][first]), seeds, *(_shown(one["judge"][n]) for n in fewer)]
        frechet = _shown(one["frechet"], 1) if one["frechet"] else "-"
        cells.append([row.label, *shares, frechet, f"{one['seconds']:.0f}", f"{row.fid:.2f}", f"{row.clip:.2f}"])
    lines = [verdict(row, rows, found) for row in rows]
    differences = {found[row.run]["largest_difference"] for row in rows if "largest_difference" in found[row.run]}
    lines += [f"- Largest difference between their pixels, of 0 to 1: {one:.1e}" for one in differences]
    return f"{_markdown(cells)}\n\n" + "\n".join(lines)


def stabiliser_table(found: Mapping[str, Mapping]) -> str:
    """Markdown: norms, and whether they are higher without a stabiliser, as in the paper."""
    norms = [cell for kind in NORMS.values() for cell in (f"{kind} norm, median", "max")]
    cells, lines, stable = [["", *norms, "not finite", "judge, %"]], [], None
    for label, name in STABILISERS.items():
        one = found[name]
        stable = stable or one
        shown = [cell for kind in NORMS for cell in (_shown(one[kind], 1), f"{one[kind]['max']:.0f}")]
        judge = next(iter(one["judge"].values()))
        cells.append([label, *shown, str(one["grad_norm"]["not_finite"]), _shown(judge)])
        if one is not stable:
            times = {kind: one[kind]["value"] / stable[kind]["value"] for kind in NORMS}
            said = (f"{NORMS[k]} norm {x:.2f} times ({order(one[k], stable[k], 1, 0)})" for k, x in times.items())
            lines.append(f"- {label}: {', '.join(said)} that of the stable teacher")
    return f"{_markdown(cells)}\n\n" + "\n".join(lines)


def _steps(n: str) -> str:
    return f"{n} step{'s' * (n != '1')}"


def _shown(measure: Mapping, scale: float = 100, digits: int = 1) -> str:
    value, low, high = (f"{scale * measure[end]:.{digits}f}" for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    """Cells, the first row being the head, as a table that can also be read as it is."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def said(result: Mapping) -> str:
    """A result in some words."""
    shares = ", ".join(f"{_steps(n)} {_shown(share)} %" for n, share in result["judge"].items())
    return f"judge {shares}; {result['seconds']:.0f} s"


NOTE = """In brackets: 95 % of what other pictures (of norms: other steps) would give, widened where the seeds differ by
more. Where two such intervals meet, the difference is within noise. The judge is compared with CLIP, the Frechet
distance with FID."""


def report(found: Mapping[str, Mapping], about: str) -> str:
    """The tables as one Markdown document; about: what each run was."""
    parts = ["# The paper's ablations in small", f"Each run: {about}.", NOTE]
    for title, rows in PAPER.items():
        parts += [f"## {title}", paper_table(rows, found)]
    parts += ["## Stabilisers of the teacher, while sCM alone trains", stabiliser_table(found)]
    return "\n\n".join(parts) + "\n"


# --- chart --------------------------------------------------------------------------------------------

LINE_PX, LEFT_PX, BAR_PX, RIGHT_PX, TEXT_PX = 34, 240, 620, 320, 18
INK, GREY, BAR = "#202020", "#d0d0d0", "#6f9bd1"


def chart(found: Mapping[str, Mapping]) -> Image.Image:
    """The judge's share of every row of every table as a bar, with its interval and the paper's FID."""
    lines = sum(len(rows) + 2 for rows in PAPER.values()) + 2
    image = Image.new("RGB", (LEFT_PX + BAR_PX + RIGHT_PX, lines * LINE_PX), "white")
    draw, font, large = ImageDraw.Draw(image), *(ImageFont.load_default(size=TEXT_PX + more) for more in (0, 4))
    shares = {row.run: next(iter(found[row.run]["judge"].items())) for rows in PAPER.values() for row in rows}
    top = max(1, math.ceil(10 * max(share["high"] for _, share in shares.values())))  # tenths
    draw.text((20, LINE_PX), "Pictures that show their prompt, with 95 % intervals", INK, large, "lm")
    y = 2 * LINE_PX
    for title, rows in PAPER.items():
        draw.text((20, y + LINE_PX / 2), f"{title}, {_steps(shares[rows[0].run][0])}", INK, large, "lm")
        y += LINE_PX
        _grid(draw, font, top, y, y + len(rows) * LINE_PX)
        for row in rows:
            _bar(draw, font, row, shares[row.run][1], top, y)
            y += LINE_PX
        y += LINE_PX
    return image


def _grid(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, top: int, start: int, end: int) -> None:
    """A line for every tenth up to `top`, and its number below."""
    for tenth in range(top + 1):
        x = LEFT_PX + BAR_PX * tenth / top
        draw.line((x, start, x, end), GREY)
        draw.text((x, end + 4), f"{10 * tenth}", INK, font, "mt")


def _bar(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, row: Row, share: Mapping, top: int, y: int) -> None:
    """One row, from y downwards."""
    middle = y + LINE_PX / 2
    value, low, high = (LEFT_PX + BAR_PX * 10 * share[end] / top for end in ("value", "low", "high"))
    draw.rectangle((LEFT_PX, y + 6, value, y + LINE_PX - 6), BAR)
    draw.line((low, middle, high, middle), INK, 2)
    for x in (low, high):
        draw.line((x, middle - 6, x, middle + 6), INK, 2)
    draw.text((LEFT_PX - 12, middle), row.label, INK, font, "rm")
    draw.text((LEFT_PX + BAR_PX + 90, middle), f"{100 * share['value']:.1f} %", INK, font, "rm")
    draw.text((LEFT_PX + BAR_PX + 120, middle), f"paper: FID {row.fid:.2f}", INK, font, "lm")
