"""Products of weights that stay mapped: the same, turned round where that is faster."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from sprint_core.models import mapped
from sprint_core.models.mapped import AS_FAST, Mapped

SIZES = [(64, 40), (40, 64)]  # of input and output


@pytest.fixture(autouse=True)
def amx(monkeypatch):
    monkeypatch.setattr(mapped, "cpu_has_amx", lambda: True)


def layer(dim: int = 64, dim_out: int = 40, dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> Any:
    made = Mapped.Linear(dim, dim_out, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 20), (1, AS_FAST[0] - 1), (1, AS_FAST[0]), (2, 150), (3, 2, 60), (0, 4)])
@torch.no_grad()
def test_a_product_is_the_product(sizes, shape):
    one = layer(*sizes)
    x = torch.randn(*shape, sizes[0]).bfloat16()
    exact = F.linear(x.double(), one.weight.double())
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        got = one(given)
        assert got.dtype == torch.bfloat16 and got.shape == exact.shape
        torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=2**-7)


def turned(one: Any, x: torch.Tensor) -> bool:
    """Whether a layer that widens takes the weight first: then columns lie side by side."""
    return one(x).stride(-1) != 1


def test_where_it_is_turned_round(monkeypatch):
    one = layer(40, 64)
    few, some, many = (torch.randn(1, n, 40).bfloat16() for n in (20, AS_FAST[0], AS_FAST[-1] + 1))
    assert not turned(one, few)  # gradients
    with torch.no_grad():
        assert turned(one, few) and turned(one, many) and not turned(one, some)
        assert not turned(layer(40, 64, dtype=torch.float32), few.float())
        assert layer()(torch.randn(1, 20, 64).bfloat16()).is_contiguous()
        with forward_ad.dual_level():
            assert not turned(one, forward_ad.make_dual(few, torch.ones_like(few)))
        monkeypatch.setattr(mapped, "cpu_has_amx", lambda: False)
        assert not turned(one, few)


@torch.no_grad()
def test_with_a_bias_it_is_torchs_own():
    one, x = layer(bias=True), torch.randn(1, 20, 64).bfloat16()
    assert torch.equal(one(x), F.linear(x, one.weight, one.bias))
