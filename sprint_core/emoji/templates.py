"""Thumbnails of every concept in every style, by which the judge knows things: small enough to lie beside the model.

They are made from the sprites (art.py) once; a user needs no sprites.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor

from .art import SPRITE_PX, STYLES, Art
from .concepts import concepts

FILE = Path(__file__).parents[1] / "demo" / "templates.webp"
CELLS = 16  # a side of a thumbnail
_CHUNK = 64


@dataclass(frozen=True)
class Templates:
    """thumbnails [s, c, 4, CELLS, CELLS]: RGBA in [0, 1], premultiplied; has [s, c]: which of them there are."""

    thumbnails: Tensor
    has: Tensor

    def to(self, device: torch.device | str) -> "Templates":
        return Templates(self.thumbnails.to(device), self.has.to(device))

    def art(self) -> Art:
        """Sprites as coarse as the thumbnails, from which scenes can be painted where the true ones are not at hand."""
        return CoarseArt(self.thumbnails, self.has)


class CoarseArt(Art):
    """Art whose sprites are thumbnails, enlarged when they are painted: all of them at once would take gigabytes."""

    def chosen(self, style: Tensor, concept: Tensor) -> Tensor:
        coarse = self.sprites[style, concept]
        return F.interpolate(coarse, (SPRITE_PX, SPRITE_PX), mode="bilinear").mul(255).round()


def world() -> str:
    """Tells concepts and styles of one world from another's."""
    described = json.dumps([[concept.label for concept in concepts()], STYLES])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def make(art: Art) -> Tensor:
    """Thumbnails [s, c, 4, CELLS, CELLS] of all art: uint8 RGBA, premultiplied."""
    styles, numbers = art.has.shape
    every = torch.cartesian_prod(torch.arange(styles), torch.arange(numbers))
    chunks = (art.chosen(*chunk.unbind(1)) for chunk in every.split(_CHUNK))
    small = [F.interpolate(c, (CELLS, CELLS), mode="bilinear", antialias=True).round().byte() for c in chunks]
    return torch.cat(small).unflatten(0, art.has.shape)


def save(path: Path, art: Art) -> None:
    """Write the thumbnails of all art: one lossless WebP, half as large as their bytes. Raises OSError."""
    exif = Image.Exif()
    exif[Base.ImageDescription] = world()
    sheet = make(art).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # a row of sprites for each style
    Image.fromarray(sheet.numpy()).save(path, "WEBP", exif=exif, lossless=True, exact=True, quality=100, method=6)


@functools.cache
def load(path: Path = FILE) -> Templates:
    """Read them. Raises OSError, ValueError for a damaged file or one of another world."""
    if not path.is_file():
        raise OSError(f"{path}: no such file")
    try:
        with Image.open(path, formats=["WEBP"]) as image:
            described, sheet = image.getexif().get(Base.ImageDescription), np.array(image.convert("RGBA"))
    except (OSError, ValueError, SyntaxError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's: the file may be whole
            raise
        raise ValueError(f"{path}: truncated or no WebP image ({error}); install the pack anew") from None
    if described != world() or sheet.shape[:2] != (CELLS * len(STYLES), CELLS * len(concepts())):
        raise ValueError(f"{path} holds thumbnails of other concepts; install the pack anew")
    thumbnails = torch.from_numpy(sheet).unflatten(1, (-1, CELLS)).unflatten(0, (-1, CELLS)).permute(0, 2, 4, 1, 3)
    return Templates(thumbnails.float().contiguous() / 255.0, thumbnails[:, :, 3].amax((-2, -1)) > 0)
