"""The building blocks that SANA's transformer and DC-AE share.

Every learnable operation comes from `ops`, a namespace with torch.nn's classes: `torch.nn` itself,
or a host's (ComfyUI's operations cast, offload and patch weights as they run). Token layout is
[b, n, c], image layout [b, c, h, w].
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LINEAR_ATTENTION_EPS = 1e-8  # the authors' value; diffusers has 1e-15
MASKED = -10000.0  # additive mask of padded text tokens, as in training


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention. q [b, n, h*d], k and v [b, m, h*d], additive mask [b, 1, 1, m] -> [b, n, h*d]."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n d -> b n (h d)")


def fp32(x: Tensor) -> Tensor:
    """fp32, for the few places that need it; float64 stays, so that derivatives can be checked in it."""
    return x if x.dtype == torch.float64 else x.float()


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = LINEAR_ATTENTION_EPS) -> Tensor:
    """ReLU linear attention in fp32: relu(q) (relu(k)^T v) / (relu(q) sum relu(k)). All [..., n, d].

    Cost is linear in n; the [d, d] products of hundreds of tokens overflow fp16 and round badly in bf16.
    """
    q, k, v = fp32(F.relu(q)), fp32(F.relu(k)), fp32(v)
    kv = k.transpose(-1, -2) @ v
    total = q @ k.sum(-2, keepdim=True).transpose(-1, -2)
    return (q @ kv) / (total + eps)


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of a scalar per sample: [b] -> [b, dim] in fp32, cosines first."""
    half = dim // 2
    t = fp32(t)
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    args = t[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


class MLP(nn.Module):
    """Two linear layers with an activation between: the time, guidance and caption embedders."""

    def __init__(self, dim_in: int, dim: int, act: nn.Module, ops: Any = nn, **factory: Any):
        super().__init__()
        self.linear_1 = ops.Linear(dim_in, dim, **factory)
        self.act = act
        self.linear_2 = ops.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


def table_rows(table: nn.Embedding, rows: int, like: Tensor) -> Tensor:
    """A learnt modulation table [rows, c] in the device and dtype of `like`.

    Tables are Embeddings and not bare parameters, because hosts cast, offload, merge and patch only
    parameters that belong to an operation.
    """
    return table(torch.arange(rows, device=like.device)).to(like.dtype)


class GLUMBConv(nn.Module):
    """SANA's feed-forward, Mix-FFN with a gate: 1x1 -> SiLU -> 3x3 depthwise -> x * SiLU(gate) -> 1x1.

    Returns the branch alone; the caller adds the residual. [b, c, h, w] -> [b, c, h, w].
    """

    def __init__(self, dim: int, ratio: float, ops: Any = nn, **factory: Any):
        super().__init__()
        hidden = int(ratio * dim)
        self.conv_inverted = ops.Conv2d(dim, 2 * hidden, 1, **factory)
        self.conv_depth = ops.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, **factory)
        self.conv_point = ops.Conv2d(hidden, dim, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        return self.conv_point(x * F.silu(gate))


def sincos_2d(height: int, width: int, dim: int, base_size: int, scale: float, device: torch.device) -> Tensor:
    """Fixed position embedding of the 2K and 4K models: [1, h*w, dim] in fp32, columns before rows.

    Positions are stretched so that any size spans `base_size` positions, then divided by `scale`.
    """
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))  # on the CPU: not all have fp64

    def axis(n: int) -> Tensor:
        angles = torch.arange(n, dtype=torch.float64)[:, None] * (base_size / n / scale) * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    rows = axis(height)[:, None].expand(-1, width, -1)
    columns = axis(width)[None].expand(height, -1, -1)
    return rearrange(torch.cat([columns, rows], dim=-1), "h w c -> 1 (h w) c").to(device, torch.float32)
