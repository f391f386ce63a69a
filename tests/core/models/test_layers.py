"""The shared layers against their definitions in float64, and against diffusers' modules."""

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, get_2d_sincos_pos_embed, get_timestep_embedding
from diffusers.models.transformers.sana_transformer import GLUMBConv as DiffusersGLUMBConv
from oracles import randn, relative_error

from sprint_core.models import layers
from sprint_core.models.transformer import PatchEmbed, TransformerConfig


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> torch.nn.Module:
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours


def test_linear_attention_is_attention_with_relu_weights():
    q, k, v = (randn(2, 3, 40, 8, seed=i) for i in range(3))
    weights = q.double().relu() @ k.double().relu().mT
    want = (weights / weights.sum(-1, keepdim=True) @ v.double()).transpose(1, 2).flatten(2)
    assert relative_error(layers.relu_linear_attention(q, k, v).double(), want) < 1e-5


def test_linear_attention_by_some_heads_is_the_same(monkeypatch):
    q, k, v = (randn(2, 5, 40, 8, seed=i) for i in range(3))
    want = layers.relu_linear_attention(q, k, v)
    monkeypatch.setattr(layers, "CACHE_ELEMENTS", 2 * 2 * 40 * 8)  # two heads, and one that is left
    torch.testing.assert_close(layers.relu_linear_attention(q, k, v), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_attention_accumulates_in_fp32(dtype):
    """4096 tokens with values of 30 would reach 4e6 in the products: beyond fp16, and below bf16's resolution."""
    q, k, v = (randn(1, 1, 4096, 8, seed=i).mul(30).to(dtype) for i in range(3))
    want = layers.relu_linear_attention(q.double(), k.double(), v.double())
    got = layers.relu_linear_attention(q, k, v)
    assert got.dtype == dtype and relative_error(got.double(), want) < torch.finfo(dtype).eps / 2


def test_linear_attention_of_nothing_is_zero():
    q, v = randn(1, 1, 4, 8), randn(1, 1, 4, 8)
    assert not layers.relu_linear_attention(q, -torch.ones_like(q), v).any()


def test_softmax_attention():
    q, k, v = randn(2, 5, 12, seed=1), randn(2, 7, 12, seed=2), randn(2, 7, 12, seed=3)
    mask = torch.zeros(2, 1, 1, 7)
    mask[1, ..., 4:] = layers.MASKED
    got = layers.sdpa(q, k, v, 3, mask)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        logits = q[..., part] @ k[..., part].mT / 2 + mask[:, 0]
        torch.testing.assert_close(got[..., part], logits.softmax(-1) @ v[..., part])


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_timestep_features(scale):
    t = torch.linspace(0, 1, 9) * scale
    want = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(layers.timestep_embedding(t), want, rtol=0, atol=1e-6)
    assert layers.timestep_embedding(t.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("height", "width", "base", "scale"), [(4, 4, 4, 1.0), (3, 8, 64, 1.0), (6, 2, 128, 2.0)])
def test_position_embedding(height, width, base, scale):
    want = get_2d_sincos_pos_embed(
        64, (height, width), base_size=base, interpolation_scale=scale, output_type="pt", device="cpu"
    )
    got = layers.sincos_2d(*(layers.sincos_axis(n, 64, base, scale, torch.device("cpu")) for n in (height, width)))
    assert got.shape == (1, height * width, 64)
    torch.testing.assert_close(got[0], want.float(), rtol=0, atol=1e-5)


def test_embedder():
    torch.manual_seed(0)
    theirs = TimestepEmbedding(256, 16)
    ours = same_weights(layers.MLP(256, 16, torch.nn.SiLU()), theirs)
    assert torch.equal(ours(randn(3, 256)), theirs(randn(3, 256)))


@pytest.mark.parametrize("grad", [True, False], ids=["differentiable", "in place"])
def test_gated_convolution(grad):
    torch.manual_seed(0)
    theirs = DiffusersGLUMBConv(12, 12, 2.5, norm_type=None, residual_connection=False)
    ours = same_weights(layers.GLUMBConv(12, 2.5), theirs)
    x = randn(2, 12, 3, 5)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x), theirs(x))


def test_positions_are_kept_as_long_as_they_are_of_the_size():
    embed = PatchEmbed(TransformerConfig(width=64, depth=1, cross_heads=2, pos_embed_base=8))
    small, large = randn(1, 32, 2, 3), randn(1, 32, 3, 2)
    first = embed(small)
    kept = embed._axes[1]
    assert torch.equal(embed(small), first) and embed._axes[1] is kept
    assert not torch.equal(embed(large)[:, :6], first) and embed._axes[1] is not kept
    assert torch.equal(embed(small), first)


def test_tables_follow_the_activations():
    table = torch.nn.Embedding(6, 4)
    rows = layers.table_rows(table, 2, torch.empty(1, dtype=torch.bfloat16))
    assert torch.equal(rows, table.weight[:2].bfloat16())


def test_unset_operations_are_those_of_torch_but_for_their_first_values():
    for name, sizes in {"Linear": (3, 4), "Conv2d": (3, 4, 1), "Embedding": (3, 4), "RMSNorm": (3,)}.items():
        made = getattr(layers.Unset, name)(*sizes)
        assert isinstance(made, getattr(torch.nn, name))
        torch.manual_seed(0)
        before = torch.get_rng_state()
        getattr(layers.Unset, name)(*sizes)
        assert torch.equal(torch.get_rng_state(), before)
