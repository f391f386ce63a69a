"""Scores on the world of emoji: held-out prompts, the judge, what the DC-AE lets through at best, and a table.

judge     share of images whose every thing is the one that is said, over the ceiling
ceiling   that share of true scenes after the model's own DC-AE, which no model can beat by much
short     bare names ("pizza", "a red apple"), at the step count that does worst
rows      what a caption says, one by one; each of the captions that say it
retrieval how often another network than the judge finds an image's caption among all of them, at once or in five
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..emoji import judge, scenes
from ..emoji.art import Art
from ..emoji.captions import ALL, Prompt, Requirement
from ..emoji.concepts import article, common, concepts
from ..emoji.judge import Verdicts
from ..pipeline import Pipeline
from .scoring import BATCH, Painter
from .sheet import sheet

GRID_ROWS = 24
UNKNOWN = "<unk>"
SPLIT = "test"
TRIED = 20  # names that tell whether a model knows this world

# What a row is about: which captions it counts, and which verdicts must be right.
Row = tuple[Callable[[Requirement], bool], tuple[str, ...]]
ROWS: Mapping[str, Row] = {
    "one": (lambda r: r.kind == "one" and r.place is None and r.size is None, ("names",)),
    "pair": (lambda r: r.kind == "pair", ("names", "order")),
    "count": (lambda r: r.kind == "count", ("names", "number")),
    "place": (lambda r: r.place is not None, ("names", "place")),
    "size": (lambda r: r.size is not None, ("names", "place")),
    "style": (lambda r: r.style is not None, ("names", "style")),
    "ground": (lambda r: r.ground is not None, ("ground",)),
    "all": (lambda r: True, ("names",)),
    "top 5": (lambda r: True, ("top5",)),
    "nothing wrong": (lambda r: True, ("right",)),
}


def is_known_to(pipeline: Pipeline) -> bool:
    """Whether a model knows the words of this world; one of plain shapes does not."""
    tokenizer = pipeline.text_encoder.prompts.tokenizer
    words = " ".join(concepts()[number].names[0] for number in common()[:TRIED])
    return UNKNOWN not in map(tokenizer.piece, tokenizer.encode(words))


@dataclass(frozen=True)
class Score:
    """How one way to paint did: images [n, h, w, 3] uint8, and what the judge says of them."""

    images: Tensor
    verdicts: Verdicts

    @property
    def share(self) -> float:
        return float(self.verdicts.names.float().mean())


def short_prompts(n: int, seed: int, among: Sequence[int] = ALL) -> list[Prompt]:
    """n bare names, every second with its article; each of another of these concepts as long as there are any."""
    rng = random.Random(f"short {seed}")
    numbers: list[int] = []
    while len(numbers) < n:
        numbers += rng.sample(among, len(among))
    prompts = []
    for i, number in enumerate(numbers[:n]):
        name = concepts()[number].names[0]
        prompts.append(Prompt(article(name) if i % 2 else name, Requirement((number,))))
    return prompts


def true_images(prompts: Sequence[Prompt], drawings: Art, seed: int) -> Tensor:
    """A true image of each prompt: [n, h, w, 3] uint8."""
    rng = random.Random(f"true {seed}")
    packed = scenes.pack([scenes.compose(prompt.requirement, rng) for prompt in prompts])
    painted = [scenes.paint(part, drawings) for part in packed.split(BATCH)]
    return torch.cat(painted).movedim(1, -1).contiguous()


@torch.inference_mode()
def round_trip(pipeline: Pipeline, images: Tensor) -> Tensor:
    """Images [n, h, w, 3] uint8 through the model's DC-AE and back."""
    parts = []
    for batch in tqdm(images.split(BATCH), desc="ceiling", unit=f"x{BATCH} images", leave=False):
        parts.append(as_bytes(pipeline.decode(pipeline.encode_image(batch.float() / 255.0))))
    return torch.cat(parts)


def score(paint: Painter, prompts: Sequence[Prompt], seed: int, label: str) -> Score:
    """Paint and judge; image i has seed `seed` + i."""
    return judged(painted(paint, [prompt.text for prompt in prompts], seed, label), prompts)


def painted(paint: Painter, texts: Sequence[str], seed: int, label: str) -> Tensor:
    """Images [n, h, w, 3] uint8; image i has seed `seed` + i."""
    images = []
    for start in tqdm(range(0, len(texts), BATCH), desc=label, unit=f"x{BATCH} images", leave=False):
        batch = texts[start : start + BATCH]
        images.append(as_bytes(paint(batch, range(seed + start, seed + start + len(batch)))))
    return torch.cat(images)


def judged(images: Tensor, prompts: Sequence[Prompt]) -> Score:
    """Of images [n, h, w, 3] uint8."""
    return Score(images, judge.judge(images, [prompt.requirement for prompt in prompts]))


def rows(scores: Mapping[str, Score], prompts: Sequence[Prompt]) -> dict[str, dict[str, float | None]]:
    """Shares right by row and way to paint; None where no caption says such a thing."""
    table: dict[str, dict[str, float | None]] = {}
    for name, (counts, fields) in ROWS.items():
        chosen = torch.tensor([counts(prompt.requirement) for prompt in prompts])
        table[name] = {label: _share(one.verdicts, fields, chosen) for label, one in scores.items()}
    return table


def _share(verdicts: Verdicts, fields: Sequence[str], chosen: Tensor) -> float | None:
    right = torch.stack([getattr(verdicts, field) for field in fields]).all(0).cpu()[chosen]
    return round(float(right.float().mean()), 4) if len(right) else None


def over(share: float, ceiling: float) -> float:
    """A share of what can be reached."""
    return round(share / ceiling, 4) if ceiling else 0.0


def table(result: Mapping) -> str:
    """The rows for people, the ways to paint side by side."""
    labels = list(next(iter(result["rows"].values())))
    lines = [f"{'':14}" + "".join(f"{label:>12}" for label in labels)]
    lines += [_line(name, [row[label] for label in labels]) for name, row in result["rows"].items()]
    for name in ("short", "shapes", "frechet"):
        by_label = result["short_by_steps"] if name == "short" else result[name]
        lines.append(_line(name, [by_label.get(label) for label in labels]))
    for name in ("R@1", "R@5") if result["retrieval"] else ():
        lines.append(_line(name, [result["retrieval"][label][name] for label in labels]))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[float | None]) -> str:
    return f"{name:14}" + "".join(f"{'-' if cell is None else format(cell, '.4f'):>12}" for cell in cells)


def grid(scores: Mapping[str, Score], prompts: Sequence[Prompt]) -> Image.Image:
    """One row per prompt, each way's image; a red frame where anything is wrong."""
    columns = {}
    for label, one in scores.items():
        title = f"{label} step{'s' * (label != '1')}" if label.isdigit() else label
        columns[title] = (one.images, one.verdicts.right.tolist())
    return sheet(columns, [prompt.text for prompt in prompts[:GRID_ROWS]])


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, on the CPU."""
    return images.mul(255).round().byte().cpu()
