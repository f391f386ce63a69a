"""Activation checkpointing: a block's activations are computed again in the backward pass instead of kept."""

from collections.abc import Callable

import torch.utils.checkpoint
from torch import Tensor

# SanaTransformer's `around_block`: (number of the block, the block, tokens, caption) -> tokens
AroundBlock = Callable[[int, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]


def checkpointed(i: int, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, caption: Tensor) -> Tensor:
    """An `around_block` that keeps the block's inputs alone: less memory, a third more time."""
    return torch.utils.checkpoint.checkpoint(run, x, caption, use_reentrant=False)


def direct(i: int, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, caption: Tensor) -> Tensor:
    """An `around_block` that changes nothing."""
    return run(x, caption)


def around_block(activation_checkpointing: bool) -> AroundBlock:
    """Either of these."""
    return checkpointed if activation_checkpointing else direct
