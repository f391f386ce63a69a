"""What a comparison's results say: lines for programs, a table and a chart for people.

`results` are those of compare.py, by method and seed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ... import disk
from .ablation_measures import pooled_distance, pooled_share
from .ablation_tables import figure_class, interval, markdown, number_of_steps

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]

NOTE = """One evaluation is a forward pass of one sample through a network of the teacher's size; a backward pass counts
as two more, or as one where no weight learns. Judge: how many images show what their prompt names. The Frechet distance
is of images of the empty caption, to which half the training belongs, from the data; diversity: how often two of them
have different grounds, over how often two of the data do. In brackets: 95 % of what other images would give, widened
where the seeds differ by more. Memory: of weights, gradients and moments in fp32, without activations."""


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


def report(results: Results, bounds: Mapping[str, Any], description: str) -> str:
    """Markdown: one table of all methods for each number of steps. bounds: Frechet distances of the best there is."""
    parts = ["# Methods of distillation, compared", f"Each run: {description}.", NOTE]
    if bounds["teacher"]:
        teacher, data = (interval(bounds[name], 1) for name in ("teacher", "data"))
        parts.append(f"Frechet distance of the teacher in 20 steps: {teacher}; of other images of the data: {data}.")
    counts = list(next(iter(next(iter(results.values())).values()))["by_steps"])
    for steps in counts:
        parts += [f"## {number_of_steps(steps)}", _table(results, steps)]
    return "\n\n".join(parts) + "\n"


def _table(results: Results, steps: str) -> str:
    head = ["", "judge, %", "each seed", "Frechet distance", "diversity", "stopped", "updates", "seconds", "MiB"]
    rows = [head]
    for method, by_seed in results.items():
        runs = list(by_seed.values())
        scores = [one["by_steps"][steps] for one in runs]
        share = pooled_share([one["judge"] for one in scores])
        distance = pooled_distance([one["frechet"] for one in scores])
        mean = {name: sum(one[name] for one in runs) / len(runs) for name in ("steps", "seconds", "memory_mib")}
        rows.append(
            [
                method,
                interval(share),
                " / ".join(f"{100 * value:.1f}" for value in share["seeds"]),
                interval(distance, 1) if distance else "-",
                f"{sum(one['diversity'] for one in scores) / len(scores):.2f}",
                f"{sum(one['stopped'] for one in runs)} of {len(runs)}",
                *(f"{value:.0f}" for value in mean.values()),
            ]
        )
    return markdown(rows)


def in_words(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    shares = ", ".join(f"{number_of_steps(n)} {interval(one['judge'])} %" for n, one in result["by_steps"].items())
    stopped = ", stopped by the guard" if result["stopped"] else ""
    return f"judge {shares}; {result['seconds']:.0f} s{stopped}"


def chart(results: Results, path: Path) -> None:
    """Write a PNG: the Frechet distance of every method and number of steps, or the judge's share where none is."""
    counts = list(next(iter(next(iter(results.values())).values()))["by_steps"])
    figure = figure_class()(figsize=(9, 1.5 + 0.6 * len(results)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(counts)
    by_frechet = all(
        one["by_steps"][steps]["frechet"] for runs in results.values() for one in runs.values() for steps in counts
    )
    pool, name = (pooled_distance, "frechet") if by_frechet else (pooled_share, "judge")
    measured = {steps: [pool(_of(runs, steps, name)) or {} for runs in results.values()] for steps in counts}
    for i, (steps, row) in enumerate(measured.items()):
        values = [one["value"] for one in row]
        errors = [[abs(one[end] - one["value"]) for one in row] for end in ("low", "high")]
        places = [place + (i - (len(counts) - 1) / 2) * height for place in range(len(results))]
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


def _of(runs: Mapping[int, Mapping[str, Any]], steps: str, name: str) -> list[Any]:
    return [one["by_steps"][steps][name] for one in runs.values()]
