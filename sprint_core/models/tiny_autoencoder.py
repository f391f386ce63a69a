"""TAESANA: a decoder and encoder of a few million parameters for DC-AE's latents, for drafts and previews.

    github.com/madebyollin/taesd, F32Encoder and F32Decoder: plain 3x3 convolutions, 32 pixels to a latent cell

Its files hold one half each (taesana_encoder.pth, taesana_decoder.pth), as unnamed layers of a Sequential. It was
taught on scaled latents and pixels in [0, 1]; here it speaks as DC-AE does, raw latents and pixels in [-1, 1].
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weights import tensorfile
from ..weights.tensorfile import CheckpointError
from .autoencoder_config import DOWNSCALE, SCALE
from .tiling import TiledCodec
from .transformer import LATENT_CHANNELS

LATENT_LIMIT = 3.0  # the decoder bends latents smoothly into +-3
HALVES = ("encoder", "decoder")
ENCODER_CHANNELS, DECODER_CHANNELS = (64, 64, 64, 64), (256, 128, 64, 64, 64)


class Bend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / LATENT_LIMIT) * LATENT_LIMIT


class Block(nn.Module):
    """Three convolutions around a skip; both widths are equal."""

    def __init__(self, channels: int, ops, **kw):
        super().__init__()
        convs = [ops.Conv2d(channels, channels, 3, padding=1, **kw) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def encoder(ops=nn, **kw) -> nn.Sequential:
    """[b, 3, h, w] in [0, 1] -> scaled latents. The layers' order is their names."""
    first, *rest = ENCODER_CHANNELS
    layers = [
        ops.Conv2d(3, first // 2, 3, stride=2, padding=1, **kw),
        nn.ReLU(),
        ops.Conv2d(first // 2, first, 3, stride=2, padding=1, **kw),
        nn.ReLU(),
        Block(first, ops, **kw),
    ]
    for c in rest:
        layers += [ops.Conv2d(c, c, 3, stride=2, padding=1, bias=False, **kw), *(Block(c, ops, **kw) for _ in range(3))]
    return nn.Sequential(*layers, ops.Conv2d(rest[-1], LATENT_CHANNELS, 3, padding=1, **kw))


def decoder(ops=nn, **kw) -> nn.Sequential:
    """Scaled latents -> [b, 3, 32h, 32w] in [0, 1], a little beyond at times."""
    c = DECODER_CHANNELS[0]
    layers = [Bend(), ops.Conv2d(LATENT_CHANNELS, c, 3, padding=1, **kw), nn.ReLU()]
    for c, after in zip(DECODER_CHANNELS, (*DECODER_CHANNELS[1:], DECODER_CHANNELS[-1])):
        layers += [Block(c, ops, **kw) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), ops.Conv2d(c, after, 3, padding=1, bias=False, **kw)]
    return nn.Sequential(*layers, Block(after, ops, **kw), ops.Conv2d(after, 3, 3, padding=1, **kw))


class TinyAutoencoder(TiledCodec):
    """One half or both, in DC-AE's own terms. Raises ValueError where a half is missing, and as DC-AE does."""

    image_channels, latent_channels, cell_px = 3, LATENT_CHANNELS, DOWNSCALE

    def __init__(self, halves: tuple[str, ...] = HALVES, ops=nn, dtype=None, device=None):
        super().__init__()
        kw = {"dtype": dtype, "device": device}
        self.encoder = encoder(ops, **kw) if "encoder" in halves else None
        self.decoder = decoder(ops, **kw) if "decoder" in halves else None

    def encode(self, image: Tensor) -> Tensor:
        """[b, 3, h, w] in [-1, 1] -> raw latents [b, 32, h/32, w/32]."""
        if self.encoder is None:
            raise ValueError("this TAESANA has no encoder: put taesana_encoder.pth beside it")
        self.check_image(image)
        return self.encoder((image + 1) / 2) / SCALE

    def decode(self, latent: Tensor) -> Tensor:
        """Raw latents [b, 32, h, w] -> [b, 3, 32h, 32w], about [-1, 1]."""
        if self.decoder is None:
            raise ValueError("this TAESANA has no decoder: put taesana_decoder.pth beside it")
        self.check_latent(latent)
        return self.decoder(latent * SCALE) * 2 - 1


# --- files --------------------------------------------------------------------------------------------


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
