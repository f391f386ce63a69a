"""SANA's linear diffusion transformer (arXiv 2410.10629, with SANA-Sprint's changes, 2503.09641).

One class for every published variant: what differs is in `TransformerConfig`. The network is a flow
model: it takes x_s and the flow time s in [0, 1] and returns the velocity v; trigflow.py relates
both to TrigFlow. Modules are named like diffusers' SanaTransformer2DModel, so that its LoRA files
apply; the one difference is `scale_shift_table.weight` (see layers.table_rows).
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
from ..kernels import fused
from ..latent import LATENT_CHANNELS
from .layers import (
    MASKED,
    MLP,
    Attention,
    GLUMBConv,
    relu_linear_attention,
    rms_norm,
    sdpa,
    sincos_2d,
    sincos_axis,
    table_rows,
    timestep_embedding,
    uses_its_weight,
    works_in_blocks,
)

SELF_HEAD_DIM = 32  # of the linear attention, in every variant
BLOCK_EPS = 1e-6  # of the layer norms without weights
QK_EPS = 1e-5
CROSS_QK_EPS = 1e-6  # the authors' value; diffusers has 1e-5
CAPTION_EPS = 1e-5

RunBlock = Callable[[Tensor, Tensor], Tensor]  # (x [b, n, c], caption [b, m, c]) -> [b, n, c]
AroundBlock = Callable[[int, RunBlock, Tensor, Tensor], Tensor]  # (index, run, x, caption) -> [b, n, c]


@dataclass(frozen=True)
class TransformerConfig:
    """What tells the published variants apart; weights/presets.py has a row for each.

    Raises ValueError on fields that describe no SANA.
    """

    width: Count = 2240
    depth: Depth = 20
    cross_heads: Count = 20
    caption_width: Count = 2304
    mlp_ratio: Annotated[float, Range(0, 100, above=True)] = 2.5
    qk_norm: bool = True
    guidance_embed: bool = True
    guidance_scale: Number = 0.1  # the guidance is embedded as 0.1 * w
    time_scale: PositiveNumber = 1.0  # the network embeds time_scale * s: 1 (Sprint and its teachers) or 1000
    pos_embed_base: CountOrZero = 0  # latent size that the 2K and 4K models number positions for; 0: no positions
    pos_embed_scale: PositiveNumber = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        for what, divisor in (("channels a head", SELF_HEAD_DIM), ("cross_heads", self.cross_heads)):
            if self.width % divisor:
                raise ValueError(f"{type(self).__name__}.width is {self.width}, no multiple of {divisor} {what}")


@dataclass(frozen=True)
class Conditioning:
    """What every block of one forward pass reads beside the image tokens."""

    caption: Tensor  # [b, m, c], projected to the width
    modulation: Tensor  # [b, 6, c], shifts, scales and gates from time and guidance
    embedding: Tensor  # [b, 1, c], of time and guidance, for the last layer
    size: tuple[int, int]  # (h, w) of the latent
    mask: Tensor | None  # [b, 1, 1, m], additive, of the caption
    attention: Attention  # of the cross-attention


def qk_norms(norm_q: Any, norm_k: Any, q: Tensor, k: Tensor, rounds: bool = True) -> tuple[Tensor, Tensor]:
    """Of queries [b, n, c] and keys [b, m, c], if there are norms, with one eps. Both may be overwritten.

    Without `rounds` they may be in fp32, for callers that compute in it.
    """
    if isinstance(norm_q, nn.Identity):
        return q, k
    if fused.serves(q) and all(uses_its_weight(norm, q.device) for norm in (norm_q, norm_k)):
        return fused.rms_norm_pair(q, norm_q.weight, k, norm_k.weight, norm_q.eps)
    return rms_norm(norm_q, norm_q.eps, q, rounds=rounds), rms_norm(norm_k, norm_k.eps, k, rounds=rounds)


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
        q, k = qk_norms(self.norm_q, self.norm_k, self.to_q(x), self.to_k(x), rounds=False)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (q, k, self.to_v(x)))
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
        q, k = qk_norms(self.norm_q, self.norm_k, self.to_q(x), self.to_k(caption))
        return self.to_out[0](attention(q, k, self.to_v(caption), self.heads, mask))


class SanaBlock(nn.Module):
    """Linear self-attention, cross-attention, Mix-FFN; the first and last modulated by the time."""

    def __init__(self, config: TransformerConfig, ops: Any = nn, **factory: Any):
        super().__init__()
        self.attn1 = LinearSelfAttention(config, ops, **factory)
        self.attn2 = CrossAttention(config, ops, **factory)
        self.ff = GLUMBConv(config.width, config.mlp_ratio, ops, **factory)
        self.scale_shift_table = ops.Embedding(6, config.width, **factory)

    def forward(self, x: Tensor, caption: Tensor, conditioning: Conditioning) -> Tensor:
        """x: [b, h*w, c]; caption: [b, m, c], conditioning.caption or what a host replaced it by -> [b, h*w, c]."""
        m = table_rows(self.scale_shift_table, 6, x) + conditioning.modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, dim=1)
        x = torch.addcmul(x, gate1, self.attn1(modulated_norm(x, shift1, scale1)))
        branch = self.attn2(x, caption, conditioning.mask, conditioning.attention)
        x, h = modulated_sum(x, branch, shift2, scale2)
        h = rearrange(h, "b (h w) c -> b c h w", h=conditioning.size[0])
        return torch.addcmul(x, gate2, rearrange(self.ff(h), "b c h w -> b (h w) c"))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then (1 + scale) x + shift: [b, n, c], with shift and scale [b, 1, c]."""
    if fused.serves(x):
        return fused.modulated_norm(x, shift, scale, BLOCK_EPS)[1]
    if works_in_blocks(x):  # a layer norm applies those of one sample by itself
        each = zip(x.split(1), (1 + scale).expand(len(x), 1, -1), shift.expand(len(x), 1, -1), strict=True)
        normed = [F.layer_norm(one, one.shape[-1:], gain[0], offset[0], BLOCK_EPS) for one, gain, offset in each]
        return normed[0] if len(normed) == 1 else torch.cat(normed)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=BLOCK_EPS), 1 + scale)


def modulated_sum(x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x + branch, and its modulated norm: both [b, n, c]."""
    if fused.serves(x):
        return fused.modulated_norm(x, shift, scale, BLOCK_EPS, branch)
    x = x + branch
    return x, modulated_norm(x, shift, scale)


class TimeEmbed(nn.Module):
    """Embeds the time and, for distilled models, the guidance scale; projects both to the blocks' modulation."""

    def __init__(self, config: TransformerConfig, ops: Any = nn, **factory: Any):
        super().__init__()
        self.config = config
        self.timestep_embedder = MLP(256, config.width, nn.SiLU(), ops, **factory)
        if config.guidance_embed:
            self.guidance_embedder = MLP(256, config.width, nn.SiLU(), ops, **factory)
        self.linear = ops.Linear(config.width, 6 * config.width, **factory)

    def forward(self, s: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """s, guidance: [b] -> the blocks' modulation [b, 6, c], and the embedding [b, 1, c] for the last layer.

        Raises ValueError without guidance if this model embeds it; other models ignore guidance.
        """
        emb = self.timestep_embedder(timestep_embedding(fp32(s) * self.config.time_scale).to(dtype))
        if self.config.guidance_embed:
            if guidance is None:
                raise ValueError("this model embeds the guidance scale: pass guidance (4.5 is its default)")
            features = timestep_embedding(fp32(guidance) * self.config.guidance_scale)
            emb = emb + self.guidance_embedder(features.to(dtype))
        return rearrange(self.linear(F.silu(emb)), "b (six c) -> b six c", six=6), emb[:, None]


class PatchEmbed(nn.Module):
    """One token per latent pixel: [b, 32, h, w] -> [b, h*w, c]."""

    def __init__(self, config: TransformerConfig, ops: Any = nn, **factory: Any):
        super().__init__()
        self.base = config.pos_embed_base
        self.scale = config.pos_embed_scale
        self.width = config.width
        self._axes: tuple[tuple, list[Tensor]] | None = None  # of positions, and which
        self.proj = ops.Conv2d(LATENT_CHANNELS, config.width, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        # Contiguous, since every later sum takes the strides of its first term.
        tokens = rearrange(self.proj(x), "b c h w -> b (h w) c").contiguous()
        return tokens + sincos_2d(*self._sincos_axes(height, width, x.device)).to(tokens.dtype) if self.base else tokens

    def _sincos_axes(self, *key: Any) -> list[Tensor]:
        """Of a height and a width on a device; kept, since they are sent there, and all steps have the same."""
        if self._axes is None or self._axes[0] != key:
            height, width, device = key
            self._axes = (key, [sincos_axis(n, self.width, self.base, self.scale, device) for n in (height, width)])
        return self._axes[1]


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Mask [b, m], 1 for tokens to keep and 0 for padding, as the additive [b, 1, 1, m] that `Attention` takes."""
    return None if mask is None else (1 - mask.to(dtype))[:, None, None] * MASKED


class SanaInputs(nn.Module):
    """What comes before the blocks, in the trunk and in its ControlNets: embeds latent, time, guidance and caption."""

    def __init__(self, config: TransformerConfig, ops: Any = nn, **factory: Any):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, ops, **factory)
        self.time_embed = TimeEmbed(config, ops, **factory)
        self.caption_projection = MLP(config.caption_width, config.width, nn.GELU("tanh"), ops, **factory)
        self.caption_norm = ops.RMSNorm(config.width, eps=CAPTION_EPS, **factory)

    def embed_conditioning(
        self,
        x_s: Tensor,
        s: Tensor,
        caption: Tensor,
        guidance: Tensor | None,
        mask: Tensor | None,
        attention: Attention,
    ) -> Conditioning:
        """The Conditioning of the blocks, from the arguments of SanaTransformer.forward.

        Raises ValueError when the latent does not have 32 channels, and on missing guidance.
        """
        if x_s.shape[1] != LATENT_CHANNELS:
            raise ValueError(f"SANA's latent has {LATENT_CHANNELS} channels, this one {x_s.shape[1]}")
        modulation, embedding = self.time_embed(s, guidance, x_s.dtype)
        caption = self.caption_norm(self.caption_projection(caption))
        height, width = x_s.shape[-2:]
        return Conditioning(caption, modulation, embedding, (height, width), additive_mask(mask, x_s.dtype), attention)


class SanaTransformer(SanaInputs):
    """The whole network. Every parameter is made by `ops`, in `dtype` on `device`."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        ops: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
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
        around_block: AroundBlock | None = None,
    ) -> Tensor:
        """Flow velocity v [b, 32, h, w] at (x_s, s).

        x_s: [b, 32, h, w], scaled latent; s: [b] in [0, 1]; caption: [b, m, caption_width];
        guidance: [b], only for models that embed it; mask: [b, m], 1 = keep; control: residuals
        [b or 1, h*w, c], entry i is added after block i; attention(q, k, v, heads, mask) serves the
        cross-attention; around_block(i, run, x, caption) may wrap block i: run(x, caption) runs it.
        Raises ValueError when the latent does not have 32 channels, and on missing guidance.
        """
        conditioning = self.embed_conditioning(x_s, s, caption, guidance, mask, attention)
        x = self.patch_embed(x_s)
        for i, block in enumerate(self.transformer_blocks):
            x = run_block(block, i, x, conditioning, around_block)
            residual = control[i] if i < len(control) else None
            if residual is not None:
                x = x + residual.to(x.dtype)

        shift, scale = (table_rows(self.scale_shift_table, 2, x) + conditioning.embedding).chunk(2, dim=1)
        x = self.proj_out(modulated_norm(x, shift, scale))
        return rearrange(x, "b (h w) c -> b c h w", h=conditioning.size[0])


def run_block(
    block: nn.Module, index: int, x: Tensor, conditioning: Conditioning, around_block: AroundBlock | None
) -> Tensor:
    """Image tokens after a SanaBlock, wrapped by around_block where there is one: [b, h*w, c] -> [b, h*w, c]."""

    def run(x: Tensor, caption: Tensor) -> Tensor:
        return block(x, caption, conditioning)

    if around_block is None:
        return run(x, conditioning.caption)
    return around_block(index, run, x, conditioning.caption)
