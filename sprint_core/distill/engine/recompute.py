"""Trading time for memory: a block's activations are computed again in the backward pass instead of kept."""

from collections.abc import Callable

import torch.utils.checkpoint
from torch import Tensor


def recomputed(i: int, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, caption: Tensor) -> Tensor:
    """For SanaTransformer's `around_block`."""
    return torch.utils.checkpoint.checkpoint(run, x, caption, use_reentrant=False)


def kept(i: int, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, caption: Tensor) -> Tensor:
    """The same without any trade."""
    return run(x, caption)
