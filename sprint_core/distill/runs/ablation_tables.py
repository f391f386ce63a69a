"""What the ablations' results say: our numbers beside the paper's (arXiv 2503.09641) in tables, and as a chart.

`results` are pooled ones (ablation_measures.py) of all runs, by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import disk
from .ablation_measures import NORMS, Measure, order

Results = Mapping[str, Mapping[str, Any]]


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


def verdict(row: Row, rows: Sequence[Row], results: Results) -> str:
    """One line: how a row does here against all that have a lower FID in the paper."""
    better = sorted((other for other in rows if other.fid < row.fid), key=lambda other: other.fid)
    parts, mine = [], results[row.run]
    for other in better:
        theirs = results[other.run]
        words = f"judge {order(_first_share(mine), _first_share(theirs), row.clip, other.clip)}"
        if mine["frechet"]:
            words += f", Frechet {order(mine['frechet'], theirs['frechet'], row.fid, other.fid)}"
        parts.append(f"against {other.label}: {words}")
    return f"- {row.label} {'; '.join(parts)}" if parts else f"- {row.label}: the lowest FID in the paper"


def paper_table(rows: Sequence[Row], results: Results) -> str:
    """Markdown: a table, and a line for each of its rows."""
    first, *fewer = map(number_of_steps, results[rows[0].run]["judge"])
    cells = [["judge, %", first, "each seed", *fewer, "Frechet distance", "seconds", "paper's FID", "CLIP"]]
    for row in rows:
        one = results[row.run]
        share, *others = one["judge"].values()
        seeds = " / ".join(f"{100 * value:.1f}" for value in share["seeds"])
        distances = interval(one["frechet"], 1) if one["frechet"] else "-"
        paper = [f"{row.fid:.2f}", f"{row.clip:.2f}"]
        ours = [interval(share), seeds, *map(interval, others), distances, f"{one['seconds']:.0f}"]
        cells.append([row.label, *ours, *paper])
    lines = [verdict(row, rows, results) for row in rows]
    differences = {results[row.run].get("largest_difference") for row in rows} - {None}
    lines += [f"- Largest difference between their pixels, of 0 to 1: {one:.1e}" for one in differences]
    return f"{markdown(cells)}\n\n" + "\n".join(lines)


def stabiliser_table(results: Results) -> str:
    """Markdown: norms, and whether they are higher without a stabiliser, as in the paper."""
    norms = [cell for kind in NORMS.values() for cell in (f"{kind} norm, median", "max")]
    cells, lines = [["", *norms, "not finite", "judge, %"]], []
    stable = results[next(iter(STABILISERS.values()))]
    for label, name in STABILISERS.items():
        one = results[name]
        norms = [cell for kind in NORMS for cell in (interval(one[kind], 1), f"{one[kind]['max']:.0f}")]
        cells.append([label, *norms, str(one["grad_norm"]["not_finite"]), interval(_first_share(one))])
        if one is not stable:
            times = {kind: one[kind]["value"] / stable[kind]["value"] for kind in NORMS}
            words = (f"{NORMS[k]} norm {x:.2f} times ({order(one[k], stable[k], 1, 0)})" for k, x in times.items())
            lines.append(f"- {label}: {', '.join(words)} that of the stable teacher")
    return f"{markdown(cells)}\n\n" + "\n".join(lines)


NOTE = """In brackets: 95 % of what other images (of norms: other steps) would give, widened where the seeds differ by
more. Where two such intervals meet, the difference is within noise. The judge is compared with CLIP, the Frechet
distance with FID."""


def report(results: Results, description: str) -> str:
    """The tables as one Markdown document; description: what each run was."""
    parts = ["# The paper's ablations in small", f"Each run: {description}.", NOTE]
    for title, rows in PAPER.items():
        parts += [f"## {title}", paper_table(rows, results)]
    parts += ["## Stabilisers of the teacher, while sCM alone trains", stabiliser_table(results)]
    return "\n\n".join(parts) + "\n"


def in_words(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    shares = ", ".join(f"{number_of_steps(n)} {interval(share)} %" for n, share in result["judge"].items())
    return f"judge {shares}; {result['seconds']:.0f} s"


def _first_share(result: Mapping[str, Any]) -> Measure:
    return next(iter(result["judge"].values()))


def number_of_steps(n: str) -> str:
    return f"{n} step{'s' * (n != '1')}"


def interval(measure: Measure, scale: float = 100) -> str:
    value, low, high = (f"{scale * measure[end]:.1f}" for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Cells, the first row being the head, as a table that can also be read as it is."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


# --- chart --------------------------------------------------------------------------------------------


def figure_class() -> Any:
    """matplotlib's Figure. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the chart of the ablations is drawn by matplotlib: pip install matplotlib") from None
    return Figure


def chart(results: Results, path: Path) -> None:
    """Write a PNG: the judge's share of every row of every table, with its interval and the paper's FID."""
    figure = figure_class()(figsize=(11, 10), layout="constrained")
    heights = [len(rows) + 1 for rows in PAPER.values()]
    panels = figure.subplots(len(PAPER), sharex=True, height_ratios=heights)
    for axes, (title, rows) in zip(panels, PAPER.items(), strict=True):
        shares = [_first_share(results[row.run]) for row in rows]
        values = [100 * share["value"] for share in shares]
        errors = [[100 * abs(share[end] - share["value"]) for share in shares] for end in ("low", "high")]
        axes.barh([row.label for row in rows], values, xerr=errors, height=0.6, capsize=4, color="#6f9bd1")
        for place, (row, value) in enumerate(zip(rows, values, strict=True)):
            text = f"{value:.1f} %    paper: FID {row.fid:.2f}"
            axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), verticalalignment="center")
        axes.set_title(f"{title}, {number_of_steps(next(iter(results[rows[0].run]['judge'])))}", loc="left")
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.5)
        axes.set_axisbelow(True)
    panels[-1].set_xlim(left=0)
    figure.suptitle("Images that show their prompt, in %, with 95 % intervals")
    with disk.replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
