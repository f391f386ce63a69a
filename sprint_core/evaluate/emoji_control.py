"""Does a ControlNet of the emoji world keep images to a drawing, and are things still those that the prompt names?

held-out scene, whose things stand anywhere -> drawing -> image, with control and without -> two verdicts

agreement  of an image: the area that is covered in it and in the scene, over what is covered in either
names      share of images whose every thing is the one that is said, where it is drawn

A drawing is the scene's soft edges, a scribble of these, or the outlines that an unsteady hand would draw.
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..emoji import captions, judge, scenes
from ..emoji.art import Art
from ..emoji.captions import Prompt
from ..images import edges
from ..models.controlnet import SanaControlNet
from ..pipeline import Control, Pipeline
from .emoji import round_trip
from .scoring import BATCH
from .sheet import sheet

KINDS = ("soft", "scribble", "hand")
FREE, CEILING = "without", "ceiling"  # without control; true scenes after the DC-AE
STRAYED = "ceiling, hand"  # these, moved as the hand strayed: who follows the hand agrees no better with the scene
HAND_PX = 3.5  # by which a hand strays; more than in training
GRID_ROWS = 12

Painted = dict[str, Tensor]  # by kind and step count, such as "hand 2": images [n, h, w, 3] uint8


@dataclass(frozen=True)
class Drawn:
    """Held-out prompts that say neither places nor sizes, a scene of each, and what it looks like.

    images [n, 3, h, w] uint8; covered [n, h, w] in [0, 1]: by things.
    """

    prompts: Sequence[Prompt]
    scenes: Sequence[scenes.Scene]
    images: Tensor
    covered: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def drawings(self, kind: str) -> Tensor:
        """Control images of a kind: [n, h, w, 3] in [0, 1]."""
        if kind == "hand":
            outlines = edges.detect(self.covered[..., None].expand(-1, -1, -1, 3), scribble=True).movedim(-1, 1)
            return edges.wobbled(outlines, self._hand(), HAND_PX).movedim(1, -1)
        return edges.detect(self.images.movedim(1, -1).float() / 255.0, scribble=kind == "scribble")

    def strayed(self) -> Tensor:
        """The scenes, moved by the field that moved the hand's outlines: [n, h, w, 3] uint8."""
        return edges.wobbled(self.images.float(), self._hand(), HAND_PX, "border").round().byte().movedim(1, -1)

    def _hand(self) -> torch.Generator:
        return torch.Generator(self.images.device).manual_seed(len(self))


def draw(count: int, seed: int, art: Art, among: Sequence[int]) -> Drawn:
    """So many of them; a seed gives the same ones."""
    rng = random.Random(f"free test {seed}")
    prompts, drawn = [], []
    while len(prompts) < count:
        requirement = captions.draw(rng, "test", among)
        requirement = dataclasses.replace(requirement, place=None, size=None)
        text, scene = captions.write(requirement, rng), scenes.compose_free(requirement, rng)
        if captions.STRANGE not in text:
            prompts.append(Prompt(text, requirement))
            drawn.append(scene)
    packed = scenes.pack(drawn).split(BATCH)
    images = torch.cat([scenes.paint(part, art) for part in packed])
    return Drawn(prompts, drawn, images, torch.cat([scenes.silhouettes(part, art) for part in packed]))


def paint(
    pipeline: Pipeline, net: SanaControlNet, drawn: Drawn, steps: Sequence[int], seed: int, guidance: float
) -> Painted:
    """Every prompt with each drawing of its scene, and without; image i has seed `seed` + i."""
    device = next(net.parameters()).device
    painted: dict[str, list[Tensor]] = {f"{kind} {n}": [] for kind in (*KINDS, FREE) for n in steps}
    for kind in (*KINDS, FREE):
        drawings = None if kind == FREE else drawn.drawings(kind)
        for start in tqdm(range(0, len(drawn), BATCH), desc=kind, leave=False):
            texts = [prompt.text for prompt in drawn.prompts[start : start + BATCH]]
            hints = [] if drawings is None else [Control(net, drawings[start : start + BATCH].to(device))]
            seeds = [seed + start + i for i in range(len(texts))]
            for n in steps:
                images = pipeline.generate(texts, seeds=seeds, steps=n, guidance=guidance, controls=hints)
                painted[f"{kind} {n}"].append(images.mul(255).round().byte().cpu())
    true = {CEILING: drawn.images.movedim(1, -1), STRAYED: drawn.strayed()}
    ceilings = {way: round_trip(pipeline, images) for way, images in true.items()}
    return {way: torch.cat(images) for way, images in painted.items()} | ceilings


def agreements(images: Tensor, drawn: Drawn) -> Tensor:
    """Of each image [n, h, w, 3] uint8: [n] in [0, 1]."""
    painted, true = judge.covered(images), drawn.covered > 0.5
    return (painted & true).sum((1, 2)) / (painted | true).sum((1, 2)).clamp(min=1)


def summary(painted: Painted, drawn: Drawn) -> dict:
    """The JSON document: both verdicts by kind and step count."""
    rows: dict[str, dict[str, float]] = {"agreement": {}, "names": {}}
    for way, images in painted.items():
        rows["agreement"][way] = round(agreements(images, drawn).mean().item(), 4)
        rows["names"][way] = round(judge.named_where_drawn(images, drawn.scenes).float().mean().item(), 4)
    return {**rows, "prompts": len(drawn), "world": "emoji"}


def table(result: dict) -> str:
    """The summary for people: a row for each way to paint, with its step count."""
    lines = [f"{'control, steps':16}{'agreement':>12}{'names':>12}"]
    lines += [f"{way:16}{result['agreement'][way]:>12.4f}{result['names'][way]:>12.4f}" for way in result["names"]]
    return "\n".join(lines)


def grid(painted: Painted, drawn: Drawn) -> Image.Image:
    """One row per prompt: drawings and what was painted; a red frame where a thing is another than the prompt's."""
    rows = range(min(GRID_ROWS, len(drawn)))
    shown = {kind: (drawn.drawings(kind)[: len(rows)], [True] * len(rows)) for kind in KINDS}
    for way, images in painted.items():
        images = images[: len(rows)]
        shown[way] = images, judge.named_where_drawn(images, drawn.scenes[: len(rows)]).tolist()
    return sheet(shown, [drawn.prompts[i].text for i in rows])
