"""SANA's linear diffusion transformer (arXiv 2410.10629, with SANA-Sprint's changes, 2503.09641).

One class for every published variant: what differs is in `TransformerConfig`. The network is a flow
model: it takes x_s and the flow time s in [0, 1] and returns the velocity v; trigflow.py says what
that has to do with TrigFlow. Modules are named like diffusers' SanaTransformer2DModel, so that its
LoRA files apply; the one difference is `scale_shift_table.weight` (see layers.table_rows).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import Count, CountOrZero, Depth, Number, PositiveNumber, Range, check_fields
from ..devices import fp32
from ..latent import LATENT_CHANNELS
from .layers import (
    MASKED,
    MLP,
    GLUMBConv,
    by_rows,
    relu_linear_attention,
    sdpa,
    sincos_2d,
    table_rows,
    timestep_embedding,
)

SELF_HEAD_DIM = 32  # of the linear attention, in every variant
BLOCK_EPS = 1e-6  # of the layer norms without weights
QK_EPS, CROSS_QK_EPS = 1e-5, 1e-6  # the authors' values; diffusers has 1e-5 for both
CAPTION_EPS = 1e-5

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class TransformerConfig:
    """What tells the published variants apart; presets.py has a row for each."""

    width: Count = 2240
    depth: Depth = 20
    cross_heads: Count = 20
    caption_width: Count = 2304
    mlp_ratio: Annotated[float, Range(0, 100, above=True)] = 2.5
    qk_norm: bool = True
    guidance_embed: bool = True
    guidance_scale: Number = 0.1  # the guidance is embedded as 0.1 * w
    time_scale: PositiveNumber = 1.0  # the network embeds time_scale * s: 1 (Sprint and its teachers) or 1000
    pos_embed_base: CountOrZero = 0  # latent size the 2K and 4K models number their positions for; 0: none
    pos_embed_scale: PositiveNumber = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        for what, divisor in (("channels a head", SELF_HEAD_DIM), ("cross_heads", self.cross_heads)):
            if self.width % divisor:
                raise ValueError(f"{type(self).__name__}.width is {self.width}, no multiple of {divisor} {what}")


@dataclass(frozen=True)
class Conditions:
    """What every block of one forward pass is given."""

    caption: Tensor  # [b, m, c]
    modulation: Tensor  # [b, 6, c], of time and guidance
    emb: Tensor  # [b, 1, c], the same for the last layer
    size: tuple[int, int]  # (h, w) of the latent
    bias: Tensor | None  # additive mask of the caption
    attention: Attention


class LinearSelfAttention(nn.Module):
    """ReLU linear attention over image tokens: [b, n, c] -> [b, n, c]."""

    def __init__(self, config: TransformerConfig, ops: Any = nn, **factory: Any):
        super().__init__()
        dim = config.width
        self.heads = dim // SELF_HEAD_DIM
        self.to_q = ops.Linear(dim, dim, bias=False, **factory)
        self.to_k = ops.Linear(dim, dim, bias=False, **factory)
        self.to_v = ops.Linear(dim, dim, bias=False, **factory)
        self.norm_q = ops.RMSNorm(dim, eps=QK_EPS, **factory) if config.qk_norm else nn.Identity()
        self.norm_k = ops.RMSNorm(dim, eps=QK_EPS, **factory) if config.qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([ops.Linear(dim, dim, **factory)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = by_rows(self.norm_q, self.to_q(x)), by_rows(self.norm_k, self.to_k(x)), self.to_v(x)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (q, k, v))
        return self.to_out[0](relu_linear_attention(q, k, v))


class CrossAttention(nn.Module):
    """Softmax attention from image tokens [b, n, c] to caption tokens [b, m, c]."""

    def __init__(self, config: TransformerConfig, ops: Any = nn, **factory: Any):
        super().__init__()
        dim = config.width
        self.heads = config.cross_heads
        self.to_q = ops.Linear(dim, dim, **factory)
        self.to_k = ops.Linear(dim, dim, **factory)
        self.to_v = ops.Linear(dim, dim, **factory)
        self.norm_q = ops.RMSNorm(dim, eps=CROSS_QK_EPS, **factory) if config.qk_norm else nn.Identity()
        self.norm_k = ops.RMSNorm(dim, eps=CROSS_QK_EPS, **factory) if config.qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([ops.Linear(dim, dim, **factory)])

    def forward(self, x: Tensor, caption: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        q, k, v = by_rows(self.norm_q, self.to_q(x)), self.norm_k(self.to_k(caption)), self.to_v(caption)
        return self.to_out[0](attention(q, k, v, self.heads, mask))


class SanaBlock(nn.Module):
    """Linear self-attention, cross-attention, Mix-FFN; the first and last modulated by the time."""

    def __init__(self, config: TransformerConfig, ops: Any = nn, **factory: Any):
        super().__init__()
        self.attn1 = LinearSelfAttention(config, ops, **factory)
        self.attn2 = CrossAttention(config, ops, **factory)
        self.ff = GLUMBConv(config.width, config.mlp_ratio, ops, **factory)
        self.scale_shift_table = ops.Embedding(6, config.width, **factory)

    def forward(self, x: Tensor, caption: Tensor, given: Conditions) -> Tensor:
        """x: [b, h*w, c]; caption: [b, m, c], which a host may have replaced -> [b, h*w, c]."""
        m = table_rows(self.scale_shift_table, 6, x) + given.modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, dim=1)
        x = torch.addcmul(x, gate1, self.attn1(modulated_norm(x, shift1, scale1)))
        x = x + self.attn2(x, caption, given.bias, given.attention)
        h = rearrange(modulated_norm(x, shift2, scale2), "b (h w) c -> b c h w", h=given.size[0])
        return torch.addcmul(x, gate2, rearrange(self.ff(h), "b c h w -> b (h w) c"))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then an affine map that the time embedding chose."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=BLOCK_EPS), 1 + scale)


class TimeEmbed(nn.Module):
    """Embeds the time and, for distilled models, the guidance; projects to the blocks' modulation."""

    def __init__(self, config: TransformerConfig, ops: Any = nn, **factory: Any):
        super().__init__()
        self.config = config
        self.timestep_embedder = MLP(256, config.width, nn.SiLU(), ops, **factory)
        if config.guidance_embed:
            self.guidance_embedder = MLP(256, config.width, nn.SiLU(), ops, **factory)
        self.linear = ops.Linear(config.width, 6 * config.width, **factory)

    def forward(self, s: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """s, guidance: [b] -> block modulation [b, 6, c], embedding [b, 1, c] for the last layer."""
        emb = self.timestep_embedder(timestep_embedding(fp32(s) * self.config.time_scale).to(dtype))
        if self.config.guidance_embed:
            features = timestep_embedding(fp32(guidance) * self.config.guidance_scale)
            emb = emb + self.guidance_embedder(features.to(dtype))
        return rearrange(self.linear(F.silu(emb)), "b (six c) -> b six c", six=6), emb[:, None]


class PatchEmbed(nn.Module):
    """One token per latent pixel: [b, 32, h, w] -> [b, h*w, c]."""

    def __init__(self, config: TransformerConfig, ops: Any = nn, **factory: Any):
        super().__init__()
        self.base, self.scale, self.width = config.pos_embed_base, config.pos_embed_scale, config.width
        self.proj = ops.Conv2d(LATENT_CHANNELS, config.width, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        # Contiguous, since every later sum takes over the strides of its first term.
        tokens = rearrange(self.proj(x), "b c h w -> b (h w) c").contiguous()
        if self.base:
            tokens = tokens + sincos_2d(height, width, self.width, self.base, self.scale, x.device).to(tokens.dtype)
        return tokens


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Attention mask [b, m], 1 = keep, as the additive [b, 1, 1, m] that attention functions take."""
    return None if mask is None else (1 - mask.to(dtype))[:, None, None] * MASKED


class SanaInputs(nn.Module):
    """What comes before the blocks, in the trunk and in its ControlNets: embeds latents, time and caption.

    Raises ValueError from conditions() when guidance is missing or the latent has not 32 channels.
    """

    def __init__(self, config: TransformerConfig, ops: Any = nn, **factory: Any):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, ops, **factory)
        self.time_embed = TimeEmbed(config, ops, **factory)
        self.caption_projection = MLP(config.caption_width, config.width, nn.GELU("tanh"), ops, **factory)
        self.caption_norm = ops.RMSNorm(config.width, eps=CAPTION_EPS, **factory)

    def conditions(
        self,
        x_s: Tensor,
        s: Tensor,
        caption: Tensor,
        guidance: Tensor | None,
        mask: Tensor | None,
        attention: Attention,
    ) -> Conditions:
        """As forward() takes them -> what the blocks are given."""
        if x_s.shape[1] != LATENT_CHANNELS:
            raise ValueError(f"SANA's latent has {LATENT_CHANNELS} channels, this one {x_s.shape[1]}")
        if self.config.guidance_embed and guidance is None:
            raise ValueError("this model embeds the guidance scale: pass guidance (4.5 is its default)")
        modulation, emb = self.time_embed(s, guidance, x_s.dtype)
        caption = self.caption_norm(self.caption_projection(caption))
        bias = additive_mask(mask, x_s.dtype)
        return Conditions(caption, modulation, emb, tuple(x_s.shape[-2:]), bias, attention)


class SanaTransformer(SanaInputs):
    """The whole network. `ops`, dtype and device are those of every parameter."""

    def __init__(self, config: TransformerConfig, *, ops: Any = nn, dtype=None, device=None):
        factory = {"dtype": dtype, "device": device}
        super().__init__(config, ops, **factory)
        self.transformer_blocks = nn.ModuleList(SanaBlock(config, ops, **factory) for _ in range(config.depth))
        self.scale_shift_table = ops.Embedding(2, config.width, **factory)
        self.proj_out = ops.Linear(config.width, LATENT_CHANNELS, **factory)

    def forward(
        self,
        x_s: Tensor,
        s: Tensor,
        caption: Tensor,
        guidance: Tensor | None = None,
        mask: Tensor | None = None,
        control: Sequence[Tensor | None] = (),
        attention: Attention = sdpa,
        around_block: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Flow velocity v at (x_s, s).

        x_s: [b, 32, h, w], scaled latent; s: [b] in [0, 1]; caption: [b, m, caption_width];
        guidance: [b], only for models that embed it; mask: [b, m], 1 = keep; control: residuals
        [b or 1, h*w, c], entry i is added after block i; attention(q, k, v, heads, mask) serves the
        cross-attention; around_block(i, run, x, caption) may wrap block i: run(x, caption) runs it.
        """
        given = self.conditions(x_s, s, caption, guidance, mask, attention)
        x = self.patch_embed(x_s)
        for i, block in enumerate(self.transformer_blocks):

            def run(x: Tensor, caption: Tensor, block=block) -> Tensor:
                return block(x, caption, given)

            x = run(x, given.caption) if around_block is None else around_block(i, run, x, given.caption)
            if i < len(control) and control[i] is not None:
                x = x + control[i].to(x.dtype)

        shift, scale = (table_rows(self.scale_shift_table, 2, x) + given.emb).chunk(2, dim=1)
        x = self.proj_out(modulated_norm(x, shift, scale))
        return rearrange(x, "b (h w) c -> b c h w", h=given.size[0])
