"""The building blocks that SANA's transformer and DC-AE share.

Every learnable operation comes from `ops`, a namespace with torch.nn's classes: `torch.nn` itself,
or a host's (ComfyUI's operations cast, offload and patch weights as they run). Token layout is
[b, n, c], image layout [b, c, h, w].
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..devices import fp32, to_device

LINEAR_ATTENTION_EPS = 1e-8  # the authors' value; diffusers has 1e-15
CACHED_NUMBERS = 2**19  # of a tensor, that a CPU's cache holds
MASKED = -10000.0  # additive mask of padded text tokens, as in training


def _unset(base: type) -> type:
    return type(base.__name__, (base,), {"reset_parameters": lambda self: None})


class Unset:
    """torch.nn's operations without first values, for networks whose weights come from a file.

    On the meta device, where such networks are built, drawing the values of an Embedding imports for a second.
    """

    Linear, Conv2d, Embedding, RMSNorm = map(_unset, (nn.Linear, nn.Conv2d, nn.Embedding, nn.RMSNorm))


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention. q [b, n, h*d], k and v [b, m, h*d], additive mask [b, 1, 1, m] -> [b, n, h*d]."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n d -> b n (h d)")


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = LINEAR_ATTENTION_EPS) -> Tensor:
    """ReLU linear attention: relu(q) (relu(k)^T v) / (relu(q) sum relu(k)). All [b, h, n, d] -> [b, n, h*d].

    Cost is linear in n. In fp32, as the [d, d] products of hundreds of tokens overflow fp16 and round badly in bf16;
    the result has q's dtype again. By as many heads as a CPU's caches hold.
    """
    together = cached_rows(q, q.numel() // q.shape[1])
    parts = [_of_heads(*some, eps) for some in zip(*(x.split(together, dim=1) for x in (q, k, v)))]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).flatten(2)


def _of_heads(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """[b, h, n, d] -> [b, n, h, d]. A channel of ones in v makes the denominators."""
    dtype = q.dtype
    q, k, v = fp32(F.relu(q)), fp32(F.relu(k)), fp32(F.pad(v, (0, 1), value=1.0))
    y = q @ (k.transpose(-1, -2) @ v)
    out = y[..., :-1] / (y[..., -1:] + eps)
    return out.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)


def cached_rows(x: Tensor, numbers: int) -> int:
    """How many rows of so many numbers to work on at a time.

    As many as a CPU's caches hold, to which fresh memory costs more than arithmetic; all where something else
    computes, or where the work is to be differentiated or compiled.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x.numel()
    return max(1, CACHED_NUMBERS // numbers)


def by_rows(run: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """run(x, *others), all [..., c], that takes every row by itself and keeps its shape; it may overwrite x."""
    together = cached_rows(x, x.shape[-1])
    if together >= x.numel() // x.shape[-1]:
        return run(x, *others)
    rows, *other_rows = (y.flatten(0, -2) for y in (x, *others))
    for start in range(0, len(rows), together):
        some = slice(start, start + together)
        rows[some] = run(rows[some], *(other[some] for other in other_rows))
    return rows.view(x.shape)


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


@functools.cache
def _pointwise_conv_class(base: type) -> type:
    class PointwiseConv(base):
        """A 1x1 convolution, which for 16-bit channels_last pictures is faster as a linear layer of their tokens.

        Overridden where hosts have cast and moved the weights.
        """

        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if x.dtype.itemsize > 2:
                return super()._conv_forward(x, weight, bias)
            return F.linear(x.movedim(1, -1), weight[:, :, 0, 0], bias).movedim(-1, 1)

    return PointwiseConv


class GLUMBConv(nn.Module):
    """SANA's feed-forward, Mix-FFN with a gate: 1x1 -> SiLU -> 3x3 depthwise -> x * SiLU(gate) -> 1x1.

    Returns the branch alone; the caller adds the residual. [b, c, h, w] -> [b, c, h, w].
    """

    def __init__(self, dim: int, ratio: float, ops: Any = nn, **factory: Any):
        super().__init__()
        hidden, pointwise = int(ratio * dim), _pointwise_conv_class(ops.Conv2d)
        self.conv_inverted = pointwise(dim, 2 * hidden, 1, **factory)
        self.conv_depth = ops.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, **factory)
        self.conv_point = pointwise(hidden, dim, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        in_place = not torch.is_grad_enabled()
        x, gate = self.conv_depth(F.silu(self.conv_inverted(x), inplace=in_place)).chunk(2, dim=1)
        return self.conv_point(F.silu(gate).mul_(x) if in_place else F.silu(gate) * x)


def sincos_2d(height: int, width: int, dim: int, base_size: int, scale: float, device: torch.device) -> Tensor:
    """Fixed position embedding of the 2K and 4K models: [1, h*w, dim] in fp32, columns before rows.

    Positions are stretched so that any size spans `base_size` positions, then divided by `scale`.
    """
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))  # on the CPU: not all have fp64

    def axis(n: int) -> Tensor:
        angles = torch.arange(n, dtype=torch.float64)[:, None] * (base_size / n / scale) * omega
        return to_device(torch.cat([angles.sin(), angles.cos()], dim=-1).float(), device)

    rows = axis(height)[:, None].expand(-1, width, -1)
    columns = axis(width)[None].expand(height, -1, -1)
    return rearrange(torch.cat([columns, rows], dim=-1), "h w c -> 1 (h w) c")
