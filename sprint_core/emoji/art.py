"""Sprites: the art of every concept in every style, trimmed, centred, premultiplied.

prepare      archives -> sprites.zip: lossless WebP files and the concepts, 40 MB that any machine can train from
load         sprites.zip -> Art
"""

import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .concepts import concepts

SPRITE_PX = 224
STYLES = ("3d", "flat")  # in the order of their numbers; the first is the usual one


@dataclass(frozen=True)
class Art:
    """sprites [s, c, 4, SPRITE_PX, SPRITE_PX]: uint8 RGBA, premultiplied; has [s, c]: which of them."""

    sprites: Tensor
    has: Tensor

    def to(self, device: torch.device) -> "Art":
        return replace(self, sprites=self.sprites.to(device), has=self.has.to(device))

    def chosen(self, style: Tensor, concept: Tensor) -> Tensor:
        """[n, 4, SPRITE_PX, SPRITE_PX] in [0, 255], of styles [n] and concepts [n]."""
        return self.sprites[style, concept].float()

    def resized(self, style: Tensor, concept: Tensor, size_px: int) -> Tensor:
        """The same at a size, [n, 4, size_px, size_px]."""
        chosen = self.chosen(style, concept)
        if size_px == SPRITE_PX:
            return chosen
        return F.interpolate(chosen, (size_px, size_px), mode="bilinear", antialias=True)


def load(path: Path) -> Art:
    """Read sprites.zip. Raises OSError, ValueError for one that is damaged or of other concepts."""
    try:
        with zipfile.ZipFile(path) as file:
            labels = json.loads(file.read("concepts.json"))
            names = [name for name in file.namelist() if name.endswith(".webp")]
            contents = [file.read(name) for name in names]
    except OSError:
        raise
    except Exception as error:  # on damaged input zlib and the module itself raise anything
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not sprites.zip, or damaged ({why}); prepare it anew") from None
    if labels != [concept.label for concept in concepts()]:
        raise ValueError(f"{path} holds sprites of other concepts; prepare it anew")
    # numpy's zeros take memory only where a sprite is written, torch's at once
    sprites = torch.from_numpy(np.zeros((len(STYLES), len(concepts()), 4, SPRITE_PX, SPRITE_PX), np.uint8))
    has = torch.zeros(len(STYLES), len(concepts()), dtype=torch.bool)

    def read(name: str, content: bytes) -> None:
        try:
            style, number = name.removesuffix(".webp").split("/")
            at = STYLES.index(style), range(len(concepts())).index(int(number))
            sprites[at] = torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGBA"))).movedim(-1, 0)
        except Exception:  # on damaged input Pillow's decoders raise anything
            raise ValueError(
                f"{path}: its {name} is no drawing of {SPRITE_PX} pixels of a known concept; prepare it anew"
            ) from None
        has[at] = True

    with ThreadPoolExecutor() as pool:
        list(pool.map(read, names, contents))
    return Art(sprites, has)
