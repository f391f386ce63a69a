"""The networks that the checks share: full size with random weights made on the device, or tiny for a rehearsal."""

import dataclasses
import functools
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.networks import Ours, Words
from sprint_core.latent import SCALE
from sprint_core.models.autoencoder import Autoencoder
from sprint_core.models.autoencoder_config import AutoencoderConfig
from sprint_core.models.gemma import Gemma, GemmaConfig
from sprint_core.models.tiny_autoencoder import TinyAutoencoder
from sprint_core.models.transformer import TransformerConfig
from sprint_core.text.encoder import TextEncoder
from sprint_core.text.formats import text_preset

SMALL_TRANSFORMER = TransformerConfig(width=64, depth=8, cross_heads=2, caption_width=32)
SMALL_TEXT = GemmaConfig(vocab=1000, width=32, depth=2, heads=2, kv_heads=1, head_dim=32, ffn=64, query_scale=32)
SMALL_AUTOENCODER = AutoencoderConfig(
    encoder_channels=(8, 16, 16, 32, 32, 32),
    decoder_channels=(8, 16, 16, 32, 32, 32),
    encoder_layers=(1,) * 6,
    decoder_layers=(1,) * 6,
)
SMALL_PX, FULL_PX = 64, 1024


class Kept(Ours):
    """`Ours`, whose inputs are made once, so that a timed call holds nothing but the part."""

    def __init__(self, model: str, size_px: int, device: torch.device, dtype: torch.dtype | None):
        super().__init__(model, size_px, device, dtype)
        for name in ("inputs", "image", "latent"):
            setattr(self, name, functools.cache(getattr(self, name)))

    @functools.cached_property
    def drafts(self) -> TinyAutoencoder:
        """TAESANA."""
        torch.manual_seed(0)
        return TinyAutoencoder(dtype=self.dtype, device=self.device).eval().requires_grad_(False)

    def draft(self, seed: int) -> Tensor:
        return self.drafts.decode(self.latent(seed) / SCALE)

    def branch(self, seed: int) -> Tensor:
        """The ControlNet alone: its last residual."""
        return self.net(hint=self.kept_hint, **self.inputs(seed))[-1]

    def batch_inputs(self, count: int) -> dict[str, Tensor]:
        return {name: x.repeat(count, *[1] * (x.ndim - 1)) for name, x in self.inputs(1).items()}


class Small(Kept):
    """The same with networks of a few layers."""

    def __init__(self, model: str, size_px: int, device: torch.device, dtype: torch.dtype | None):
        super().__init__(model, size_px, device, dtype)
        self.preset = dataclasses.replace(self.preset, transformer=SMALL_TRANSFORMER, size_px=SMALL_PX)

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        return self._made("autoencoder", lambda **how: Autoencoder(SMALL_AUTOENCODER, **how))

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        gemma = self._made("text_encoder", lambda **how: Gemma(SMALL_TEXT, **how))
        return TextEncoder(gemma, Words(SMALL_TEXT.vocab), text_preset("diffusers"))


class World:
    """One device, and the models on it, each made when a section first needs it."""

    def __init__(self, device: torch.device, tiny: bool, pack: Path):
        self.device, self.tiny, self.pack = device, tiny, pack
        self.limit_sec = 0.0  # of the section that runs
        self.size_px = SMALL_PX if tiny else FULL_PX
        self.runs = 2 if tiny else 7

    @functools.cache  # noqa: B019  (one world a process)
    def ours(self, model: str) -> Kept:
        """'0.6B' or '1.6B' in bf16, of 1024x1024; in a rehearsal tiny ones in fp32."""
        kind = Small if self.tiny else Kept
        return kind(model, self.size_px, self.device, torch.float32 if self.tiny else torch.bfloat16)
