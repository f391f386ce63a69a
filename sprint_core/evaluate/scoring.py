"""Scores on the small world of shapes: held-out prompts, the judge, and tables and grids of what it says."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..pipeline import Pipeline
from ..shapes import captions, examples, judge
from ..weights import checkpoint, layouts
from ..weights.checkpoint import CheckpointError
from . import frechet, sheet

BATCH = 25
TEACHER_STEPS = 20
DIFFERENT = 200  # prompts of a category, of which there are a few hundred
SEED_STRIDE = 10**6
GRID_ROWS = 12  # prompts in the image grid

Painter = Callable[[Sequence[str], Sequence[int]], Tensor]  # prompts, seeds -> images [b, h, w, 3] in [0, 1]


def student(pipeline: Pipeline, steps: int, guidance: float) -> Painter:
    """The model itself at a step count."""
    return lambda texts, seeds: pipeline.generate(texts, seeds=seeds, steps=steps, guidance=guidance).cpu()


def teacher(path: str | Path, pipeline: Pipeline, steps: int, cfg: float) -> Painter:
    """The multi-step model at `path` with the pipeline's encoder and DC-AE: guided Euler. Raises CheckpointError.

    cfg: unless the file says by what that model is guided best.
    """
    network = next(pipeline.transformer.parameters())
    weights = checkpoint.load(path, layouts.TRANSFORMER)
    if weights.config.guidance_embed:
        raise CheckpointError(f"{path}: a SANA-Sprint, not its teacher; --teacher takes the multi-step model")
    model = checkpoint.build(weights, dtype=network.dtype, device=network.device)
    cfg = weights.settings.get("guidance", cfg)
    multistep = dataclasses.replace(pipeline, transformer=model, flow_shift=weights.settings["flow_shift"])

    def paint(texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        captions = pipeline.encode_text(texts)
        return multistep.generate_multistep(captions, seeds=seeds, steps=steps, cfg=cfg).cpu()

    return paint


@dataclass(frozen=True)
class Score:
    """How one way to paint did: images [n, h, w, 3] in [0, 1], and for each whether it shows its prompt."""

    images: Tensor
    right: tuple[bool, ...]
    seconds: float

    @property
    def share(self) -> float:
        return sum(self.right) / len(self.right)


def balanced_prompts(n: int, seed: int, free: bool = False) -> list[examples.Prompt]:
    """n held-out prompts, in turn of each category; beyond some thousand the same texts return, of other scenes.

    free: of scenes whose things stand anywhere.
    """
    chosen: list[examples.Prompt] = []
    while len(chosen) < n:
        each = min(DIFFERENT, -(-(n - len(chosen)) // len(captions.CATEGORIES)))
        columns = (examples.prompts(name, each, seed, free=free) for name in captions.CATEGORIES)
        chosen += [prompt for row in zip(*columns, strict=True) for prompt in row]
        seed += SEED_STRIDE
    return chosen[:n]


def score(paint: Painter, prompts: Sequence[examples.Prompt], seed: int, label: str) -> Score:
    """Paint and judge; image i has seed `seed` + i."""
    images, started = [], time.perf_counter()
    for start in tqdm(range(0, len(prompts), BATCH), desc=label, unit=f"x{BATCH} images", leave=False):
        texts = [prompt.text for prompt in prompts[start : start + BATCH]]
        images.append(paint(texts, [seed + start + i for i in range(len(texts))]))
    painted, seconds = torch.cat(images), time.perf_counter() - started
    right = tuple(judge.judge(image.numpy(), p.requirement) for image, p in zip(painted, prompts, strict=True))
    return Score(painted, right, seconds)


def summary(
    scores: dict[str, Score], prompts: Sequence[examples.Prompt], extractor: frechet.Extractor, true: Tensor
) -> dict:
    """The JSON document: shares right, per category, and Frechet distances to true images' features [n, d]."""
    categories = {name: {} for name in captions.CATEGORIES}
    for label, one in scores.items():
        for name, row in categories.items():
            chosen = [right for right, prompt in zip(one.right, prompts, strict=True) if prompt.category == name]
            row[label] = round(sum(chosen) / len(chosen), 4)
    distances = {label: frechet.frechet(frechet.extract(extractor, one.images), true) for label, one in scores.items()}
    return {
        "judge": {label: round(one.share, 4) for label, one in scores.items()},
        "categories": categories,
        "frechet": {label: round(distance, 4) for label, distance in distances.items()},
        "prompts": len(prompts),
    }


def table(result: dict) -> str:
    """The summary for people."""
    labels = list(result["judge"])
    rows = [("", *labels), *((name, *row.values()) for name, row in result["categories"].items())]
    rows += [("all", *result["judge"].values()), ("Frechet", *result["frechet"].values())]
    return "\n".join(f"{row[0]:14}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows)


def grid(scores: dict[str, Score], prompts: Sequence[examples.Prompt]) -> Image.Image:
    """One row per prompt: the true image and each way's; a red frame where the judge disagrees."""
    shown = prompts[:GRID_ROWS]
    columns = {"true": (sheet.true_images(shown), (True,) * len(shown))}
    for label, one in scores.items():
        title = f"{label} step{'s' * (label != '1')}" if label.isdigit() else label
        columns[title] = (one.images, one.right)
    return sheet.sheet(columns, [prompt.text for prompt in shown])
