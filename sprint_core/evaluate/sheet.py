"""Sheets of images in named columns, for people to look at."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..shapes import examples, scenes

LABEL_PX = 16


def true_images(prompts: Sequence[examples.Prompt]) -> Tensor:
    """A true image of each prompt: [n, h, w, 3] in [0, 1]."""
    return torch.from_numpy(scenes.render_batch([prompt.scene for prompt in prompts])).float() / 255.0


def sheet(columns: Mapping[str, tuple[Tensor, Sequence[bool]]], captions: Sequence[str]) -> Image.Image:
    """Images [n, h, w, 3], in [0, 1] or uint8, in named columns over their captions; red frames where not right."""
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
