"""Paint prompts that nobody chose by the bundled model, for the README and the benchmarks: assets/bundled*.jpg.

    python run.py python tools/make_samples.py

Prompts follow from a seed: 24 bare names ("pizza", "a cat"), and 64 held-out prompts of all kinds.
Image i has seed i. Not a test: run it when the bundled model changes, and look at the images.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT)]

from sprint_core.emoji import captions  # noqa: E402
from sprint_core.emoji.concepts import learnt  # noqa: E402
from sprint_core.evaluate.emoji import short_prompts  # noqa: E402
from sprint_core.pipeline import Pipeline  # noqa: E402
from sprint_core.weights import checkpoint, layouts, presets  # noqa: E402

SEED, STEPS, BATCH, QUALITY = 2026, 2, 8, 88
TILE_PX, GAP_PX, LINE_PX, LINES, LETTERS = 160, 8, 14, 3, 26  # LETTERS: in one line below an image
INK, PAPER = (60, 62, 70), (255, 255, 255)


def wrapped(text: str) -> list[str]:
    """In lines of LETTERS letters, if no word is longer."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= LETTERS and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def sheet(images: torch.Tensor, texts: Sequence[str], columns: int) -> Image.Image:
    """Images [b, h, w, 3] in [0, 1], each above its prompt."""
    height = TILE_PX + LINES * LINE_PX + GAP_PX
    rows = -(-len(texts) // columns)
    page = Image.new("RGB", (columns * (TILE_PX + GAP_PX) - GAP_PX, rows * height), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for i, (image, text) in enumerate(zip(images.mul(255).round().byte().numpy(), texts, strict=True)):
        x, y = i % columns * (TILE_PX + GAP_PX), i // columns * height
        page.paste(Image.fromarray(image).resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS), (x, y))
        for line, words in enumerate(wrapped(text)[:LINES]):
            pen.text((x, y + TILE_PX + 2 + line * LINE_PX), words, INK, font)
    return page


def paint(pipeline: Pipeline, texts: Sequence[str]) -> torch.Tensor:
    seeds = range(len(texts))
    parts = [slice(i, i + BATCH) for i in range(0, len(texts), BATCH)]
    return torch.cat([pipeline.generate(texts[part], seeds=list(seeds[part]), steps=STEPS) for part in parts])


def main() -> None:
    pipeline = Pipeline.load(presets.BUNDLED, dtype=torch.float32)
    among = learnt(checkpoint.load(presets.BUNDLED, layouts.TRANSFORMER).settings)
    pages = {"bundled": (short_prompts(24, SEED, among), 6), "bundled_64": (captions.prompts(64, SEED, among=among), 8)}
    for name, (prompts, columns) in pages.items():
        texts = [prompt.text for prompt in prompts]
        sheet(paint(pipeline, texts), texts, columns).save(ROOT / "assets" / f"{name}.jpg", quality=QUALITY)


if __name__ == "__main__":
    main()
