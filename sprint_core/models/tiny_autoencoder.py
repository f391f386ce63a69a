"""TAESANA: a decoder and encoder of a few million parameters for DC-AE's latents, for drafts and previews.

    github.com/madebyollin/taesd, F32Encoder and F32Decoder: plain 3x3 convolutions, 32 pixels to a latent cell

Its files hold one half each (taesana_encoder.pth, taesana_decoder.pth), as unnamed layers of a Sequential. It was
taught on scaled latents and pixels in [0, 1]; here it speaks as DC-AE does, raw latents and pixels in [-1, 1].
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..latent import DOWNSCALE, LATENT_CHANNELS, SCALE
from .tiling import TiledCodec

LATENT_LIMIT = 3.0  # the decoder bends latents smoothly into +-3
HALVES = ("encoder", "decoder")
ENCODER_CHANNELS, DECODER_CHANNELS = (64, 64, 64, 64), (256, 128, 64, 64, 64)


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Which halves there are."""

    halves: tuple[str, ...] = HALVES


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

    def __init__(
        self, config: TinyAutoencoderConfig = TinyAutoencoderConfig(), *, ops: Any = nn, dtype=None, device=None
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.config = config
        self.encoder = encoder(ops, **factory) if "encoder" in config.halves else None
        self.decoder = decoder(ops, **factory) if "decoder" in config.halves else None

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
