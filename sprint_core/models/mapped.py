"""Linear layers whose bf16 weights stay as they lie, in the pages of their file.

oneDNN, which torch calls for the product of activations and a weight, brings the weight into an order of its own first,
in every call. Asked for the product of the weight and the activations, turned round, it reads the weight as it is. On
a CPU with AMX that is faster for the few tokens of a prompt, and for as many as need the weight twice. What is packed
once instead (prepacked.py) is faster still; but the text encoder's gigabytes would then lie in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..devices import cpu_has_amx
from .layers import Unset

AS_FAST = range(97, 257)  # rows of activations of which torch's own product is as soon done


class _Linear(Unset.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; what becomes wider keeps its columns, not its rows, side by side."""
        weight, rows = self.weight, x.numel() // x.shape[-1]
        if rows == 0 or rows in AS_FAST or self.bias is not None or not _serves(x, weight):
            return F.linear(x, weight, self.bias)
        y = (weight @ x.flatten(0, -2).T).T
        return (y if len(weight) > weight.shape[1] else y.contiguous()).unflatten(0, x.shape[:-1])


def _serves(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and cpu_has_amx()
        and forward_ad.unpack_dual(x).tangent is None
    )


class Mapped(Unset):
    """Unset, with linear layers for weights that stay mapped."""

    Linear = _Linear
