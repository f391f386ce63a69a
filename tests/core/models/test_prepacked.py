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
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import PACKED
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
        output = product(self, x)
        made.append("plain" if output is None else "packed")
        return output

    monkeypatch.setattr(prepacked._Layer, "_product", spy)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 40, WIDE), (FEW_ROWS, WIDE), (3, 5, 7, WIDE)])
def test_a_packed_layer_is_the_layer(calls, shape, bias):
    x, one = torch.randn(shape, dtype=torch.bfloat16), layer(bias=bias)
    done = []
    prepack(one, done.append)
    assert len(done) == 1 and done[0] is one.weight
    with torch.no_grad():
        output = one(x)
        swapped = one(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert calls == ["packed"] * 2
    exact = F.linear(x.double(), one.weight.double(), None if one.bias is None else one.bias.double())
    assert output.dtype == torch.bfloat16 and output.shape == exact.shape
    assert (output - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert torch.equal(output, swapped)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_packed_convolution_is_the_convolution(calls, memory_format):
    one = layer("PointwiseConv")
    images = torch.randn(2, WIDE, 6, 5, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
    with torch.no_grad():
        plain = one(images)
        prepack(one)
        output = one(images)
    assert calls == ["plain", "packed"] and output.shape == plain.shape
    assert (output - plain).abs().max() <= 2**-7 * plain.abs().max()


def test_where_a_packed_weight_does_not_serve(calls):
    """Few rows, gradients, tangents, other dtypes: what the layer without one returns, bit for bit."""
    one, other = layer(), layer()
    prepack(one)
    x = torch.randn(FEW_ROWS, WIDE, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(one(x[1:]), other(x[1:]))
        with forward_ad.dual_level():
            output = one(forward_ad.make_dual(x, torch.ones_like(x)))
            tangent = forward_ad.unpack_dual(output).tangent
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


@pytest.mark.parametrize("change", ["in place", "another", "loaded", "data"])
def test_a_weight_that_changed_is_what_counts(calls, change):
    one, other = layer(), layer()
    x = torch.randn(FEW_ROWS, WIDE, dtype=torch.bfloat16)
    prepack(one)
    with torch.no_grad():
        other.weight.mul_(-2)
        if change == "in place":
            one.weight.mul_(-2)
        elif change == "another":
            replaced = one.weight
            one.weight = nn.Parameter(torch.empty_like(replaced), requires_grad=False)
            one.weight.copy_(other.weight)
            assert one.weight._version == replaced._version
        elif change == "data":
            one.weight.data = other.weight.clone()
        else:
            one.load_state_dict(other.state_dict())
        assert torch.equal(one(x), other(x))
    assert calls == ["plain"] * 2


def test_a_copy_has_no_packed_weights():
    one = layer()
    prepack(one)
    assert isinstance(one.packed, Packed)
    assert copy.deepcopy(one).packed is None and pickle.loads(pickle.dumps(one.packed)) is None
    assert one.state_dict().keys() == layer().state_dict().keys()


def test_what_is_not_packed(monkeypatch):
    """Other dtypes, layers of other kinds, weights that do not say whether they changed, a CPU of no use."""
    with torch.inference_mode():
        unknown = layer()
    others = [layer(dtype=torch.float32), nn.Linear(4, 4, dtype=torch.bfloat16), unknown]
    prepack(nn.ModuleList(others), done=pytest.fail)
    assert unknown.packed is None
    monkeypatch.setattr(prepacked, "is_of_use", lambda: False)
    prepack(layer(), done=pytest.fail)


def test_operations_of_packed_products_are_counted():
    one, x = layer(), torch.randn(20, WIDE, dtype=torch.bfloat16)
    prepack(one)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=PACKED) as counter:
        one(x)
    assert counter.get_total_flops() == 2 * 20 * WIDE * OUT


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
