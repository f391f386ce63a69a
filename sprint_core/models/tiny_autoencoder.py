"""TAESANA: a decoder and encoder of a few million parameters for DC-AE's latents, for drafts and previews.

    github.com/madebyollin/taesd, F32Encoder and F32Decoder: plain 3x3 convolutions, 32 pixels to a latent cell

Its files hold one half each (taesana_encoder.pth, taesana_decoder.pth), as unnamed layers of a Sequential. It was
trained on scaled latents and images in [0, 1]; `TinyAutoencoder` takes and returns what DC-AE does, raw latents and
images in [-1, 1]. Both halves run in the memory format channels_last, in which convolutions are faster, on a CPU.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_fields
from ..latent import DOWNSCALE, LATENT_CHANNELS, SCALE
from .tiling import TiledCodec

Half = Literal["encoder", "decoder"]

LATENT_LIMIT = 3.0  # the decoder limits scaled latents smoothly to +-3
HALVES: tuple[Half, ...] = ("encoder", "decoder")
ENCODER_CHANNELS = (64, 64, 64, 64)
DECODER_CHANNELS = (256, 128, 64, 64, 64)


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Which halves there are. Raises ValueError on others."""

    halves: tuple[Half, ...] = HALVES

    def __post_init__(self) -> None:
        check_fields(self)


BOTH_HALVES = TinyAutoencoderConfig()


class SoftClamp(nn.Module):
    """Latents of any shape, limited smoothly to +-LATENT_LIMIT."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / LATENT_LIMIT) * LATENT_LIMIT


class Block(nn.Module):
    """relu(x + three convolutions of x), [b, channels, h, w]."""

    def __init__(self, channels: int, ops: Any, **kw: Any):
        super().__init__()
        convs = [ops.Conv2d(channels, channels, 3, padding=1, **kw) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def encoder(ops: Any = nn, **kw: Any) -> nn.Sequential:
    """Images [b, 3, h, w] in [0, 1] -> scaled latents [b, 32, h/32, w/32]. The layers' order gives their names."""
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


def decoder(ops: Any = nn, **kw: Any) -> nn.Sequential:
    """Scaled latents [b, 32, h, w] -> images [b, 3, 32h, 32w], which may exceed [0, 1] a little."""
    first, last = DECODER_CHANNELS[0], DECODER_CHANNELS[-1]
    layers = [SoftClamp(), ops.Conv2d(LATENT_CHANNELS, first, 3, padding=1, **kw), nn.ReLU()]
    for c, after in itertools.pairwise((*DECODER_CHANNELS, last)):
        layers += [Block(c, ops, **kw) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), ops.Conv2d(c, after, 3, padding=1, bias=False, **kw)]
    return nn.Sequential(*layers, Block(last, ops, **kw), ops.Conv2d(last, 3, 3, padding=1, **kw))


class TinyAutoencoder(TiledCodec):
    """One half or both, called as DC-AE is. Raises ValueError where a half is missing, and as DC-AE does."""

    image_channels = 3
    latent_channels = LATENT_CHANNELS
    cell_px = DOWNSCALE

    def __init__(
        self,
        config: TinyAutoencoderConfig = BOTH_HALVES,
        *,
        ops: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.config = config
        self.encoder = encoder(ops, **factory) if "encoder" in config.halves else None
        self.decoder = decoder(ops, **factory) if "decoder" in config.halves else None

    def encode(self, image: Tensor) -> Tensor:
        """Images [b, 3, h, w] in [-1, 1] -> raw latents [b, 32, h/32, w/32]. Raises ValueError."""
        if self.encoder is None:
            raise ValueError("this TAESANA has no encoder: put taesana_encoder.pth beside it")
        self.check_image(image)
        return self.encoder((image.contiguous(memory_format=torch.channels_last) + 1) / 2) / SCALE

    def decode(self, latent: Tensor) -> Tensor:
        """Raw latents [b, 32, h, w] -> images [b, 3, 32h, 32w], about [-1, 1]. Raises ValueError."""
        if self.decoder is None:
            raise ValueError("this TAESANA has no decoder: put taesana_decoder.pth beside it")
        self.check_latent(latent)
        return self.decoder(latent.contiguous(memory_format=torch.channels_last) * SCALE) * 2 - 1
