"""Linear layers whose bf16 weights lie as a CPU's matrix products read them.

oneDNN, which torch calls for such products, brings a weight into an order of its own in every call. Where that was done
once, a product of 1024 tokens takes a fifth to a third less time on a CPU with AMX, and a step an eighth; in fp32 it
makes no difference. The network's own weights stay as they were: they are what is used where something is traced,
compiled or differentiated, in another dtype, and as soon as they are other ones. (A change in place through `.data`
cannot be seen. No code of the core makes one; ComfyUI's does, and its networks are not made of these.)
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import cpu_multiplies_bf16
from .layers import Unset, is_plain_bf16, pointwise_conv

FEW_ROWS = 16  # below which a product does little but read the weight


class Packed:
    """A weight [out, in] or [out, in, 1, 1] in oneDNN's order. A copy of its layer has none."""

    def __init__(self, weight: Tensor):
        self.tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().flatten(1))
        self._source = weakref.ref(weight)
        self._state = weight.data_ptr(), weight._version

    def is_of(self, weight: Tensor) -> bool:
        """Whether it is this one, and unchanged."""
        return self._source() is weight and (weight.data_ptr(), weight._version) == self._state

    def __reduce__(self) -> Any:
        return type(None), ()


class _Layer(nn.Module):
    weight: nn.Parameter
    bias: nn.Parameter | None
    packed: Packed | None = None

    def _product(self, x: Tensor) -> Tensor | None:
        """Of x [..., in], where the packed weight serves: [..., out]."""
        if (
            self.packed is None
            or not is_plain_bf16(x)
            or x.numel() < FEW_ROWS * x.shape[-1]
            or not self.packed.is_of(self.weight)
        ):
            return None
        return torch.ops.mkldnn._linear_pointwise(x, self.packed.tensor, self.bias, "none", [], "")


class _Linear(_Layer, Unset.Linear):
    def forward(self, x: Tensor) -> Tensor:
        product = self._product(x)
        return super().forward(x) if product is None else product


class _PointwiseConv(_Layer, pointwise_conv(Unset.Conv2d)):
    def forward(self, x: Tensor) -> Tensor:
        product = self._product(x.movedim(1, -1))
        return super().forward(x) if product is None else product.movedim(-1, 1)


class Prepacked(Unset):
    """Unset, with linear layers that `prepack` knows."""

    Linear, PointwiseConv = _Linear, _PointwiseConv


@functools.cache
def is_of_use() -> bool:
    """Whether this CPU has instructions for bf16, and this torch what calls them."""
    names = "_reorder_linear_weight", "_linear_pointwise"
    has_operations = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return has_operations and cpu_multiplies_bf16()


def prepack(network: nn.Module, done: Callable[[Tensor], None] = lambda weight: None) -> None:
    """Pack the weights of a network that learns no more; `done` is told of each that is hardly needed from then on.

    What was made in inference mode stays as it is: such weights do not say whether they changed.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, _Layer)] if is_of_use() else []
    for layer in layers:
        weight = layer.weight
        if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not weight.is_inference():
            layer.packed = Packed(weight)
            done(weight)
