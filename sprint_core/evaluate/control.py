"""Does a ControlNet keep pictures to the edges of scenes, and do colours still follow the prompt?

held-out scene -> edges, soft or scribbled -> picture, with control and without -> judge
"""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from ..images import edges
from ..models.controlnet import SanaControlNet
from ..pipeline import Control, Pipeline
from ..shapes import examples, judge, scenes

BATCH = 25
GRID_ROWS, LABEL_PX = 8, 16
KINDS = ("soft", "scribble")
FREE = "without"  # control

Painted = dict[tuple[str, int], Tensor]  # (soft, scribble or without; steps) -> images [n, h, w, 3] uint8


def true_images(prompts: Sequence[examples.Prompt]) -> Tensor:
    """A true picture of each prompt: [n, h, w, 3] in [0, 1]."""
    return torch.from_numpy(scenes.render_batch([prompt.scene for prompt in prompts])).float() / 255.0


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
            some = prompts[start : start + BATCH]
            hints = [] if kind == FREE else [Control(net, control_images(some, kind).to(device))]
            given = {"seeds": [seed + start + i for i in range(len(some))], "guidance": guidance, "controls": hints}
            for n in steps:
                images = pipeline.generate([prompt.text for prompt in some], steps=n, **given)
                painted[kind, n].append(images.mul(255).round().byte().cpu())
    return {way: torch.cat(images) for way, images in painted.items()}


def control_images(prompts: Sequence[examples.Prompt], kind: str) -> Tensor:
    """Edges of the prompts' scenes: [n, h, w, 3] in [0, 1]."""
    return edges.detect(true_images(prompts), scribble=kind == "scribble")


def summary(painted: Painted, prompts: Sequence[examples.Prompt]) -> dict:
    """The JSON document: shares of pictures with the drawn shapes in their places, with the said colours, and right
    by the whole caption; None where no caption says a colour."""
    rows: dict[str, dict] = {"edges": {}, "colours": {}, "judge": {}}
    for (kind, n), images in painted.items():
        pictures, label = images.numpy(), f"{kind} {n}"
        colours = [judge.coloured(i, p.requirement, p.scene) for i, p in zip(pictures, prompts)]
        verdicts = {
            "edges": [judge.outlined(i, p.scene) for i, p in zip(pictures, prompts)],
            "colours": [right for right in colours if right is not None],
            "judge": [judge.judge(i, p.requirement) for i, p in zip(pictures, prompts)],
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
        right = [judge.outlined(i.numpy(), p.scene) for i, p in zip(images, shown)]
        columns[f"{kind}, {n} step{'s' * (n > 1)}"] = (images, right)
    return sheet(columns, [prompt.text for prompt in shown])


def sheet(columns: Mapping[str, tuple[Tensor, Sequence[bool]]], captions: Sequence[str]) -> Image.Image:
    """Pictures [n, h, w, 3], in [0, 1] or uint8, in named columns over their captions; red frames where not right."""
    px = next(iter(columns.values()))[0].shape[1] // 2
    paper = Image.new("RGB", (len(columns) * px, len(captions) * (px + LABEL_PX) + LABEL_PX), "white")
    draw = ImageDraw.Draw(paper)
    for x, (label, (images, right)) in enumerate(columns.items()):
        draw.text((x * px + 4, 2), label, fill="black")
        for y in range(len(captions)):
            image = images[y] if images.dtype == torch.uint8 else images[y].mul(255).round().byte()
            place = (x * px, LABEL_PX + y * (px + LABEL_PX))
            paper.paste(Image.fromarray(image.numpy()).resize((px, px), Image.Resampling.LANCZOS), place)
            if not right[y]:
                draw.rectangle((*place, place[0] + px - 1, place[1] + px - 1), outline="red", width=3)
    for y, caption in enumerate(captions):
        draw.text((4, (y + 1) * (px + LABEL_PX) + 2), caption, fill="black")
    return paper
