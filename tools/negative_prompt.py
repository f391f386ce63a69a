"""What negative prompts do on the bundled model, by the judge: shares over many images.

    python run.py python tools/negative_prompt.py [--images 60]

The prompts leave the background open, which is teal or purple then, as the seed decides; or the colour of the thing,
which is white then whatever the seed, since in training an unsaid colour meant white. One JSON document on the last
line: of all images, those whose background or thing has that colour, and those that show what the prompt says.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from sprint_core.pipeline import Pipeline
from sprint_core.shapes import judge
from sprint_core.weights import presets

OPEN_BACKGROUND = ("a red circle", "a blue square", "a yellow triangle", "a green cross", "two white crosses")
OPEN_COLOUR = ("a circle", "a square", "a triangle", "a cross")
COLOURS = ("purple", "teal", "white")
STEPS = (1, 2, 4)


@torch.inference_mode()
def counts(pipeline: Pipeline, prompts: Sequence[str], images: int, steps: int, negative: str | None) -> dict[str, int]:
    """How many images hold each of COLOURS, and how many show what the prompt says ("right")."""
    found: dict[str, int] = dict.fromkeys((*COLOURS, "right"), 0)
    texts = [prompts[i % len(prompts)] for i in range(images)]
    made = pipeline.generate(texts, seeds=range(images), steps=steps, negative=negative).numpy()
    for prompt, image in zip(texts, made, strict=True):
        sight = judge.observe(image)
        for colour in {sight.background, *(thing.colour for thing in sight.detections)} & set(COLOURS):
            found[colour] += 1
        found["right"] += judge.judge(image, prompt)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60, help="of each row (default: %(default)s)")
    images = parser.parse_args().images
    pipeline, rows = Pipeline.load(presets.BUNDLED), []
    for steps in STEPS:
        for prompts, negatives in ((OPEN_BACKGROUND, (None, "purple", "teal")), (OPEN_COLOUR, (None, "white"))):
            for negative in negatives:
                row = {"steps": steps, "prompts": prompts[0], "negative": negative, "images": images}
                rows.append(row | counts(pipeline, prompts, images, steps, negative))
                print(rows[-1], flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
