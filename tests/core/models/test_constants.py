"""The authors' small constants, each where it shows: at inputs so small, or logits so large, that it decides."""

import copy

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from oracles import TINY, pair, randn, relative_error
from torch import Tensor, nn
from transformers import Gemma2Config

from sprint_core.models import autoencoder, gemma, layers
from sprint_core.models.transformer import SanaTransformer, additive_mask, modulated_norm
from sprint_core.weights.layouts.text_encoder import config_from_hf

S, GUIDANCE = torch.tensor([0.7, 0.2]), torch.tensor([4.5, 2.0])
# What is made small, so that the norm behind it sees squares near its epsilon; diffusers has the same epsilons there.
SMALL = {
    "block": ("patch_embed.proj", 1e-3),
    "query": ("attn1.to_q", 3e-3),
    "key": ("attn1.to_k", 3e-3),
    "caption": ("caption_projection.linear_2", 1e-3),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def inputs() -> tuple[Tensor, Tensor]:
    return randn(2, 32, 4, 6, seed=1), randn(2, 7, TINY["caption_channels"], seed=2)


# --- the transformer ------------------------------------------------------------------------------


def shrunk(layer: str, factor: float) -> tuple[SanaTransformer, SanaTransformer2DModel]:
    """Our transformer and diffusers', in float64, with the layers of that name made small."""
    networks = tuple(copy.deepcopy(network).double() for network in pair("sprint-1.6B"))
    for network in networks:
        found = [module for name, module in network.named_modules() if name.endswith(layer)]
        assert found
        for parameter in (p for module in found for p in module.parameters()):
            parameter.mul_(factor)
    return networks


@pytest.mark.parametrize("name", SMALL)
def test_epsilons_of_the_transformer(name):
    ours, theirs = shrunk(*SMALL[name])
    x, caption = (tensor.double() for tensor in inputs())
    want = theirs(x, caption, S, guidance=0.1 * GUIDANCE, return_dict=False)[0]
    assert relative_error(ours(x, S, caption, GUIDANCE), want) < 1e-4


@pytest.mark.parametrize("modulations", [1, 2])
@pytest.mark.parametrize("grad", [True, False])
def test_epsilon_of_the_modulated_norm(modulations, grad):
    x, shift, scale = (factor * randn(2, 5, 8, seed=i, dtype=torch.float64) for i, factor in enumerate((1e-3, 1, 1)))
    shift, scale = shift[:modulations, :1], scale[:modulations, :1]
    centred = x - x.mean(-1, keepdim=True)
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(modulated_norm(x, shift, scale), want, rtol=1e-12, atol=1e-12)


def test_epsilon_of_linear_attention():
    """1e-8 is the authors'; diffusers has 1e-15."""
    q, k, v = (factor * randn(2, 3, 6, 8, seed=i, dtype=torch.float64) for i, factor in enumerate((1e-5, 1e-4, 1.0)))
    weights = q.relu() @ k.relu().mT
    want = (weights @ v / (weights.sum(-1, keepdim=True) + 1e-8)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layers.relu_linear_attention(q, k, v), want, rtol=1e-12, atol=1e-12)


def test_a_masked_token_is_10000_below_the_others():
    """So it takes part as soon as its logit is 10000 above theirs, as in training."""
    mask = additive_mask(torch.tensor([[1, 0]]), torch.float64)
    q, k, v = torch.ones(1, 1, 4).double(), torch.zeros(1, 2, 4).double(), torch.tensor([[[0.0] * 4, [1.0] * 4]])
    k[0, 1] = 5000.0 + 0.5  # times 4 channels over the root of 4: 10001
    want = torch.full((1, 1, 4), 1 / (1 + torch.tensor(-1.0).double().exp()).item(), dtype=torch.float64)
    torch.testing.assert_close(layers.sdpa(q, k, v.double(), 1, mask), want)


# --- dtypes ---------------------------------------------------------------------------------------


def test_the_time_is_embedded_before_it_is_rounded():
    """bf16 cannot tell 0.9985 from 0.9990, but 998.5 and 999 lie apart in the features of a model of 1000 s."""
    network = copy.deepcopy(pair("sana-1.6B")[0]).bfloat16()
    x, caption = (tensor[:1].bfloat16() for tensor in inputs())
    first, second = (torch.tensor([s]) for s in (0.9990, 0.9985))
    assert first.bfloat16() == second.bfloat16()
    assert relative_error(*(network(x, s, caption).float() for s in (first, second))) > 1e-2


@pytest.mark.parametrize(("trunk", "branch"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_control_residuals_take_the_trunks_dtype(trunk, branch):
    network = copy.deepcopy(pair("sprint-1.6B")[0]).to(trunk)
    (x, caption), residual = (tensor.to(trunk) for tensor in inputs()), randn(2, 24, 64, seed=5)
    got = network(x, S, caption, GUIDANCE, control=[residual.to(branch)])
    want = network(x, S, caption, GUIDANCE, control=[residual.to(branch).to(trunk)])
    assert got.dtype == trunk and torch.equal(got, want)


# --- by rows --------------------------------------------------------------------------------------


def test_every_row_meets_its_own_residual(monkeypatch):
    norm = autoencoder.channel_norm(6, nn)
    x, residual = randn(2, 6, 3, 5), randn(2, 6, 3, 5, seed=2)
    want = norm(x.clone()) + residual
    monkeypatch.setattr(layers, "CACHE_ELEMENTS", 4 * 6)  # four rows at a time, and two that are left
    monkeypatch.setattr(layers, "FEW_ELEMENTS", 0)
    torch.testing.assert_close(norm(x.clone(), residual), want)


# --- DC-AE ------------------------------------------------------------------------------------------


def test_epsilons_of_the_autoencoders_attention():
    """EfficientViT's 1e-15 in the attention and 1e-5 in the norm, as diffusers has them."""
    torch.manual_seed(0)
    settings = {"attention_head_dim": 8, "norm_type": "rms_norm", "kernel_sizes": (5,), "residual_connection": True}
    theirs = SanaMultiscaleLinearAttention(16, 16, **settings).double()
    theirs.to_q.weight.mul_(1e-5)
    theirs.to_k.weight.mul_(1e-4)
    theirs.to_out.weight.mul_(1e-2)
    ours = autoencoder.MultiscaleAttention(16, 8, (5,), nn, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = randn(1, 16, 4, 5, dtype=torch.float64)
    assert relative_error(ours(x.clone()) - x, theirs(x) - x) < 1e-6  # theirs in fp32


# --- Gemma ------------------------------------------------------------------------------------------


def test_the_defaults_are_gemma_2_2bs():
    """transformers' defaults are those of gemma-2-2b; of them norm_eps shows in no shape."""
    assert config_from_hf(Gemma2Config().to_dict()) == gemma.GemmaConfig()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemmas_norm_in_closed_form(dtype):
    """Gain 1 + w, epsilon in both of its terms, in fp32 whatever comes in: rounded once."""
    norm = nn.RMSNorm(64, eps=1e-6)
    norm.weight.copy_(0.3 * randn(64))
    x = (1e-3 * randn(5, 64, seed=2)).to(dtype)
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight.double())
    got = gemma.gemma_norm(norm, x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps * 0.51 + 1e-6, atol=1e-6)
