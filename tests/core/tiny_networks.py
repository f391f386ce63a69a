"""Every network in a size for tests, with random weights, and its files."""

import dataclasses
from pathlib import Path

import safetensors.torch
import standin
import torch

from sprint_core.models.autoencoder import Autoencoder
from sprint_core.models.controlnet import ControlNetConfig, SanaControlNet
from sprint_core.models.gemma import Gemma, GemmaConfig
from sprint_core.models.transformer import SanaTransformer, TransformerConfig
from sprint_core.weights import keymaps, layouts

SPRINT = standin.TRANSFORMER
TEACHER = dataclasses.replace(SPRINT, guidance_embed=False)
SANA15 = dataclasses.replace(TEACHER, time_scale=1000.0)
SANA10 = dataclasses.replace(SANA15, qk_norm=False)
GEMMA = GemmaConfig(vocab=320, width=64, depth=2, heads=2, kv_heads=1, head_dim=256, ffn=128)  # shapes tell all of it
CONTROL = ControlNetConfig(width=64, depth=2, cross_heads=2, caption_width=64)
MODELS = {
    "transformer": SanaTransformer(SPRINT, device="meta"),
    "autoencoder": Autoencoder(standin.AUTOENCODER, device="meta"),
    "text_encoder": Gemma(GEMMA, device="meta"),
    "controlnet": SanaControlNet(CONTROL, device="meta"),
}
NATIVE = {kind: standin.random_model(model) for kind, model in MODELS.items()}


def native(config: TransformerConfig) -> dict[str, torch.Tensor]:
    return standin.random_model(SanaTransformer(config, device="meta"))


def nvlabs(config: TransformerConfig = SPRINT, positions: int = 0) -> dict[str, torch.Tensor]:
    """The authors' names, with the tensors that only their training needs."""
    extras = {"y_embedder.y_embedding": torch.zeros(300, 64), "logvar_linear.weight": torch.zeros(1, 64)}
    extras |= {"logvar_linear.bias": torch.zeros(1)}
    if positions:
        extras["pos_embed"] = torch.zeros(1, positions, 4)
    return keymaps.from_native(native(config), layouts.transformer.NVLABS) | extras


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> Path:
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path
