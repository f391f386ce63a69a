"""NaN and infinity: looked for in every result, and in weights once a result has some, as that takes as long as reading
the file."""

from collections.abc import Mapping

import torch
from torch import Tensor

SLICE = 2**24  # elements that are looked at together


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, in their order; whole numbers hold none."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _holds_none(tensor)]


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, mostly by one sum: both are infectious, and a sum is one pass.

    Only where the sum itself overflows are elements looked at one by one.
    """
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(torch.isfinite(tensor).all())


def _holds_none(tensor: Tensor) -> bool:
    """`is_finite` slice by slice, in fp32: float8 knows neither sums nor isfinite."""
    return all(is_finite(part.float()) for part in tensor.detach().reshape(-1).split(SLICE))


def first_and_count(names: list[str]) -> str:
    """'blocks.0.attn.to_q.weight (and 3 more tensors)'."""
    return names[0] + (f" (and {len(names) - 1} more tensors)" if len(names) > 1 else "")
