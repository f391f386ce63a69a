"""The DC-AE and Gemma-2 of a run on the user's images: what encodes them once, and is released afterwards."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...images import sizes
from ...latent import SCALE
from ...models.autoencoder import Autoencoder
from ...text.encoder import LRUCache, TextEncoder
from ...text.loading import find_tokenizer, prompt_format
from ...weights import checkpoint, layouts
from ..dataset.batch import weights_fingerprint
from ..dataset.encoding import Encoders, encode_images
from ..dataset.latent_cache import LatentCache
from ..dataset.pairing import Item
from ..engine.processes import SINGLE_PROCESS, ProcessGroup
from ..stages.base import Embed


@dataclass(frozen=True)
class DataOptions:
    """How images and captions become what a run learns from: see ImageEncoders."""

    buckets: bool = True
    text_cache: bool = True


@dataclass(frozen=True)
class ImageEncoders:
    """Both networks, or without a DC-AE the one of prompts alone, and the size of the images that they encode.

    buckets: images become as large in the aspect ratios of the model's bins, rather than square. text_cache: captions
    are encoded once, too, rather than batch by batch.
    """

    autoencoder: Autoencoder | None
    text_encoder: TextEncoder
    size_px: int
    buckets: bool = True
    text_cache: bool = True

    @property
    def fingerprint(self) -> str:
        networks = filter(None, (self.autoencoder, self.text_encoder.gemma))
        options = ["buckets"] * self._bucketed + ["texts"] * (not self.text_cache)
        return " ".join([*map(weights_fingerprint, networks), str(self.size_px), *options])

    @property
    def embed(self) -> Embed | None:
        """What encodes the captions of a batch as those of a cache are, if they are encoded batch by batch."""
        if self.text_cache:
            return None
        encoder, device = self.text_encoder, next(self.text_encoder.gemma.parameters()).device
        encoder.cache.embeddings = LRUCache(0)  # no caption comes back for long

        def embed(captions: Sequence[str]) -> list[Tensor]:
            with torch.autocast(device.type, enabled=False):
                return [row.bfloat16() for row in encoder.encode(captions)]

        return embed

    @property
    def _bucketed(self) -> bool:
        return self.buckets and self.autoencoder is not None

    def encode(
        self,
        items: Iterable[Item],
        folder: Path,
        control: Callable[[Tensor, Tensor], Tensor] | None = None,
        control_fingerprint: str = "",
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> LatentCache:
        """As dataset/encoding.py. control: makes control images of images; its fingerprint: which ones."""
        image = None if self.autoencoder is None else self._encode_image
        among = sizes.bins(self.size_px) if self._bucketed else [(self.size_px, self.size_px)]
        encoders = Encoders(image, self.text_encoder.encode, among, control, keeps_texts=not self.text_cache)
        fingerprint = f"{self.fingerprint} {control_fingerprint}".strip()
        return encode_images(items, folder, encoders, fingerprint, processes)

    @torch.inference_mode()
    def _encode_image(self, images: Tensor) -> Tensor:
        assert self.autoencoder is not None
        first = next(self.autoencoder.parameters())
        return (self.autoencoder.encode(images.to(first.device, first.dtype)) * SCALE).float().cpu()


def dtype_on(device: torch.device) -> torch.dtype:
    """Of what encodes: bf16 on a GPU, fp32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_decoder(autoencoder: Path, device: torch.device) -> Autoencoder:
    """From its file, in bf16 on a GPU. Raises CheckpointError."""
    weights = checkpoint.load(autoencoder, layouts.AUTOENCODER)
    return checkpoint.build(weights, dtype=dtype_on(device), device=device)


def load_encoders(
    autoencoder: Path | None, text_encoder: Path, size_px: int, data: DataOptions, device: torch.device
) -> ImageEncoders:
    """From their files, in bf16 on a GPU. Raises CheckpointError."""
    dtype = dtype_on(device)
    vae = autoencoder and load_decoder(autoencoder, device)
    weights = checkpoint.load(text_encoder, layouts.TEXT_ENCODER)
    gemma = checkpoint.build(weights, dtype=dtype, device=device)
    encoder = TextEncoder(gemma, find_tokenizer(weights), prompt_format(weights))
    return ImageEncoders(vae, encoder, size_px, data.buckets, data.text_cache)
