"""Linear layers whose bf16 weights stay as they lie, in the pages of their file.

oneDNN, which torch calls for the product of activations and a weight, probably copies the second factor into an order
of its own in every call. Turned round, so that this is the activations, the product of a prompt's few tokens takes less
time on a CPU with AMX, and so does that of more than 256 (docs/benchmarks.md). Packed once (prepacked.py), the text
encoder's gigabytes would lie in memory.
"""

import torch.nn.functional as F
from torch import Tensor

from ..devices import cpu_has_amx
from .layers import Unset, is_plain_bf16

AS_FAST = range(97, 257)  # rows of activations of which torch's own product is as soon done


class _Linear(Unset.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; what becomes wider keeps its columns, not its rows, side by side."""
        weight, rows = self.weight, x.numel() // x.shape[-1]
        if rows == 0 or rows in AS_FAST or self.bias is not None or not (cpu_has_amx() and is_plain_bf16(x)):
            return F.linear(x, weight, self.bias)
        y = (weight @ x.flatten(0, -2).T).T
        return (y if len(weight) > weight.shape[1] else y.contiguous()).unflatten(0, x.shape[:-1])


class Mapped(Unset):
    """Unset, with linear layers for weights that stay mapped."""

    Linear = _Linear
