"""Thumbnails of every concept in every style, by which the judge knows things: small enough to lie beside the model.

They are made from the sprites (art.py) once; a user needs no sprites.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .art import SPRITE_PX, STYLES, Art
from .concepts import concepts

FILE = Path(__file__).parents[1] / "demo" / "templates.safetensors"
CELLS = 16  # a side of a thumbnail
_NAME, _HAS, _WORLD = "thumbnails", "has", "world"
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


def contents(art: Art) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file for these sprites, as weights/tensorfile.write takes them."""
    return {_NAME: make(art), _HAS: art.has}, {_WORLD: world()}


@functools.cache
def load(path: Path = FILE) -> Templates:
    """Read them. Raises OSError, ValueError for a damaged file or one of another world."""
    if not path.is_file():
        raise OSError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(_WORLD) != world():
                raise ValueError(f"{path} holds thumbnails of other concepts; make it anew")
            thumbnails, has = file.get_tensor(_NAME), file.get_tensor(_HAS)
        expected = len(STYLES), len(concepts())
        if has.shape != expected or thumbnails.shape != (*expected, 4, CELLS, CELLS):
            raise ValueError(
                f"{path}: thumbnails of shape {list(thumbnails.shape)}, known by {list(has.shape)}, where "
                f"{[*expected, 4, CELLS, CELLS]} and {list(expected)} are needed; make it anew"
            )
        return Templates(thumbnails.float() / 255.0, has)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error}); make it anew") from None
