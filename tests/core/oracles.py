"""What the core tests compare with: diffusers' models at tiny configurations, and errors between tensors."""

from functools import cache

import standin
import torch
from diffusers import SanaTransformer2DModel

from sprint_core.models.transformer import SanaTransformer
from sprint_core.weights import keymaps, layouts
from sprint_core.weights.layouts.transformer import config_from_diffusers

QK = {"qk_norm": "rms_norm_across_heads"}
SPRINT = {**QK, "guidance_embeds": True, "guidance_embeds_scale": 0.1}
TEACHER = {**QK, "timestep_scale": 0.001}

# The settings in which the published config.json files differ, beyond width, depth and heads.
PUBLISHED = {
    "sprint-0.6B": SPRINT,
    "sprint-1.6B": SPRINT,
    "sprint-0.6B-teacher": TEACHER,
    "sprint-1.6B-teacher": TEACHER,
    "sana-0.6B": {},
    "sana-1.6B": {},
    "sana-0.6B-512": {"sample_size": 16},
    "sana-1.6B-512": {"sample_size": 16},
    "sana-1.6B-512-multiling": {"sample_size": 16},
    "sana-1.6B-multiling": {},
    "sana-1.6B-2K": {"interpolation_scale": 1.0, "sample_size": 64},
    "sana-1.6B-4K": {"interpolation_scale": 2.0, "sample_size": 128},
    "sana-1.5-1.6B": QK,
    "sana-1.5-4.8B": QK,
}
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 3,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 64,
    "caption_channels": 24,
}


@cache
def pair(name: str) -> tuple[SanaTransformer, SanaTransformer2DModel]:
    """Our transformer and diffusers' of a preset, at a tiny size, on the same random tensors. Copy before changing."""
    theirs = SanaTransformer2DModel(**TINY, **PUBLISHED[name]).eval().requires_grad_(False)
    theirs.load_state_dict(standin.random_model(theirs))
    ours = SanaTransformer(config_from_diffusers(dict(theirs.config)), device="meta")
    tensors = keymaps.to_native(theirs.state_dict(), layouts.transformer.DIFFUSERS)
    ours.load_state_dict(tensors, strict=True, assign=True)
    return ours.requires_grad_(False), theirs


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm()).item()


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
