"""What the kernels of source.py compute, as functions of tensors. For inference, where `serves` says so.

Each takes the place of a chain of torch's operations, of two to twelve launches (`python -m benchmarks.launches` counts
them), and keeps in registers what they write to memory in between. They are off unless the environment has
SANA_SPRINT_KERNELS=1: tests show that they are right (in Triton's interpreter) and that they compile for NVIDIA's and
AMD's GPUs, but no GPU has yet shown that they are faster. `python -m tools.gpu_check --only kernels` will. Until then
whole programs try them, ComfyUI among them: hence a switch of the environment, and no argument of every network.
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor

from .. import messages

log = messages.logger(__name__)

SWITCH = "SANA_SPRINT_KERNELS"
HEAD_DIMS = (16, 32, 64, 128)  # of linear attention: what tl.dot multiplies
TILE = 2**12  # elements that one program of `rms_norm` works on
TOKENS, PARTS = 64, 4  # of a program of linear attention, and into how many sums its tokens are split

enabled = os.environ.get(SWITCH) == "1"
in_inference = torch.is_inference_mode_enabled  # training also runs networks without gradients, beside those with


@functools.cache
def interprets() -> bool:
    """Whether Triton runs its kernels by an interpreter on the CPU, as tests have it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def source() -> Any:  # a module
    """The kernels; None where there is no Triton, which is said once."""
    try:
        from . import source
    except ImportError as error:
        log.warning("%s=1 has no effect: Triton cannot be imported (%s)", SWITCH, error)
        return None
    return source


def serves(x: Tensor) -> bool:
    """Whether kernels are to compute from x: in inference mode and on a GPU."""
    return (
        enabled
        and (x.is_cuda or interprets())
        and in_inference()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and source() is not None
    )


def launch(kernel: Any, grid: tuple[int, ...], out: Tensor, *args: Any, warps: int = 4, **constants: Any) -> None:
    """Start a kernel on the device of `out`. Raises RuntimeError where it cannot be compiled."""
    try:
        if out.is_cuda:
            with torch.cuda.device(out.device):
                kernel[grid](*args, num_warps=warps, **constants)
        else:
            kernel[grid](*args, **constants)
    except torch.OutOfMemoryError:  # for hosts, which try again with less
        raise
    except Exception as error:  # each of Triton's compilers has its own
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"Triton cannot run the kernel {kernel.__name__} on this machine ({type(error).__name__}: {reason}); "
            f"start without {SWITCH}"
        ) from error


def _block(channels: int) -> int:
    return max(16, 1 << (channels - 1).bit_length())


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x / rms(x) (weight + offset) + bias + residual: x and residual [..., c], weight and bias [c] -> [..., c]."""
    x, channels = x.contiguous(), x.shape[-1]
    out, block, count = torch.empty_like(x), _block(channels), x.numel() // channels
    rows = max(1, TILE // block)
    residual = None if residual is None else residual.contiguous()
    launch(
        source().rms_norm, (-(-count // rows),), out,
        x, weight, weight if bias is None else bias, x if residual is None else residual, out, count, channels, offset,
        eps, warps=_warps(rows * block), HAS_B=bias is not None, HAS_R=residual is not None, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return out


def rms_norm_pair(x1: Tensor, weight1: Tensor, x2: Tensor, weight2: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) weight, of two tensors with as many channels: queries [b, n, c] and keys [b, m, c]."""
    x1, x2, channels = x1.contiguous(), x2.contiguous(), x1.shape[-1]
    out1, out2, block = torch.empty_like(x1), torch.empty_like(x2), _block(channels)
    counts, rows = [x.numel() // channels for x in (x1, x2)], max(1, TILE // block)
    launch(
        source().rms_norm_pair, (-(-max(counts) // rows), 2), out1,
        x1, weight1, out1, counts[0], x2, weight2, out2, counts[1], channels, eps,
        warps=_warps(rows * block), ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return out1, out2


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, branch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sum x + branch, and of it (1 + scale) layer_norm + shift: x [b, n, c], shift and scale [b or 1, 1, c]."""
    x, (_, tokens, channels) = x.contiguous(), x.shape
    out, block = torch.empty_like(x), _block(channels)
    total = x if branch is None else torch.empty_like(x)
    shift, scale = (y.expand(len(x), 1, channels) for y in (shift, scale))
    launch(
        source().modulated_norm, (len(x) * tokens,), out,
        x, x if branch is None else branch.contiguous(), shift, scale, total, out, tokens, channels, shift.stride(0),
        scale.stride(0), eps, warps=_warps(block), HAS_BRANCH=branch is not None, BLOCK=block,
    )  # fmt: skip
    return total, out


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """As layers.relu_linear_attention: all [b, h, n, d], whose channels lie side by side -> [b, n, h*d]."""
    b, heads, tokens, d = q.shape
    sums = torch.empty(b * heads, PARTS, d * d + d, dtype=torch.float32, device=q.device)
    out = torch.empty(b, tokens, heads * d, dtype=q.dtype, device=q.device)
    constants = {"D": d, "TOKENS": TOKENS, "PARTS": PARTS}
    launch(
        source().linear_attention_sums, (b * heads, PARTS), out,
        k, v, sums, heads, tokens, *k.stride()[:3], *v.stride()[:3], **constants,
    )  # fmt: skip
    launch(
        source().linear_attention_outputs, (b * heads, -(-tokens // TOKENS)), out,
        q, sums, out, heads, tokens, *q.stride()[:3], eps, **constants,
    )  # fmt: skip
    return out


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `relu_linear_attention` can read these."""
    return q.shape[-1] in HEAD_DIMS and all(x.stride(-1) == 1 for x in (q, k, v))


def gated_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 depthwise convolution, and its first half of channels times SiLU of its second.

    x: [b, 2 c, h, w], weight: [2 c, 1, 3, 3], bias: [2 c] -> [b, c, h, w] with channels last, as x had better be.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    b, channels, height, width = x.shape
    hidden = channels // 2
    out = torch.empty(b, height, width, hidden, dtype=x.dtype, device=x.device)
    most, columns = 128, 8  # of channels and columns: 128 bytes at least are read together
    launch(
        source().gated_depthwise, (-(-hidden // most), -(-width // columns), b * height), out,
        x, weight.contiguous(), bias, out, height, width, hidden, CHANNELS=most, COLUMNS=columns,
    )  # fmt: skip
    return out.movedim(-1, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (x with its halves exchanged) sin: x [b, h, n, d], cos and sin [n, d] in fp32 -> [b, h, n, d]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    b, heads, tokens, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        source().rotate, (b * heads * tokens,), out,
        x, cos, sin, out, heads, tokens, *x.stride()[:3], channels, warps=1, BLOCK=_block(channels),
    )  # fmt: skip
    return out


def softcapped_softmax(logits: Tensor, mask: Tensor, scale: float, cap: float | None) -> Tensor:
    """softmax(cap tanh(scale logits)), or of scale logits, without what is masked: logits [..., n, m] in their dtype.

    mask: [n, m], true where a query does not see a key. Rows of several groups of queries may lie below each other.
    """
    logits, (queries, keys) = logits.contiguous(), mask.shape
    out, block = torch.empty_like(logits), _block(keys)
    launch(
        source().softcapped_softmax, (logits.numel() // keys,), out,
        logits, mask.contiguous(), out, queries, keys, scale, cap or 1.0,
        warps=_warps(block), HAS_CAP=cap is not None, BLOCK=block,
    )  # fmt: skip
    return out


def gelu_gate(gate: Tensor, x: Tensor) -> Tensor:
    """gelu(gate) x, by the tanh approximation: two tensors of one shape."""
    gate, x = gate.contiguous(), x.contiguous()
    out, block = torch.empty_like(x), 1024
    launch(source().gelu_gate, (-(-x.numel() // block),), out, gate, x, out, x.numel(), BLOCK=block)
    return out
