"""One Layout per model part: how the published files name, shape and describe it."""

from ..part import Layout
from .autoencoder import AUTOENCODER
from .controlnet import CONTROLNET
from .text_encoder import TEXT_ENCODER
from .tiny_autoencoder import TINY_AUTOENCODER
from .transformer import TRANSFORMER

__all__ = ["AUTOENCODER", "CONTROLNET", "PARTS", "TEXT_ENCODER", "TINY_AUTOENCODER", "TRANSFORMER"]

# What a checkpoint may hold, by name. (A TAESANA comes in files of its own.)
PARTS: dict[str, Layout] = {part.name: part for part in (TRANSFORMER, AUTOENCODER, TEXT_ENCODER, CONTROLNET)}
