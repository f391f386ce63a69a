"""Seconds from a queued prompt to the saved picture of the bundled model, in a real ComfyUI on this machine.

    python run.py python tests/bench_comfyui.py

Not a test. Each run has its own prompt and seed, so that nothing of it is cached; loading is not counted.
The last line is one JSON document: by step count, medians of the whole, of the nodes' own time, and the spread.
"""

import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import run  # noqa: E402
from sprint_core import scenes  # noqa: E402

STEPS, RUNS, WARM_UP = (1, 2, 4), 10, 2


def seconds(server, prompt: dict) -> tuple[float, float]:
    """Of one run, as its user waits for it and as ComfyUI's own clock has it."""
    started = time.perf_counter()
    history = server.run(prompt)
    waited = time.perf_counter() - started
    times = {event: data["timestamp"] for event, data in history["status"]["messages"]}
    return waited, (times["execution_success"] - times["execution_start"]) / 1000


def main() -> None:
    texts = iter(scenes.prompts("colors", len(STEPS) * (RUNS + WARM_UP)))
    result = {}
    with run.comfyui_server() as server:
        for steps in STEPS:
            taken = []
            for i in range(RUNS + WARM_UP):
                prompt = server.prompt_of(run.WORKFLOW)
                run.edit(prompt, next(texts).text, steps=steps, seed=i)
                taken.append(seconds(server, prompt))
            waited, executed = zip(*taken[WARM_UP:])
            result[str(steps)] = {
                "median_sec": round(statistics.median(waited), 3),
                "executed_median_sec": round(statistics.median(executed), 3),
                "min_sec": round(min(waited), 3),
                "max_sec": round(max(waited), 3),
            }
            print(f"{steps} steps: {result[str(steps)]}")
    print(json.dumps({"text_to_image_sec": result, "runs": RUNS}))


if __name__ == "__main__":
    main()
