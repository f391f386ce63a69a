"""How the published files hold TAESANA: one half each, or both in one file."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...latent import LATENT_CHANNELS
from ...models.tiny_autoencoder import DECODER_CHANNELS, ENCODER_CHANNELS, HALVES, TinyAutoencoder
from .. import tensorfile
from ..tensorfile import CheckpointError


@dataclass
class TinyWeights:
    """What one or two files hold: tensors under `encoder.` and `decoder.`."""

    tensors: dict[str, Tensor]
    path: Path

    @property
    def halves(self) -> tuple[str, ...]:
        return tuple(half for half in HALVES if any(name.startswith(half + ".") for name in self.tensors))

    def build(self) -> TinyAutoencoder:
        """The network in fp32 on the CPU, strictly loaded."""
        model = TinyAutoencoder(self.halves, dtype=torch.float32)
        model.load_state_dict(self.tensors, strict=True)
        return model.eval().requires_grad_(False)


def halves_in(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The halves of a TAESANA that a file holds, by the shapes of their first and last layers: {half: tensors}."""
    found = {}
    for half in HALVES:
        pattern = re.compile(rf"(?:vae\.|first_stage_model\.)?(?:taesana_|taesd_)?{half}\.(?:layers\.)?(\d.*)")
        named = {m[1]: tensor for name, tensor in tensors.items() if (m := pattern.fullmatch(name))}
        held = named or {name: tensor for name, tensor in tensors.items() if re.match(r"\d", name)}
        first, shape = {
            "encoder": ("0.weight", (ENCODER_CHANNELS[0] // 2, 3, 3, 3)),
            "decoder": ("1.weight", (DECODER_CHANNELS[0], LATENT_CHANNELS, 3, 3)),
        }[half]
        if first in held and tuple(held[first].shape) == shape:
            found[half] = held
    return found


def load(path: str | os.PathLike) -> TinyWeights | None:
    """A TAESANA from one of its two files, with the other if it lies beside it, or from one file with both.

    None if the file is something else. Raises CheckpointError if it is damaged or incomplete.
    """
    path = Path(path)
    if path.is_dir():
        return None
    found = halves_in(tensorfile.read(path).tensors)
    if not found:
        return None
    beside = partner(path)
    if len(found) == 1 and beside is not None:
        lacking = next(half for half in HALVES if half not in found)
        held = halves_in(tensorfile.read(beside).tensors)
        if lacking not in held:
            raise CheckpointError(f"{beside}: not a TAESANA {lacking}, which {path.name} goes with; download it again")
        found[lacking] = held[lacking]
    tensors = {f"{half}.{name}": tensor for half, held in found.items() for name, tensor in held.items()}
    weights = TinyWeights(tensors, path)
    expected = {k: tuple(v.shape) for k, v in TinyAutoencoder(weights.halves, device="meta").state_dict().items()}
    got = {k: tuple(v.shape) for k, v in tensors.items()}
    if wrong := sorted(k for k in expected.keys() | got.keys() if expected.get(k) != got.get(k)):
        raise CheckpointError(
            f"{path}: not a complete TAESANA; wrong tensors: {', '.join(wrong[:10])}; download it again"
        )
    return weights


def partner(path: Path) -> Path | None:
    """taesana_encoder.pth of taesana_decoder.pth, and the other way round, in any container, if it is there."""
    for half, other in (HALVES, HALVES[::-1]):
        if half in path.name:
            stem = path.with_suffix("").name.replace(half, other)
            places = (path.with_name(stem + suffix) for suffix in (path.suffix, *tensorfile.WEIGHT_SUFFIXES))
            return next((place for place in places if place.is_file()), None)
    return None
