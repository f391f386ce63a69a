"""What a comparison's results say: lines for programs; tables, the paper's numbers beside ours, and a chart for people.

`results` are those of compare.py, by method and seed; `Pooled` is what all seeds of a method make of one number of
steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import disk
from .measures import Measure, order, pooled_distance, pooled_share

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
Pooled = Mapping[str, Any]

NOTE = """One evaluation is a forward pass of one sample through a network of the teacher's size; a backward pass counts
as two more, or as one where no weight learns. Judge: how many images show what their prompt names. The Frechet distance
is of images of the empty caption, to which half the training belongs, from the data; diversity: how often two of them
have different grounds, over how often two of the data do. In brackets: 95 % of what other images would give, widened
where the seeds differ by more. Where two such intervals meet, the difference is within noise. Memory: of weights,
gradients and moments in fp32, without activations. The judge is compared with the paper's CLIP score, the Frechet
distance with its FID."""
PAPER_STEPS = "2"  # of the paper's tables T3 to T6


@dataclass(frozen=True)
class Row:
    """A row of a table of the paper (arXiv 2503.09641), and the method that stands for it here."""

    label: str
    method: str
    fid: float
    clip: float


# fmt: off
PAPER = {
    #                                             here              FID   CLIP score
    "T1 Parametrisation": (Row("flow, Euler steps",   "flow",             5.81, 28.81),
                           Row("TrigFlow, rotations", "trigflow",         5.73, 28.81)),
    "T3 Objective":       (Row("sCM alone",           "scm",              8.93, 27.51),
                           Row("LADD alone",          "ladd",            12.20, 27.00),
                           Row("both",                "scm+ladd",         8.11, 28.02)),
    "T4 Guidance":        (Row("not embedded",        "no-guidance",      9.23, 27.15),
                           Row("embedded",            "scm+ladd",         8.72, 28.09)),
    "T5 sCM : LADD":      (Row("1 : 1",               "ladd-weight-1",    8.81, 27.93),
                           Row("1 : 0.5",             "scm+ladd",         8.43, 27.85),
                           Row("1 : 0.1",             "ladd-weight-0.1",  8.90, 27.76)),
    "T6 Max-time share":  (Row("0 %",                 "max-time-0",       9.44, 27.65),
                           Row("50 %",                "scm+ladd",         8.32, 27.94),
                           Row("70 %",                "max-time-0.7",     8.11, 28.02)),
}
# fmt: on


def lines(method: str, by_seed: Mapping[int, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One for each seed and number of steps."""
    for seed, result in by_seed.items():
        for steps, scores in result["by_steps"].items():
            distance = scores["frechet"] and round(scores["frechet"]["value"], 4)
            yield {
                "method": method,
                "seed": seed,
                "steps": int(steps),
                "judge": round(scores["judge"]["value"], 4),
                "frechet": distance,
                "diversity": round(scores["diversity"], 3),
                **{name: result[name] for name in ("evaluations", "seconds", "memory_mib", "stopped")},
            }


def pooled(by_seed: Mapping[int, Mapping[str, Any]], steps: str) -> dict[str, Any]:
    """Judge, Frechet distance and diversity of all seeds."""
    scores = [one["by_steps"][steps] for one in by_seed.values()]
    return {
        "judge": pooled_share([one["judge"] for one in scores]),
        "frechet": pooled_distance([one["frechet"] for one in scores]),
        "diversity": sum(one["diversity"] for one in scores) / len(scores),
    }


def counts(results: Results) -> list[str]:
    """The numbers of steps that were scored."""
    return list(next(iter(next(iter(results.values())).values()))["by_steps"])


def report(results: Results, references: Mapping[str, Any], description: str) -> str:
    """Markdown: all methods for each number of steps, then the paper's tables of which every row is there.

    references: what compare.py measured of the data and of the teacher.
    """
    parts = ["# Methods of distillation, compared", f"Each run: {description}.", NOTE]
    if references["data"]:
        teacher, data = (interval(one, 1) for one in (references["flow"]["frechet"], references["data"]))
        parts.append(f"Frechet distance of the teacher in 20 steps: {teacher}; of other images of the data: {data}.")
    for steps in counts(results):
        parts += [f"## {number_of_steps(steps)}", _table(results, steps)]
    of_paper = {method: pooled(by_seed, PAPER_STEPS) for method, by_seed in results.items()}
    of_paper |= {name: references[name] for name in ("flow", "trigflow")}
    difference = f"- Largest difference between their pixels, of 0 to 1: {references['largest_difference']:.1e}"
    notes = {"T1 Parametrisation": [difference]}
    for title, rows in PAPER.items():
        if all(row.method in of_paper for row in rows):
            parts += [f"## {title}", paper_table(rows, of_paper), *notes.get(title, [])]
    return "\n\n".join(parts) + "\n"


def _table(results: Results, steps: str) -> str:
    rows = [
        ["", "judge, %", "each seed", "Frechet distance", "each seed", "diversity", "stopped", "updates", "s", "MiB"]
    ]
    for method, by_seed in results.items():
        runs, all_seeds = list(by_seed.values()), pooled(by_seed, steps)
        mean = {name: sum(one[name] for one in runs) / len(runs) for name in ("steps", "seconds", "memory_mib")}
        rows.append(
            [
                method,
                interval(all_seeds["judge"]),
                _each_seed(all_seeds["judge"], 100),
                *_distance_cells(all_seeds["frechet"]),
                f"{all_seeds['diversity']:.2f}",
                f"{sum(one['stopped'] for one in runs)} of {len(runs)}",
                *(f"{value:.0f}" for value in mean.values()),
            ]
        )
    return markdown(rows)


def paper_table(rows: Sequence[Row], results: Mapping[str, Pooled]) -> str:
    """Markdown: a table, and a line for each of its rows."""
    cells = [["", "judge, %", "Frechet distance", "each seed", "paper's FID", "CLIP"]]
    for row in rows:
        one = results[row.method]
        paper = [f"{row.fid:.2f}", f"{row.clip:.2f}"]
        cells.append([row.label, interval(one["judge"]), *_distance_cells(one["frechet"]), *paper])
    return f"{markdown(cells)}\n\n" + "\n".join(verdict(row, rows, results) for row in rows)


def verdict(row: Row, rows: Sequence[Row], results: Mapping[str, Pooled]) -> str:
    """One line: how a row does here against all that have a lower FID in the paper."""
    better = sorted((other for other in rows if other.fid < row.fid), key=lambda other: other.fid)
    parts, mine = [], results[row.method]
    for other in better:
        theirs = results[other.method]
        words = f"judge {order(mine['judge'], theirs['judge'], row.clip, other.clip)}"
        if mine["frechet"]:
            words += f", Frechet {order(mine['frechet'], theirs['frechet'], row.fid, other.fid)}"
        parts.append(f"against {other.label}: {words}")
    return f"- {row.label} {'; '.join(parts)}" if parts else f"- {row.label}: the lowest FID in the paper"


def in_words(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    shares = ", ".join(f"{number_of_steps(n)} {interval(one['judge'])} %" for n, one in result["by_steps"].items())
    stopped = ", stopped by the guard" if result["stopped"] else ""
    return f"judge {shares}; {result['seconds']:.0f} s{stopped}"


def number_of_steps(n: str) -> str:
    return f"{n} step{'s' * (n != '1')}"


def interval(measure: Measure, scale: float = 100) -> str:
    value, low, high = (f"{scale * measure[end]:.1f}" for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _distance_cells(distance: Measure | None) -> list[str]:
    return [interval(distance, 1), _each_seed(distance, 1)] if distance else ["-", "-"]


def _each_seed(measure: Measure, scale: float) -> str:
    return " / ".join(f"{scale * value:.1f}" for value in measure.get("seeds", [measure["value"]]))


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Cells, the first row being the head, as a table that can also be read as it is."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


# --- chart --------------------------------------------------------------------------------------------


def figure_class() -> Any:
    """matplotlib's Figure. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the chart of a comparison is drawn by matplotlib: pip install matplotlib") from None
    return Figure


def chart(results: Results, path: Path) -> None:
    """Write a PNG: the Frechet distance of every method and number of steps, or the judge's share where none is."""
    figure = figure_class()(figsize=(9, 1.5 + 0.6 * len(results)), layout="constrained")
    columns = {steps: [pooled(runs, steps) for runs in results.values()] for steps in counts(results)}
    axes, height = figure.subplots(), 0.8 / len(columns)
    by_frechet = all(one["frechet"] for column in columns.values() for one in column)
    for i, (steps, column) in enumerate(columns.items()):
        measured = [one["frechet" if by_frechet else "judge"] for one in column]
        values = [one["value"] for one in measured]
        errors = [[abs(one[end] - one["value"]) for one in measured] for end in ("low", "high")]
        places = [place + (i - (len(columns) - 1) / 2) * height for place in range(len(results))]
        axes.barh(places, values, height * 0.9, xerr=errors, capsize=2, label=number_of_steps(steps))
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    title = "Share of images that show what their prompt names"
    if by_frechet:
        title = "Frechet distance of images of the empty caption from the data"
        axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.5)
    axes.set_axisbelow(True)
    axes.legend()
    axes.set_title(f"{title}, with 95 % intervals", loc="left")
    with disk.replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
