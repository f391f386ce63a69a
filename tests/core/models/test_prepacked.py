"""Packed weights: the same products, and the layer's own weight wherever they do not serve."""

import copy
import pickle
from typing import Any

import pytest
import tiny_networks
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from sprint_core.models import prepacked
from sprint_core.models.prepacked import FEW_ROWS, Packed, Prepacked, prepack
from sprint_core.weights import checkpoint, layouts, tensorfile

pytestmark = pytest.mark.skipif(not prepacked.is_of_use(), reason="this CPU has no instructions for bf16")
WIDE, OUT = 48, 80


def layer(kind: str = "Linear", dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> Any:
    generator = torch.Generator().manual_seed(1)
    sizes = (WIDE, OUT, 1) if kind == "PointwiseConv" else (WIDE, OUT)
    made = getattr(Prepacked, kind)(*sizes, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which products were made of packed weights."""
    made, product = [], prepacked._Layer._product

    def spy(self, x):
        found = product(self, x)
        made.append("plain" if found is None else "packed")
        return found

    monkeypatch.setattr(prepacked._Layer, "_product", spy)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 40, WIDE), (FEW_ROWS, WIDE), (3, 5, 7, WIDE)])
def test_a_packed_layer_is_the_layer(calls, shape, bias):
    x, one = torch.randn(shape, dtype=torch.bfloat16), layer(bias=bias)
    assert [*prepack(one)] == [one.weight]
    with torch.no_grad():
        found = one(x)
        swapped = one(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert calls == ["packed"] * 2
    exact = F.linear(x.double(), one.weight.double(), None if one.bias is None else one.bias.double())
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    assert (found - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert torch.equal(found, swapped)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_packed_convolution_is_the_convolution(calls, memory_format):
    one = layer("PointwiseConv")
    images = torch.randn(2, WIDE, 6, 5, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
    with torch.no_grad():
        plain = one(images)
        assert [*prepack(one)] == [one.weight]
        found = one(images)
    assert calls == ["plain", "packed"] and found.shape == plain.shape
    assert (found - plain).abs().max() <= 2**-7 * plain.abs().max()


def test_where_a_packed_weight_does_not_serve(calls):
    """Few rows, gradients, tangents, other dtypes: what the layer without one returns, bit for bit."""
    one, other = layer(), layer()
    assert len([*prepack(one)]) == 1
    x = torch.randn(FEW_ROWS, WIDE, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(one(x[1:]), other(x[1:]))
        with forward_ad.dual_level():
            found = one(forward_ad.make_dual(x, torch.ones_like(x)))
            tangent = forward_ad.unpack_dual(found).tangent
        assert tangent is not None and torch.equal(tangent, F.linear(torch.ones_like(x), other.weight))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(one(x.float()), other(x.float()))
    wanted = x.clone().requires_grad_()
    assert torch.equal(one(wanted), other(x))
    one(wanted).float().sum().backward()
    assert wanted.grad is not None
    with pytest.raises(RuntimeError, match="dtype"), torch.no_grad():
        one(x.float())
    assert "packed" not in calls


@pytest.mark.parametrize("change", ["in place", "another", "loaded"])
def test_a_weight_that_changed_is_what_counts(calls, change):
    one, other = layer(), layer()
    x = torch.randn(FEW_ROWS, WIDE, dtype=torch.bfloat16)
    assert len([*prepack(one)]) == 1
    with torch.no_grad():
        other.weight.mul_(-2)
        if change == "in place":
            one.weight.mul_(-2)
        elif change == "another":
            replaced = one.weight
            one.weight = nn.Parameter(torch.empty_like(replaced), requires_grad=False)
            one.weight.copy_(other.weight)
            assert one.weight._version == replaced._version
        else:
            one.load_state_dict(other.state_dict())
        assert torch.equal(one(x), other(x))
    assert calls == ["plain"] * 2


def test_a_copy_has_no_packed_weights():
    one = layer()
    assert len([*prepack(one)]) == 1
    assert isinstance(one.packed, Packed)
    assert copy.deepcopy(one).packed is None and pickle.loads(pickle.dumps(one.packed)) is None
    assert one.state_dict().keys() == layer().state_dict().keys()


def test_only_bf16_is_packed(monkeypatch):
    assert not [*prepack(layer(dtype=torch.float32))] and not [*prepack(nn.Linear(4, 4, dtype=torch.bfloat16))]
    with torch.inference_mode():  # whose tensors do not say whether they changed
        one = layer()
        assert [*prepack(one)] == [one.weight] and one(
            torch.ones(FEW_ROWS, WIDE, dtype=torch.bfloat16)
        ).isfinite().all()
    monkeypatch.setattr(prepacked, "is_of_use", lambda: False)
    assert not [*prepack(layer())]


@pytest.mark.parametrize("kind", ["transformer", "controlnet", "autoencoder", "text_encoder"])
def test_networks_are_built_packed_but_for_what_stays_mapped(tmp_path, monkeypatch, kind):
    unmapped = []
    monkeypatch.setattr(tensorfile, "unmap", unmapped.extend)
    tensors = {name: tensor.bfloat16() for name, tensor in tiny_networks.NATIVE[kind].items()}
    weights = checkpoint.Weights(layouts.PARTS[kind], tiny_networks.MODELS[kind].config, tensors, tmp_path, {})
    built = checkpoint.build(weights, dtype=torch.bfloat16)
    layers = [module for module in built.modules() if isinstance(module, prepacked._Layer)]
    assert bool(layers) == (kind != "text_encoder")
    assert all(isinstance(one.packed, Packed) for one in layers)
    assert [id(one) for one in unmapped] == [id(one.weight) for one in layers]
