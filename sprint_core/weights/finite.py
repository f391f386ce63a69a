"""NaN and infinity in weights, looked for once a result has some: one pass over a file takes as long as reading it."""

from collections.abc import Mapping

import torch
from torch import Tensor

SLICE = 2**24  # elements that are looked at together


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, in their order; whole numbers hold none."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    slices = tensor.detach().reshape(-1).split(SLICE)
    return all(bool(torch.isfinite(part.float()).all()) for part in slices)  # float8 knows no isfinite


def first_and_count(names: list[str]) -> str:
    """'blocks.0.attn.to_q.weight (and 3 more tensors)'."""
    return names[0] + (f" (and {len(names) - 1} more tensors)" if len(names) > 1 else "")
