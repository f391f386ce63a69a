"""How the published files hold TAESANA: one half each, under bare numbers, or both in one file.

taesana_encoder.pth, taesana_decoder.pth of github.com/madebyollin/taesd
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from ...latent import LATENT_CHANNELS
from ...models.tiny_autoencoder import (
    DECODER_CHANNELS,
    ENCODER_CHANNELS,
    HALVES,
    TinyAutoencoder,
    TinyAutoencoderConfig,
)
from ..keymaps import Naming
from ..part import Layout, Shapes
from ..tensorfile import WEIGHT_SUFFIXES

# The layer of each half whose name and shape no other family's files have.
FIRST_LAYERS = {
    "encoder": ("0.weight", (ENCODER_CHANNELS[0] // 2, 3, 3, 3)),
    "decoder": ("1.weight", (DECODER_CHANNELS[0], LATENT_CHANNELS, 3, 3)),
}
OTHER_HALF: dict[str, str] = dict(zip(HALVES, HALVES[::-1], strict=True))


def halves_in(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The halves of a TAESANA that a file holds, told by their first layers: {half: tensors under bare numbers}."""
    halves = {}
    for half, (first, shape) in FIRST_LAYERS.items():
        pattern = re.compile(rf"(?:vae\.|first_stage_model\.)?(?:taesana_|taesd_)?{half}\.(?:layers\.)?(\d.*)")
        named = {m[1]: tensor for name, tensor in tensors.items() if (m := pattern.fullmatch(name))}
        layers = named or {name: tensor for name, tensor in tensors.items() if re.match(r"\d", name)}
        if first in layers and tuple(layers[first].shape) == shape:
            halves[half] = layers
    return halves


def partner(path: Path) -> Path | None:
    """taesana_encoder.pth of taesana_decoder.pth, and the other way round, in any container, if it is there."""
    for half, other in OTHER_HALF.items():
        if half in path.name:
            stem = path.with_suffix("").name.replace(half, other)
            places = (path.with_name(stem + suffix) for suffix in (path.suffix, *WEIGHT_SUFFIXES))
            return next((place for place in places if place.is_file()), None)
    return None


def infer_config(shapes: Shapes) -> TinyAutoencoderConfig:
    """Which halves there are, of names under `encoder.` and `decoder.`."""
    return TinyAutoencoderConfig(tuple(half for half in HALVES if any(name.startswith(half + ".") for name in shapes)))


def _not_in_diffusers(_: Any) -> NoReturn:
    raise ValueError("diffusers has no TAESANA")


TINY_AUTOENCODER = Layout(
    name="tiny_autoencoder",
    title="a TAESANA",
    folder="",
    markers=tuple(f"{half}.{first}" for half, (first, _) in FIRST_LAYERS.items()),
    prefixes=("",),
    namings=(Naming(()),),
    diffusers_naming=_not_in_diffusers,
    config=TinyAutoencoderConfig,
    config_from_diffusers=_not_in_diffusers,
    config_to_diffusers=_not_in_diffusers,
    infer_config=infer_config,
    network=TinyAutoencoder,
)
