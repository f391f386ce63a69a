"""transformers' Gemma 2 at a configuration of ours, with weights that reach its soft caps."""

import torch
from torch import nn
from transformers import Gemma2Config

from sprint_core.models.gemma import GemmaConfig
from sprint_core.weights.layouts.text_encoder import HF_NAMES


def hf_config(config: GemmaConfig) -> Gemma2Config:
    values = {theirs: getattr(config, ours) for theirs, ours in HF_NAMES.items()}
    return Gemma2Config(**values, attn_implementation="eager")


def random_weights(model: nn.Module, seed: int = 0) -> None:
    """Queries and keys drawn wide, so that logits reach the cap of 50 where query_scale is small."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
        std = 0.3 if "norm" in name else 1.0 if "embed" in name else gain * p.shape[-1] ** -0.5
        p.data = std * torch.randn(p.shape, generator=generator)
