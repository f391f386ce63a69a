"""The building blocks that SANA's transformer and DC-AE share.

Every learnable operation comes from `ops`, a namespace with torch.nn's classes: `torch.nn` itself,
or a host's (ComfyUI's operations cast, offload and patch weights as they run), which may bring a
PointwiseConv of its own. Tokens are [b, n, c], images [b, c, h, w]. On a CPU, norms and attention
run in blocks that fit its cache, since memory that is touched for the first time costs more than
the arithmetic.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..devices import fp32, to_device
from ..kernels import fused

LINEAR_ATTENTION_EPS = 1e-8  # the authors' value; diffusers has 1e-15
MAX_PERIOD = 10000.0  # of the time embedding
CACHE_ELEMENTS = 2**21  # elements of a tensor that a CPU works on at once: in its cache, and worth waking threads for
ON_THE_WAY = ("comfy_cast_weights", "weight_function", "bias_function")  # by these ComfyUI's layers change weights
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLAIN: tuple[type, ...] = (nn.Parameter,)  # no tensor that unpacks itself
FEW_ELEMENTS = 2**16  # of which torch's own norm is as soon done
LARGE = 2.0**20  # of a row of equal numbers, beside which a norm's eps is nothing; no CPU runs fp16, which is too short
MASKED = -10000.0  # what is added to the logits of padded text tokens, as in training

Attention = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]  # see `sdpa`


def _unset(base: type) -> type:
    return type(base.__name__, (base,), {"reset_parameters": lambda self: None})


class Unset:
    """torch.nn's operations with uninitialised weights, for networks whose weights come from a file.

    Such networks are built on the meta device, where initialising an Embedding would import modules for a second.
    """

    Linear, Conv2d, Embedding, RMSNorm = map(_unset, (nn.Linear, nn.Conv2d, nn.Embedding, nn.RMSNorm))


def uses_its_weight(layer: nn.Module, device: torch.device) -> bool:
    """Whether all that a layer's forward does with its weight is to read it on this device as it lies there.

    Not so where a host casts, streams or patches it on the way, where it is quantised or shared among machines, and
    where somebody wants to see or replace the layer's calls.
    """
    return (
        type(layer._parameters.get("weight")) in PLAIN  # no property of a wrapper, and no parametrization
        and layer.weight.device == device
        and not any(getattr(layer, name, None) for name in ON_THE_WAY)
        and "forward" not in vars(layer)
        and not any(getattr(layer, name) for name in HOOKS)
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention: q [b, n, h*d], k and v [b, m, h*d], additive mask [b, 1, 1, m] or None -> [b, n, h*d]."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n d -> b n (h d)")


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = LINEAR_ATTENTION_EPS) -> Tensor:
    """ReLU linear attention (arXiv 2205.14756), linear in n: all [b, h, n, d] -> [b, n, h*d] in v's dtype.

    relu(q) (relu(k)^T v) / (relu(q) sum relu(k)), computed in fp32, as the [d, d] products of hundreds of tokens
    overflow fp16 and round badly in bf16.
    """
    if fused.serves(q) and fused.attends(q, k, v):
        return fused.relu_linear_attention(q, k, v, eps)
    heads = rows_per_block(q, q.numel() // q.shape[1])
    blocks = zip(q.split(heads, dim=1), k.split(heads, dim=1), v.split(heads, dim=1), strict=True)
    outputs = [_attend_linearly(*block, eps) for block in blocks]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).flatten(2)


def _attend_linearly(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """[b, h, n, d] -> [b, n, h, d]. A channel of ones in v makes the denominators."""
    dtype = v.dtype
    q, k, v = fp32(F.relu(q)), fp32(F.relu(k)), fp32(F.pad(v, (0, 1), value=1.0))
    y = q @ (k.transpose(-1, -2) @ v)
    out = y[..., :-1] / (y[..., -1:] + eps)
    return out.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)


def rows_per_block(x: Tensor, row_elements: int) -> int:
    """How many rows of `row_elements` elements each a CPU's cache holds: the size of a block of work on x.

    All rows (x.numel()) where x is not on the CPU, and where the work is differentiated or compiled.
    """
    return max(1, CACHE_ELEMENTS // row_elements) if works_in_blocks(x) else x.numel()


def works_in_blocks(x: Tensor) -> bool:
    """Whether x is on the CPU, and what is done with it is neither differentiated nor compiled."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_plain_bf16(x: Tensor) -> bool:
    """Whether x is in bf16 on the CPU, and what is done with it is not differentiated, compiled or traced."""
    return (
        x.dtype == torch.bfloat16
        and works_in_blocks(x)
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and forward_ad.unpack_dual(x).tangent is None
    )


def run_in_blocks(run: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """run(x, *others) in blocks of rows that fit a CPU's cache: all [..., c] -> [..., c].

    run must treat every row by itself and keep its shape. x may be overwritten.
    """
    block_rows = rows_per_block(x, x.shape[-1])
    if block_rows >= x.numel() // x.shape[-1]:
        return run(x, *others)
    rows, *other_rows = (y.flatten(0, -2) for y in (x, *others))
    for start in range(0, len(rows), block_rows):
        block = slice(start, start + block_rows)
        rows[block] = run(rows[block], *(other[block] for other in other_rows))
    return rows.view(x.shape)


def rms_norm(
    norm: nn.Module,
    eps: float,
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    run: Callable[[Tensor], Tensor] | None = None,
    rounds: bool = True,
) -> Tensor:
    """norm(x) + bias + residual: x and residual [..., c], bias [c]. x may be overwritten.

    norm: an RMS norm of c channels with this eps and a weight, and `run` its call, if that is another. In few passes
    without `rounds`, the result may stay in fp32.
    """
    run = norm if run is None else run
    if not in_few_passes(x):
        y = run(x)
        for more in (bias, residual):
            y = y if more is None else y.add_(more)
        return y
    out = x if rounds or x.dtype.itemsize > 2 else x.new_empty(x.shape, dtype=torch.float32)
    return rms_norm_to(out, x, gains_of(norm, x, run), eps, bias, residual)


def in_few_passes(x: Tensor) -> bool:
    """Whether RMS norms of x run as rms_norm_to has them."""
    return (
        works_in_blocks(x)
        and x.numel() >= FEW_ELEMENTS
        and forward_ad.unpack_dual(x).tangent is None  # for which there are no operations with `out`
    )


def gains_of(norm: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight [c] of an RMS norm of x's channels, in fp32 or x's float64: read, or as its call `run` applies it."""
    if uses_its_weight(norm, x.device):
        gains: Any = norm.weight
    else:  # as the host casts it
        gains = run(x.new_full((x.shape[-1],), LARGE))
    return gains.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm_to(
    out: Tensor, x: Tensor, gains: Tensor, eps: float, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """out, filled with x / rms(x) gains + bias + residual: out, x and residual [..., c], gains and bias [c].

    On a CPU torch's own norm takes twice as many passes over memory as it needs: here they are few, of blocks that fit
    its cache, in fp32, rounded once. out may be x.
    """
    bias = torch.zeros_like(gains) if bias is None else fp32(bias)
    rows, residual_rows = x.flatten(0, -2), None if residual is None else residual.flatten(0, -2)
    filled = rows if out is x else out.flatten(0, -2)
    block_rows = max(1, min(rows_per_block(x, x.shape[-1]), len(rows)))
    wide = None if out.dtype == gains.dtype else gains.new_empty(block_rows, x.shape[-1])
    for start in range(0, len(rows), block_rows):
        block = slice(start, start + block_rows)
        y = filled[block] if wide is None else wide[: len(rows[block])]
        if out is not x or wide is not None:
            y.copy_(rows[block])
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        y.mul_(length.square_().div_(x.shape[-1]).add_(eps).rsqrt_())
        torch.addcmul(bias, y, gains, out=y)
        if residual_rows is not None:
            y.add_(residual_rows[block])
        if wide is not None:
            filled[block] = y
    return filled.view(x.shape)


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoidal features of one scalar per sample (arXiv 2006.11239): [b] -> [b, dim] in fp32, cosines first."""
    half = dim // 2
    t = fp32(t)
    freqs = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    args = t[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


class MLP(nn.Module):
    """The embedder of time, guidance or caption, two linear layers and an activation: [..., dim_in] -> [..., dim]."""

    def __init__(self, dim_in: int, dim: int, act: nn.Module, ops: Any = nn, **factory: Any):
        super().__init__()
        self.linear_1 = ops.Linear(dim_in, dim, **factory)
        self.act = act
        self.linear_2 = ops.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


def table_rows(table: nn.Embedding, rows: int, like: Tensor) -> Tensor:
    """A learnt modulation table [rows, c], on the device and in the dtype of `like`.

    Tables are Embeddings and not bare parameters, because hosts cast, offload, merge and patch only
    parameters that belong to an operation.
    """
    if uses_its_weight(table, like.device):
        return table.weight[:rows].to(like.dtype)
    return table(torch.arange(rows, device=like.device)).to(like.dtype)


@functools.cache
def pointwise_conv(base: type) -> type:
    class PointwiseConv(base):
        """A 1x1 convolution, which for 16-bit channels_last images is faster as a linear layer of their tokens.

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
        hidden = int(ratio * dim)
        pointwise = getattr(ops, "PointwiseConv", None) or pointwise_conv(ops.Conv2d)
        self.conv_inverted = pointwise(dim, 2 * hidden, 1, **factory)
        self.conv_depth = ops.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, **factory)
        self.conv_point = pointwise(hidden, dim, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        in_place = not torch.is_grad_enabled()
        x = F.silu(self.conv_inverted(x), inplace=in_place)
        if fused.serves(x) and uses_its_weight(self.conv_depth, x.device):
            return self.conv_point(fused.gated_depthwise(x, self.conv_depth.weight, self.conv_depth.bias))
        x, gate = self.conv_depth(x).chunk(2, dim=1)
        return self.conv_point(F.silu(gate).mul_(x) if in_place else F.silu(gate) * x)


def sincos_axis(count: int, dim: int, base_size: int, scale: float, device: torch.device) -> Tensor:
    """One axis of the fixed position embedding of the 2K and 4K models: sines and cosines [count, dim / 2] in fp32.

    Positions are stretched so that any size spans `base_size` positions, then divided by `scale`.
    """
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))  # on the CPU: not all have fp64
    angles = torch.arange(count, dtype=torch.float64)[:, None] * (base_size / count / scale) * omega
    return to_device(torch.cat([angles.sin(), angles.cos()], dim=-1).float(), device)


def sincos_2d(rows: Tensor, columns: Tensor) -> Tensor:
    """Both axes [h, dim / 2] and [w, dim / 2] together: [1, h*w, dim], columns before rows."""
    height, width = len(rows), len(columns)
    columns, rows = columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)
    return rearrange(torch.cat([columns, rows], dim=-1), "h w c -> 1 (h w) c")
