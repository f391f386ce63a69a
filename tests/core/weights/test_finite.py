"""Finding NaN and infinity: by one sum, from which no element hides, and one by one where that sum overflows."""

import pytest
import torch

from sprint_core.weights.finite import is_finite

HUGE = torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [[torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]])
def test_no_element_hides(dtype, bad):
    image = torch.rand(2, 5, 7, 3).to(dtype)
    assert is_finite(image) and is_finite(image.mT) and is_finite(image[:0])
    image.view(-1)[torch.randperm(image.numel())[: len(bad)]] = torch.tensor(bad, dtype=dtype)
    assert not is_finite(image) and not is_finite(image.mT)


def test_what_is_large_is_finite():
    assert is_finite(torch.full((9,), HUGE)) and is_finite(torch.full((9,), 65504.0, dtype=torch.float16))
    assert not is_finite(torch.tensor([HUGE, HUGE, torch.nan]))
    assert is_finite(torch.full((9,), 1e300, dtype=torch.float64))
