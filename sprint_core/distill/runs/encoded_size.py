"""How much of a disk the encoded images and captions of a run take, by part, before they are encoded."""

import operator
from dataclasses import dataclass
from pathlib import Path

from ...batch import rows
from ...latent import DOWNSCALE, LATENT_CHANNELS
from ...weights import checkpoint, presets
from ..dataset.captioned import captioned
from ..recipes import Recipe
from .estimate import CAPTION_TOKENS, GIB
from .published import NO_MORE, PROMPTS

MIB, KIB = 2**20, 2**10
BYTES = 2  # fp16 latents, bf16 embeddings


@dataclass(frozen=True)
class EncodedSize:
    """Bytes of one image at most, by part: bins have no more pixels than the square. count: of images; 0: not known."""

    parts: dict[str, int]
    count: int = 0

    def text(self) -> str:
        """For people."""
        parts = ", ".join(f"{name} {_size(number)}" for name, number in self.parts.items())
        together = f"; {self.count} images: {_size(self.count * sum(self.parts.values()))}" if self.count else ""
        return f"disk, at most: for an image {parts}{together}"


def _size(number: int) -> str:
    """For people: '64 KiB', '1.3 MiB'."""
    unit, name = next(((unit, name) for unit, name in ((GIB, "GiB"), (MIB, "MiB")) if number >= unit), (KIB, "KiB"))
    return f"{number / unit:.3g} {name}"


def of_recipe(
    recipe: Recipe, data: Path | None, text_cache: bool, trunk: checkpoint.Weights | None = None
) -> EncodedSize:
    """Of images or prompts at `data`, if that is known. Raises ValueError, OSError where they cannot be read."""
    preset = presets.PRESETS[recipe.preset]
    size_px = preset.size_px if trunk is None else trunk.settings["size_px"]
    width = (preset.transformer if trunk is None else trunk.config).caption_width
    latent = BYTES * LATENT_CHANNELS * (size_px // DOWNSCALE) ** 2
    prompts = data is not None and data.suffix.lower() in PROMPTS
    parts = {} if prompts else {"latents": latent} | ({"hints": latent} if recipe.is_control else {})
    parts["text cache"] = BYTES * CAPTION_TOKENS * width if text_cache else 0
    if data is None:
        return EncodedSize(parts)
    count = sum(1 for _ in rows.read(data, NO_MORE)) if prompts else operator.length_hint(captioned(data))
    return EncodedSize(parts, count)
