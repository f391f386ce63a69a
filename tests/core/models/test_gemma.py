"""The Gemma 2 stack against transformers' Gemma2Model on the same weights."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from gemma_oracle import hf_config, random_weights
from torch import nn
from transformers import Gemma2Model

from sprint_core.config import from_dict
from sprint_core.models import layers
from sprint_core.models.gemma import Gemma, GemmaConfig, gemma_norm
from sprint_core.weights.layouts.text_encoder import config_from_hf, infer_config

# query_scale is below head_dim and q and k are drawn wide, so that logits reach the cap of 50.
TINY = GemmaConfig(vocab=97, width=48, depth=3, heads=4, kv_heads=2, head_dim=16, ffn=80, query_scale=1)
GROUPS_OF_4 = replace(TINY, heads=8)
UNGROUPED = replace(TINY, kv_heads=4, depth=2)


def pair(config: GemmaConfig = TINY) -> tuple[Gemma, Gemma2Model]:
    """Ours and the oracle, with equal weights."""
    gemma, oracle = Gemma(config), Gemma2Model(hf_config(config)).eval()
    random_weights(oracle)
    gemma.load_state_dict({f"model.{name}": p for name, p in oracle.state_dict().items()})
    return gemma, oracle


def some_ids(b: int, n: int) -> torch.Tensor:
    return torch.randint(3, TINY.vocab, (b, n), generator=torch.Generator().manual_seed(n))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("config", [TINY, GROUPS_OF_4, UNGROUPED, replace(TINY, softcap=None)])
def test_equals_transformers(config):
    gemma, oracle = pair(config)
    ids = some_ids(2, 40)
    assert error(gemma(ids), oracle(ids).last_hidden_state) < 1e-5


def test_soft_cap_matters_here():
    gemma, _ = pair()
    uncapped = Gemma(replace(TINY, softcap=None))
    uncapped.load_state_dict(gemma.state_dict())
    ids = some_ids(1, 40)
    assert error(uncapped(ids), gemma(ids)) > 1e-2


def test_right_padding_needs_no_mask():
    gemma, oracle = pair()
    ids, mask = some_ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    for row, length in enumerate((20, 13, 1)):
        ids[row, length:] = 0
        mask[row, length:] = 0
    want = oracle(ids, attention_mask=mask).last_hidden_state
    assert error(gemma(ids)[mask.bool()], want[mask.bool()]) < 1e-5


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_layers(layer):
    gemma, oracle = pair()
    ids = some_ids(1, 12)
    states = oracle(ids, output_hidden_states=True).hidden_states  # the last one is normed
    want = states[-1] if layer == -1 else oracle.norm(states[layer])
    assert error(gemma(ids, layer=layer), want) < 1e-5


@pytest.mark.parametrize("p", [1, 17, 29])
@pytest.mark.parametrize("layer", [-1, -2])
def test_prefix_equals_the_full_pass(p, layer):
    gemma, _ = pair(GROUPS_OF_4)
    ids = some_ids(3, 30)
    ids[:, :p] = ids[:1, :p]
    prefix = gemma.prefill(ids[:1, :p], layer=layer)
    full = gemma(ids, layer=layer)
    assert prefix.ids == tuple(ids[0, :p].tolist())
    assert error(prefix.hidden, full[:1, :p]) < 1e-5
    assert error(gemma(ids[:, p:], prefix=prefix, layer=layer), full[:, p:]) < 1e-5


@pytest.mark.parametrize("window", [1, 7, 30])
def test_every_other_layer_sees_a_window(window):
    """In one pass, behind a prefix, and token by token."""
    gemma, oracle = pair(replace(GROUPS_OF_4, sliding_window=window))
    ids = some_ids(1, 30)
    want = oracle(ids).last_hidden_state
    assert error(gemma(ids), want) < 1e-5
    assert error(gemma(ids[:, 12:], prefix=gemma.prefill(ids[:, :12])), want[:, 12:]) < 1e-5
    text = gemma.prefill(ids[:, :12])
    for i in range(12, 30):
        text = gemma.prefill(ids[:, i : i + 1], prefix=text)
    assert text.ids == tuple(ids[0].tolist()) and error(text.hidden, want) < 1e-5
    if window < 30:  # it matters here
        assert error(pair(GROUPS_OF_4)[0](ids), want) > 1e-2


def test_batch_equals_single():
    gemma, _ = pair()
    ids = some_ids(3, 9)
    assert error(torch.cat([gemma(row[None]) for row in ids]), gemma(ids)) < 1e-5


def test_bf16_stays_close():
    gemma, oracle = pair(replace(TINY, query_scale=16))
    ids = some_ids(1, 30)
    want = gemma(ids)
    low = Gemma(gemma.config, dtype=torch.bfloat16)
    low.load_state_dict(gemma.state_dict())
    assert low.model.layers[0].input_layernorm.weight.dtype == torch.float32
    got = low(ids)
    assert got.dtype == torch.bfloat16
    mean = (got.float() - want).abs().mean() / want.abs().mean()
    theirs = (oracle.bfloat16()(ids).last_hidden_state.float() - want).abs().mean() / want.abs().mean()
    assert mean < max(0.03, 1.2 * theirs)


class Host:
    """Operations as a host has them: stored in bf16, cast to the input's dtype as they run."""

    class Linear(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype))

    class RMSNorm(nn.RMSNorm):
        def forward(self, x):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)

    Embedding = nn.Embedding


class CastNorm(Host.RMSNorm):
    comfy_cast_weights = True

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("norm", [nn.RMSNorm(24, eps=0.1), CastNorm(24, eps=0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_a_norm_in_few_passes_is_the_norm(norm, dtype, columns, monkeypatch):
    """With gain 1 + w, its argument kept."""
    monkeypatch.setattr(layers, "FEW_ELEMENTS", 0)
    norm.weight.data = torch.randn(24, generator=torch.Generator().manual_seed(0))
    x, residual = torch.randn(2, 2, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    if columns:  # as mapped.py leaves them side by side
        x = x.flatten(0, -2).T.contiguous().T.unflatten(0, (2, 5))
    kept, gain = x.clone(), 1 + norm.weight.double() * (2 if isinstance(norm, CastNorm) else 1)
    want = x.double() * (x.double().square().mean(-1, keepdim=True) + 0.1).rsqrt() * gain
    tolerance = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for more in (None, residual):
        got = gemma_norm(norm, x, more)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want if more is None else want + more.double(), **tolerance)
    assert torch.equal(x, kept)


def test_host_operations_compute_in_the_requested_dtype():
    gemma, _ = pair()
    gemma.load_state_dict({k: v.bfloat16().float() for k, v in gemma.state_dict().items()})
    hosted = Gemma(TINY, ops=Host, dtype=torch.bfloat16)
    hosted.load_state_dict({k: v.bfloat16() for k, v in gemma.state_dict().items()}, assign=True)
    ids = some_ids(2, 15)
    assert error(hosted(ids, dtype=torch.float32), gemma(ids)) < 1e-6
    prefix = hosted.prefill(ids[:1, :4], dtype=torch.float32)
    assert error(hosted(ids[:1, 4:], prefix=prefix, dtype=torch.float32), gemma(ids[:1])[:, 4:]) < 1e-5


def test_every_parameter_belongs_to_an_operation():
    leaves = (nn.Linear, nn.Embedding, nn.RMSNorm)
    gemma = Gemma(TINY)
    owned = {id(p) for m in gemma.modules() if isinstance(m, leaves) for p in m.parameters()}
    assert owned == {id(p) for p in gemma.parameters()} and not list(gemma.buffers())


def test_full_size():
    gemma = Gemma(GemmaConfig(), device="meta")
    assert sum(p.numel() for p in gemma.parameters()) == 2_614_341_888
    shapes = {name: tuple(p.shape) for name, p in gemma.state_dict().items()}
    assert shapes["model.layers.25.self_attn.k_proj.weight"] == (1024, 2304)
    assert infer_config(shapes) == GemmaConfig()


def test_configs():
    assert config_from_hf(hf_config(TINY).to_dict()) == TINY
    assert config_from_hf({"model_type": "gemma2", "rope_theta": 5.0}).rope_theta == 5.0  # transformers 4
    assert from_dict(GemmaConfig, asdict(TINY)) == TINY
    shapes = {name: tuple(p.shape) for name, p in Gemma(TINY).state_dict().items()}
    assert infer_config(shapes, head_dim=16) == replace(TINY, query_scale=16)
    with pytest.raises(ValueError, match="size"):
        from_dict(GemmaConfig, {"size": 1})
    with pytest.raises(ValueError, match="llama"):
        config_from_hf({"model_type": "llama"})
    with pytest.raises(ValueError, match="heads of 256"):
        infer_config(shapes)
    del shapes["model.layers.0.post_feedforward_layernorm.weight"]
    with pytest.raises(ValueError, match="post_feedforward"):
        infer_config(shapes, head_dim=16)


def test_refusals():
    gemma, _ = pair()
    ids = some_ids(1, 6)
    prefix = gemma.prefill(ids)
    with pytest.raises(ValueError, match="layer -4"):
        gemma(ids, layer=-4)
    with pytest.raises(ValueError, match="layer -1, not -2"):
        gemma(ids[:, :2], prefix=prefix, layer=-2)


def test_a_prefix_keeps_its_keys_and_values_alone():
    """And not the queries beside them, which would be twice as much."""
    gemma, _ = pair()
    whole = gemma.prefill(some_ids(1, 12))
    longer = gemma.prefill(some_ids(1, 3), prefix=whole)
    for prefix in (whole, longer):
        for kept in (*prefix.keys, *prefix.values):
            assert kept.untyped_storage().nbytes() == kept.nbytes
