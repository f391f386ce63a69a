"""The linear transformer against diffusers' on the same weights, for every published variant."""

import copy
import dataclasses

import pytest
import torch
from diffusers import SanaTransformer2DModel
from oracles import PUBLISHED, QK, SPRINT, TEACHER, TINY, pair, randn, relative_error, shapes_of
from torch import nn

from sprint_core.config import from_dict
from sprint_core.models import layers
from sprint_core.models.transformer import SanaTransformer, TransformerConfig, modulated_norm, qk_norms
from sprint_core.weights import keymaps, layouts, presets
from sprint_core.weights.layouts.transformer import config_from_diffusers, infer_config
from sprint_core.weights.presets import PRESETS

# Parameters and tensors at full size.
FULL = {
    "sprint-0.6B": (593_501_216, 664),
    "sprint-1.6B": (1_610_237_472, 480),
    "sprint-0.6B-teacher": (591_876_896, 660),
    "sprint-1.6B-teacher": (1_604_641_952, 476),
    "sana-0.6B": (591_747_872, 548),
    "sana-1.6B": (1_604_462_752, 396),
    "sana-0.6B-512": (591_747_872, 548),
    "sana-1.6B-512": (1_604_462_752, 396),
    "sana-1.6B-512-multiling": (1_604_462_752, 396),
    "sana-1.6B-multiling": (1_604_462_752, 396),
    "sana-1.6B-2K": (1_604_462_752, 396),
    "sana-1.6B-4K": (1_604_462_752, 396),
    "sana-1.5-1.6B": (1_604_641_952, 476),
    "sana-1.5-4.8B": (4_721_825_952, 1396),
}
SIZE = (4, 6)  # of the latent, not square
S = torch.tensor([0.7, 0.2])
GUIDANCE = torch.tensor([4.5, 2.0])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and captions of two images."""
    return randn(2, 32, *SIZE, seed=1), randn(2, 7, TINY["caption_channels"], seed=2)


def run_diffusers(model: SanaTransformer2DModel, x: torch.Tensor, caption: torch.Tensor, **more) -> torch.Tensor:
    """As its pipelines call it: Sprint with s, the others with 1000 s times `timestep_scale`."""
    has_guidance = model.config.guidance_embeds
    time = S if has_guidance else 1000 * S * model.config.timestep_scale
    guidance = GUIDANCE * model.config.guidance_embeds_scale if has_guidance else None
    return model(x, caption, time, guidance=guidance, return_dict=False, **more)[0]


# --- against diffusers ----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_diffusers(name, masked):
    ours, theirs = pair(name)
    x, caption = inputs()
    mask = MASK if masked else None
    want = run_diffusers(theirs, x, caption, encoder_attention_mask=mask)
    got = ours(x, S, caption, GUIDANCE if ours.config.guidance_embed else None, mask)
    assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize("name", ["sana-1.6B-2K", "sana-1.6B-4K"])
@pytest.mark.parametrize("size", [(2, 9), (8, 8), (5, 1)])
def test_position_embeddings_fit_any_size(name, size):
    ours, theirs = pair(name)
    x, caption = randn(2, 32, *size), inputs()[1]
    assert relative_error(ours(x, S, caption), run_diffusers(theirs, x, caption)) < 1e-4


def test_position_embeddings_matter():
    x, caption = inputs()
    plain, at_2k, at_4k = (pair(name)[0](x, S, caption) for name in ("sana-1.6B", "sana-1.6B-2K", "sana-1.6B-4K"))
    assert relative_error(at_2k, plain) > 1e-2
    assert torch.equal(at_2k, at_4k)  # both stretch any size over 64 positions: 64 / 1 and 128 / 2


def test_cross_attention_norms_have_the_authors_epsilon():
    """1e-6, where diffusers has 1e-5; it shows only where queries and keys are small."""
    ours, theirs = copy.deepcopy(pair("sprint-1.6B"))
    for block in (*ours.transformer_blocks, *theirs.transformer_blocks):
        for layer in (block.attn2.to_q, block.attn2.to_k):
            layer.weight.mul_(3e-3)
            layer.bias.zero_()
    x, caption = inputs()
    got = ours(x, S, caption, GUIDANCE)
    assert relative_error(got, run_diffusers(theirs, x, caption)) > 1e-3
    for block in theirs.transformer_blocks:
        block.attn2.norm_q.eps = block.attn2.norm_k.eps = 1e-6
    assert relative_error(got, run_diffusers(theirs, x, caption)) < 1e-5


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_norms_of_queries_and_keys_have_their_epsilon(eps, monkeypatch):
    """In few passes as by torch's own; and none where a model has none."""
    monkeypatch.setattr(layers, "FEW_ELEMENTS", 0)
    norm, x = nn.RMSNorm(24, eps=eps), 0.01 * randn(2, 5, 24)
    norm.weight.data = randn(24, seed=3)
    want = norm(x)
    other, keys = nn.RMSNorm(24, eps=eps), x[:, :3] + 1
    with torch.no_grad():
        q, k = qk_norms(norm, other, x.clone(), keys.clone())
        torch.testing.assert_close((q, k), (want, other(keys)))
    tangent = torch.func.jvp(lambda y: qk_norms(norm, other, y.clone(), y.clone()), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent[0], torch.func.jvp(norm, (x,), (torch.ones_like(x),))[1])
    none = nn.Identity()
    assert qk_norms(none, none, x, keys) == (x, keys)


class Doubling(nn.RMSNorm):
    """As hosts' layers do that cast or patch their weight on its way."""

    comfy_cast_weights = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("norm", [nn.RMSNorm(24, eps=1e-5), Doubling(24, eps=1e-5)])
@torch.no_grad()
def test_norms_of_queries_and_keys_round_once_or_not_at_all(norm, monkeypatch):
    monkeypatch.setattr(layers, "FEW_ELEMENTS", 0)
    monkeypatch.setattr(layers, "CACHE_ELEMENTS", 3 * 24)  # blocks of three rows, and one that is left
    norm.weight.data = randn(24, seed=3).bfloat16()
    x = randn(2, 5, 24).bfloat16()
    want = norm(x.double()).float()
    exact = qk_norms(norm, norm, x.clone(), x[:, :3].clone(), rounds=False)
    torch.testing.assert_close(exact, (want, want[:, :3]))
    rounded = qk_norms(norm, norm, x.clone(), x[:, :3].clone())
    torch.testing.assert_close(rounded, tuple(y.bfloat16() for y in exact), rtol=0, atol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_modulated_norms_of_a_batch_round_as_those_of_one(grad):
    x, (shift, scale) = randn(3, 5, 64).bfloat16(), randn(2, 3, 1, 64, seed=1).bfloat16()
    with torch.set_grad_enabled(grad):
        batch = modulated_norm(x, shift, scale)
        each = [modulated_norm(*(y[i : i + 1] for y in (x, shift, scale))) for i in range(3)]
    assert torch.equal(batch, torch.cat(each))


def test_control_residuals():
    """Entry i is added after block i; diffusers adds its residual k after block k + 1."""
    ours, theirs = pair("sprint-1.6B")
    x, caption = inputs()
    residuals = tuple(randn(2, 24, 64, seed=i) for i in (5, 6))
    want = run_diffusers(theirs, x, caption, controlnet_block_samples=residuals)
    assert relative_error(ours(x, S, caption, GUIDANCE, control=(None, *residuals)), want) < 1e-4

    plain = ours(x, S, caption, GUIDANCE)
    zero = torch.zeros(1, 24, 64)
    assert torch.equal(ours(x, S, caption, GUIDANCE, control=[zero] * 3), plain)
    one = randn(1, 24, 64)
    shared = ours(x, S, caption, GUIDANCE, control=[one])
    assert torch.equal(shared, ours(x, S, caption, GUIDANCE, control=[one.expand(2, -1, -1)]))
    assert relative_error(shared, plain) > 1e-2


# --- exact properties -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sprint-1.6B", "sana-1.6B"])
def test_masking_is_trimming_and_a_batch_is_its_images(name):
    ours, _ = pair(name)
    x, caption = inputs()
    batch = ours(x, S, caption, GUIDANCE, MASK)  # models without guidance ignore it
    for i, length in enumerate(MASK.sum(1).tolist()):
        one = slice(i, i + 1)
        assert relative_error(batch[one], ours(x[one], S[one], caption[one, :length], GUIDANCE[one])) < 1e-5


def test_guidance_and_time_count():
    ours, _ = pair("sprint-1.6B")
    x, caption = inputs()
    base = ours(x, S, caption, GUIDANCE)
    assert relative_error(ours(x, S, caption, GUIDANCE + 1), base) > 1e-3
    assert relative_error(ours(x, S + 0.1, caption, GUIDANCE), base) > 1e-3


def test_around_block():
    ours, _ = pair("sprint-1.6B")
    x, caption = inputs()
    plain, seen = ours(x, S, caption, GUIDANCE), []

    def around(i, run, tokens, text):
        seen.append((i, tuple(tokens.shape), tuple(text.shape)))
        return run(tokens, text)

    assert torch.equal(ours(x, S, caption, GUIDANCE, around_block=around), plain)
    assert seen == [(i, (2, 24, 64), (2, 7, 64)) for i in range(3)]
    skipped = ours(x, S, caption, GUIDANCE, around_block=lambda i, run, x, c: x if i == 1 else run(x, c))
    assert relative_error(skipped, plain) > 1e-2


def test_attention_is_an_argument():
    ours, _ = pair("sprint-1.6B")
    x, caption = inputs()
    calls = []

    def attention(q, k, v, heads, mask):
        calls.append(heads)
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    got = ours(x, S, caption, GUIDANCE, MASK, attention=attention)
    assert calls == [4, 4, 4]
    assert relative_error(got, ours(x, S, caption, GUIDANCE, MASK)) < 1e-5


def test_bf16_stays_near():
    ours, _ = pair("sprint-1.6B")
    x, caption = inputs()
    want = ours(x, S, caption, GUIDANCE)
    got = copy.deepcopy(ours).bfloat16()(x.bfloat16(), S, caption.bfloat16(), GUIDANCE)
    assert got.dtype == torch.bfloat16 and relative_error(got.float(), want) < 0.05


@pytest.mark.parametrize("settings", [SPRINT, TEACHER, {}], ids=["sprint", "teacher", "sana"])
def test_every_parameter_comes_from_ops(settings):
    made = []

    def counted(base):
        class Counted(base):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                made.append(self)

        return Counted

    class Ops:
        Linear, Conv2d, RMSNorm, Embedding = map(counted, (nn.Linear, nn.Conv2d, nn.RMSNorm, nn.Embedding))

    model = SanaTransformer(config_from_diffusers(TINY | settings), ops=Ops, dtype=torch.bfloat16, device="meta")
    owned = {id(p) for module in made for p in module.parameters(recurse=False)}
    assert owned == {id(p) for p in model.parameters()} and not list(model.buffers())
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}


# --- full size ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_full_size(name):
    config = PRESETS[name].transformer
    model = SanaTransformer(config, device="meta")
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == FULL[name]
    published = {
        "num_attention_heads": config.width // 32,
        "num_layers": config.depth,
        "num_cross_attention_heads": 16 if config.width == 1152 else 20,
        "cross_attention_head_dim": 72 if config.width == 1152 else 112,
        "cross_attention_dim": config.width,
        **PUBLISHED[name],
    }
    assert config_from_diffusers({"attention_head_dim": 32, **published}) == config
    assert presets.name_of(config) == name.removesuffix("-multiling").removesuffix("-512")
    assert PRESETS[name].size_px == 32 * PUBLISHED[name].get("sample_size", 32)

    shapes = shapes_of(model)
    if config.pos_embed_base:
        shapes["pos_embed"] = (1, config.pos_embed_base**2, config.width)
    looks_like = PRESETS["sana-1.5-1.6B"].transformer if name == "sprint-1.6B-teacher" else config
    assert infer_config(shapes) == looks_like


@pytest.mark.parametrize("name", ["sprint-0.6B", "sprint-1.6B-teacher", "sana-1.6B"])
def test_full_size_has_the_names_and_shapes_of_diffusers(name):
    config = PRESETS[name].transformer
    settings = {"num_attention_heads": config.width // 32, "num_layers": config.depth, **PUBLISHED[name]}
    settings |= {"num_cross_attention_heads": config.cross_heads, "cross_attention_dim": config.width}
    with torch.device("meta"):
        theirs = SanaTransformer2DModel(**settings, cross_attention_head_dim=config.width // config.cross_heads)
    native = keymaps.to_native(theirs.state_dict(), layouts.transformer.DIFFUSERS)
    assert {k: tuple(v.shape) for k, v in native.items()} == shapes_of(SanaTransformer(config, device="meta"))


def test_presets_are_named_after_their_repositories():
    assert PRESETS["sprint-1.6B"].hub_id == "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers"
    assert len({preset.repo for preset in PRESETS.values()}) == len(PRESETS)
    assert presets.name_of(TransformerConfig(width=96, cross_heads=3)) == "custom"


# --- refusals -------------------------------------------------------------------------------------


def test_refuses_bad_input():
    ours, _ = pair("sprint-1.6B")
    x, caption = inputs()
    with pytest.raises(ValueError, match="32 channels, this one 4"):
        ours(x[:, :4], S, caption, GUIDANCE)
    with pytest.raises(ValueError, match="pass guidance"):
        ours(x, S, caption)


def test_refuses_unknown_settings():
    config = TransformerConfig(qk_norm=False)
    assert from_dict(TransformerConfig, dataclasses.asdict(config)) == config
    with pytest.raises(ValueError, match="no setting novelty"):
        from_dict(TransformerConfig, {"novelty": 1})
    with pytest.raises(ValueError, match="FluxTransformer2DModel"):
        config_from_diffusers({**TINY, "_class_name": "FluxTransformer2DModel"})
    with pytest.raises(KeyError):
        config_from_diffusers(QK)


def test_inference_refuses_unpublished_sizes():
    ours, _ = pair("sprint-1.6B")
    with pytest.raises(ValueError, match=r"width 64 and 3 blocks; a config\.json is needed"):
        infer_config(shapes_of(ours))
