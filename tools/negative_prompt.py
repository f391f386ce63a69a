"""What negative prompts do on the bundled model, by the judge: shares over many images.

    python run.py python tools/negative_prompt.py [--images 60]

The prompts leave the ground open, which is white or sky blue then, as the seed decides. One JSON document on the last
line: of all images, those on each of these grounds, and those that show what the prompt says.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from sprint_core.emoji import judge
from sprint_core.emoji.captions import GROUNDS, USUAL_GROUNDS, Requirement
from sprint_core.emoji.concepts import article, number_of
from sprint_core.pipeline import Pipeline
from sprint_core.weights import presets

THINGS = ("slice of pizza", "red apple", "cat", "dog", "banana")
NEGATIVES = (None, *(article(f"{ground} background") for ground in USUAL_GROUNDS))
STEPS = (1, 2, 4)


@torch.inference_mode()
def counts(pipeline: Pipeline, images: int, steps: int, negative: str | None) -> dict[str, int]:
    """How many images are on each of USUAL_GROUNDS, and how many show what the prompt says ("right")."""
    names = [THINGS[i % len(THINGS)] for i in range(images)]
    texts = [article(name) for name in names]
    made = pipeline.generate(texts, seeds=range(images), steps=steps, negative=negative)
    shown = judge.grounds(made).tolist()
    right = judge.judge(made, [Requirement((number_of(name),)) for name in names]).right
    on = {ground: shown.count(list(GROUNDS).index(ground)) for ground in USUAL_GROUNDS}
    return {**on, "right": int(right.sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60, help="of each row (default: %(default)s)")
    images = parser.parse_args().images
    pipeline, rows = Pipeline.load(presets.BUNDLED), []
    for steps in STEPS:
        for negative in NEGATIVES:
            row = {"steps": steps, "negative": negative, "images": images}
            rows.append(row | counts(pipeline, images, steps, negative))
            print(rows[-1], flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
