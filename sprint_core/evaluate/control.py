"""Does a ControlNet keep images to the edges of scenes, and do colours still follow the prompt?

held-out scene -> edges, soft or scribbled -> image, with control and without -> judge
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..images import edges
from ..models.controlnet import SanaControlNet
from ..pipeline import Control, Pipeline
from ..shapes import examples, judge
from .sheet import sheet, true_images

BATCH = 25
GRID_ROWS = 8
KINDS = ("soft", "scribble")
FREE = "without"  # control

Painted = dict[tuple[str, int], Tensor]  # (soft, scribble or without; steps) -> images [n, h, w, 3] uint8


def paint(
    pipeline: Pipeline,
    net: SanaControlNet,
    prompts: Sequence[examples.Prompt],
    steps: Sequence[int],
    seed: int,
    guidance: float,
) -> Painted:
    """Every prompt with the edges of its scene, and without; image i has seed `seed` + i."""
    device = next(net.parameters()).device
    painted: dict[tuple[str, int], list[Tensor]] = {(kind, n): [] for kind in (*KINDS, FREE) for n in steps}
    for kind in (*KINDS, FREE):
        for start in tqdm(range(0, len(prompts), BATCH), desc=kind, leave=False):
            batch = prompts[start : start + BATCH]
            hints = [] if kind == FREE else [Control(net, control_images(batch, kind).to(device))]
            seeds, texts = [seed + start + i for i in range(len(batch))], [prompt.text for prompt in batch]
            for n in steps:
                images = pipeline.generate(texts, seeds=seeds, steps=n, guidance=guidance, controls=hints)
                painted[kind, n].append(images.mul(255).round().byte().cpu())
    return {way: torch.cat(images) for way, images in painted.items()}


def control_images(prompts: Sequence[examples.Prompt], kind: str) -> Tensor:
    """Edges of the prompts' scenes: [n, h, w, 3] in [0, 1]."""
    return edges.detect(true_images(prompts), scribble=kind == "scribble")


def summary(painted: Painted, prompts: Sequence[examples.Prompt]) -> dict:
    """The JSON document: shares of images with the drawn shapes in their places, with the said colours, and right
    by the whole caption; None where no caption says a colour."""
    rows: dict[str, dict] = {"edges": {}, "colours": {}, "judge": {}}
    for (kind, n), images in painted.items():
        pairs, label = list(zip(images.numpy(), prompts, strict=True)), f"{kind} {n}"
        colours = [judge.coloured(i, p.requirement, p.scene) for i, p in pairs]
        verdicts = {
            "edges": [judge.outlined(i, p.scene) for i, p in pairs],
            "colours": [right for right in colours if right is not None],
            "judge": [judge.judge(i, p.requirement) for i, p in pairs],
        }
        for name, right in verdicts.items():
            rows[name][label] = round(sum(right) / len(right), 4) if right else None
    return {**rows, "prompts": len(prompts)}


def table(result: dict) -> str:
    """The summary for people: a row for each way to paint, with its step count."""
    lines = [f"{'control, steps':16}{'edges':>10}{'colours':>10}{'judge':>10}"]
    for label in result["edges"]:
        lines.append(f"{label:16}" + "".join(f"{result[name][label]!s:>10}" for name in ("edges", "colours", "judge")))
    return "\n".join(lines)


def grid(painted: Painted, prompts: Sequence[examples.Prompt]) -> Image.Image:
    """One row per prompt: edges and what was painted; a red frame where shapes or places are others."""
    shown = prompts[:GRID_ROWS]
    columns = {kind: (control_images(shown, kind), [True] * len(shown)) for kind in KINDS}
    for (kind, n), images in painted.items():
        right = [judge.outlined(i.numpy(), p.scene) for i, p in zip(images[: len(shown)], shown, strict=True)]
        columns[f"{kind}, {n} step{'s' * (n > 1)}"] = (images, right)
    return sheet(columns, [prompt.text for prompt in shown])
