"""ControlNet: diffusers' on the same weights, the authors' wiring written out, and every published layout."""

import dataclasses
import json
from functools import cache

import pytest
import standin
import torch
from diffusers import SanaControlNetModel
from oracles import TINY, pair, randn, relative_error
from tiny_networks import save
from torch import nn

from sprint_core.models import controlnet
from sprint_core.models.controlnet import AUTHORS, DIFFUSERS, ControlNetConfig, SanaControlNet
from sprint_core.models.transformer import SanaTransformer, TransformerConfig
from sprint_core.weights import checkpoint, keymaps, layouts, presets, tensorfile
from sprint_core.weights.checkpoint import CheckpointError, load
from sprint_core.weights.kinds import parts_in
from sprint_core.weights.layouts.controlnet import config_from_diffusers
from sprint_core.weights.presets import PRESETS

SIZE = (4, 6)
S = torch.tensor([0.7, 0.2])
GUIDANCE = torch.tensor([4.5, 2.0])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
X, CAPTION, HINT = randn(2, 32, *SIZE, seed=1), randn(2, 7, TINY["caption_channels"], seed=2), randn(1, 32, *SIZE)
TRUNK = TransformerConfig(width=64, depth=4, cross_heads=2, caption_width=24)
COUNTS = {"0.6B": (1152, 16, 168_765_696), "1.6B": (2240, 20, 631_576_960)}  # width, heads, parameters in diffusers


@pytest.fixture
def tiny_row(monkeypatch):
    """A published model of the tiny size, so that shapes alone tell its configuration."""
    monkeypatch.setitem(presets.PRESETS, "tiny", presets.Preset("tiny", "Tiny_diffusers", TRUNK, 64))


@cache
def theirs(blocks: int = 2) -> SanaControlNetModel:
    model = SanaControlNetModel(**(TINY | {"num_layers": blocks})).eval().requires_grad_(False)
    model.load_state_dict(standin.random_model(model, seed=3))
    return model


def ours(model: nn.Module) -> SanaControlNet:
    branch = SanaControlNet(config_from_diffusers(dict(model.config)), device="meta")
    branch.load_state_dict(keymaps.to_native(model.state_dict(), layouts.transformer.DIFFUSERS), assign=True)
    return branch.requires_grad_(False)


def of_config(**settings) -> SanaControlNet:
    """A branch of TRUNK with random weights."""
    fields = dataclasses.asdict(TRUNK) | {"depth": 2} | settings
    branch = SanaControlNet(ControlNetConfig(**fields), device="meta")
    branch.load_state_dict(standin.random_model(branch, seed=4), assign=True)
    return branch.requires_grad_(False)


@cache
def trunk() -> SanaTransformer:
    model = SanaTransformer(TRUNK, device="meta")
    model.load_state_dict(standin.random_model(model, seed=5), assign=True)
    return model.requires_grad_(False)


# --- the network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", ["sprint-1.6B", "sana-1.6B"])
def test_equals_diffusers(name, masked):
    """Both networks together: the branch's residuals in the trunk, at a strength."""
    base, diffusers_base = pair(name)
    mask = MASK if masked else None
    samples = theirs()(X, CAPTION, 1000 * S, HINT.expand(2, -1, -1, -1), 0.7, encoder_attention_mask=mask)[0]
    has_guidance = base.config.guidance_embed
    want = diffusers_base(
        X,
        CAPTION,
        S if has_guidance else 1000 * S,
        guidance=0.1 * GUIDANCE if has_guidance else None,
        encoder_attention_mask=mask,
        controlnet_block_samples=tuple(samples),
        return_dict=False,
    )[0]
    residuals = ours(theirs())(X, S, CAPTION, HINT, mask=mask)
    control = [r if r is None else 0.7 * r for r in residuals]
    got = base(X, S, CAPTION, GUIDANCE if has_guidance else None, mask, control)
    assert relative_error(got, want) < 1e-4
    assert relative_error(base(X, S, CAPTION, GUIDANCE if has_guidance else None, mask), want) > 1e-2


def test_authors_wiring_in_a_few_lines():
    """Their SanaMSControlNet: copies fed by trunk block 0 and the projected hint, added before the next blocks."""
    model = trunk()
    branch = controlnet.copy_trunk(model, 2)
    own = standin.random_model(branch, seed=6)
    branch.load_state_dict({k: own[k] if k.startswith(controlnet.OWN) else v for k, v in branch.state_dict().items()})
    conditioning = model.embed_conditioning(X, S, CAPTION, GUIDANCE, MASK, controlnet.sdpa)
    block = lambda i, x: model.transformer_blocks[i](x, conditioning.caption, conditioning)  # noqa: E731

    x = block(0, model.patch_embed(X))
    c = branch.transformer_blocks[0](
        x + branch.input_block(branch.patch_embed(HINT)), conditioning.caption, conditioning
    )
    x = block(1, x + branch.controlnet_blocks[0](c))
    c = branch.transformer_blocks[1](c, conditioning.caption, conditioning)
    x = block(3, block(2, x + branch.controlnet_blocks[1](c)))
    shift, scale = (model.scale_shift_table.weight[None] + conditioning.embedding).chunk(2, dim=1)
    want = model.proj_out(nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)

    got = model(X, S, CAPTION, GUIDANCE, MASK, branch(X, S, CAPTION, HINT, GUIDANCE, MASK))
    assert relative_error(got, want.transpose(1, 2).reshape(X.shape)) < 1e-5


@pytest.mark.parametrize("wiring", controlnet.WIRINGS)
def test_residuals_start_where_the_wiring_says(wiring):
    residuals = of_config(wiring=wiring)(X, S, CAPTION, HINT, GUIDANCE)
    assert [r is None for r in residuals] == ([False] * 2 if wiring == AUTHORS else [True, False, False])
    assert all(r.shape == (2, 24, 64) for r in residuals if r is not None)


@pytest.mark.parametrize("wiring", controlnet.WIRINGS)
def test_untrained_changes_nothing(wiring):
    branch = controlnet.copy_trunk(trunk(), 2, wiring)
    control = branch(X, S, CAPTION, HINT, GUIDANCE, MASK)
    plain = trunk()(X, S, CAPTION, GUIDANCE, MASK)
    assert torch.equal(trunk()(X, S, CAPTION, GUIDANCE, MASK, control), plain)


@pytest.mark.parametrize("wiring", controlnet.WIRINGS)
def test_batch_equals_singles(wiring):
    branch = of_config(wiring=wiring)
    hints = randn(2, 32, *SIZE, seed=8)
    together = branch(X, S, CAPTION, hints, GUIDANCE, MASK)
    for i in range(2):
        one = slice(i, i + 1)
        alone = branch(X[one], S[one], CAPTION[one], hints[one], GUIDANCE[one], MASK[one])
        assert max(relative_error(a, b[one]) for a, b in zip(alone, together, strict=True) if a is not None) < 1e-5
    expanded = branch(X, S, CAPTION, HINT.expand(2, -1, -1, -1), GUIDANCE, MASK)
    assert all(
        torch.equal(a, b)
        for a, b in zip(branch(X, S, CAPTION, HINT, GUIDANCE, MASK), expanded, strict=True)
        if a is not None
    )


def test_the_time_convention_is_its_own():
    """A branch of SANA 1.0 embeds 1000 s, one of a Sprint s."""
    sana, sprint = of_config(time_scale=1000.0), of_config(time_scale=1.0)
    assert torch.equal(sana(X, S / 1000, CAPTION, HINT, GUIDANCE)[0], sprint(X, S, CAPTION, HINT, GUIDANCE)[0])


def test_merging():
    a, b = of_config(wiring=AUTHORS), of_config(wiring=DIFFUSERS)
    first, second = (m(X, S, CAPTION, HINT, GUIDANCE) for m in (a, b))
    total = controlnet.sum_residuals([first, second])
    assert len(total) == 3
    assert torch.equal(total[0], first[0]) and torch.equal(total[2], second[2])
    assert torch.equal(total[1], first[1] + second[1])
    assert controlnet.sum_residuals([[None, first[0]], [None]]) == [None, first[0]]
    assert controlnet.sum_residuals([]) == []


@pytest.mark.parametrize("hint", [randn(1, 32, 4, 5), randn(3, 32, *SIZE), randn(1, 4, *SIZE)])
def test_a_hint_that_does_not_fit(hint):
    with pytest.raises(ValueError, match="the control image's latent is"):
        of_config()(X, S, CAPTION, hint, GUIDANCE)


def test_an_unknown_wiring():
    with pytest.raises(ValueError, match=r"ControlNetConfig.wiring is 'theirs'; it must be 'authors' or 'diffusers'"):
        ControlNetConfig(wiring="theirs")


# --- files --------------------------------------------------------------------------------------------


def authors_pth(branch: SanaControlNet, depth: int = 4) -> dict[str, torch.Tensor]:
    """The authors' file of a branch: a whole trunk around it."""
    config = dataclasses.replace(TRUNK, guidance_embed=False, depth=depth, qk_norm=branch.config.qk_norm)
    base = SanaTransformer(config, device="meta")
    whole = keymaps.from_native(standin.random_model(base, seed=9), layouts.transformer.NVLABS)
    return whole | keymaps.from_native(branch.state_dict(), layouts.controlnet.NVLABS)


@pytest.fixture
def published() -> SanaControlNet:
    """As the released ones: of SANA 1.0."""
    return of_config(guidance_embed=False, qk_norm=False, time_scale=1000.0)


def test_authors_pth(tmp_path, tiny_row, published):
    path = tmp_path / "Sana_ControlNet_HED.pth"
    torch.save({"state_dict": authors_pth(published)}, path)
    weights = load(path, layouts.CONTROLNET)
    assert weights.config == published.config
    got = checkpoint.build(weights)
    want = published(X, S, CAPTION, HINT, None, MASK)
    assert all(torch.equal(a, b) for a, b in zip(got(X, S, CAPTION, HINT, None, MASK), want, strict=True))
    assert parts_in(authors_pth(published)) == ["controlnet"]


def test_diffusers_folder(tmp_path):
    folder = tmp_path / "pipeline" / "controlnet"
    theirs().save_pretrained(folder)
    for path in (folder, folder.parent):
        weights = load(path, layouts.CONTROLNET)
        assert weights.config == ours(theirs()).config
        got = checkpoint.build(weights)(X, S, CAPTION, HINT)
        assert all(torch.equal(a, b) for a, b in zip(got[1:], ours(theirs())(X, S, CAPTION, HINT)[1:], strict=True))


def test_our_own_file(tmp_path):
    branch = of_config(wiring=DIFFUSERS, time_scale=1.0)
    part = checkpoint.Weights(layouts.CONTROLNET, branch.config, branch.state_dict(), tmp_path)
    checkpoint.save(tmp_path / "control.safetensors", [part], {"source": "a test"})
    assert load(tmp_path / "control.safetensors", layouts.CONTROLNET).config == branch.config


def test_a_file_that_shares_its_trunk(tmp_path):
    """What the branch has from its trunk is not stored twice."""
    branch = controlnet.copy_trunk(trunk(), 2)
    trunk_part = checkpoint.Weights(layouts.TRANSFORMER, TRUNK, trunk().state_dict(), tmp_path, {"size_px": 256})
    checkpoint.save(tmp_path / "trunk.safetensors", [trunk_part], {})
    shared = controlnet.shared_tensors(trunk().state_dict(), AUTHORS)
    tensors = {k: v for k, v in branch.state_dict().items() if k not in shared}
    settings = {"trunk": "trunk.safetensors", "trunk_hash": tensorfile.hash_of(shared)}
    part = checkpoint.Weights(layouts.CONTROLNET, branch.config, tensors, tmp_path, settings)
    checkpoint.save(tmp_path / "control.safetensors", [part], {})
    got = checkpoint.build(load(tmp_path / "control.safetensors", layouts.CONTROLNET)).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in branch.state_dict().items())
    trunk_part.tensors = {k: v + 1 for k, v in trunk_part.tensors.items()}
    checkpoint.save(tmp_path / "trunk.safetensors", [trunk_part], {})
    with pytest.raises(CheckpointError, match=r"control\.safetensors: it was trained on another version of trunk"):
        load(tmp_path / "control.safetensors", layouts.CONTROLNET)
    (tmp_path / "trunk.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"control\.safetensors: it needs trunk\.safetensors.* beside it"):
        load(tmp_path / "control.safetensors", layouts.CONTROLNET)
    for name in (5, ["a"], "../trunk.safetensors", ""):
        part.settings = settings | {"trunk": name}
        checkpoint.save(tmp_path / "control.safetensors", [part], {})
        with pytest.raises(
            CheckpointError, match=r"control\.safetensors: .*(its settings cannot be used|not a complete)"
        ):
            checkpoint.build(load(tmp_path / "control.safetensors", layouts.CONTROLNET))


def test_overrides(tmp_path, tiny_row, published):
    path = save(tmp_path / "c.safetensors", authors_pth(published))
    weights = load(path, layouts.CONTROLNET, time_scale=1.0, wiring=DIFFUSERS)
    assert weights.config == dataclasses.replace(published.config, time_scale=1.0, wiring=DIFFUSERS)
    checkpoint.check_names(weights)
    folder = tmp_path / "diffusers"
    theirs().save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"comes without block 0 of its trunk.*choose the wiring diffusers"):
        load(folder, layouts.CONTROLNET, wiring=AUTHORS)


@pytest.mark.parametrize("size", COUNTS)
def test_full_size(size):
    width, heads, parameters = COUNTS[size]
    their = {"_class_name": "SanaControlNetModel", "num_attention_heads": width // 32, "attention_head_dim": 32}
    config = config_from_diffusers(their | {"num_layers": 7, "num_cross_attention_heads": heads})
    assert sum(p.numel() for p in SanaControlNet(config, device="meta").parameters()) == parameters
    shapes = {k: tuple(v.shape) for k, v in SanaControlNet(config, device="meta").state_dict().items()}
    assert layouts.controlnet.infer_config(shapes) == config
    assert next(p for p in PRESETS.values() if p.transformer.width == width).transformer.cross_heads == heads


def test_a_width_that_nothing_published_has(tmp_path):
    path = save(tmp_path / "c.safetensors", authors_pth(of_config(guidance_embed=False)))
    with pytest.raises(CheckpointError, match=r"c\.safetensors: .*no published SANA model has width 64"):
        load(path, layouts.CONTROLNET)


def test_a_missing_block(tmp_path, tiny_row, published):
    tensors = {k: v for k, v in authors_pth(published).items() if not k.startswith("controlnet.0.copied")}
    with pytest.raises(
        CheckpointError, match=r"not a complete file for a SANA ControlNet|cannot tell the configuration"
    ):
        checkpoint.build(load(save(tmp_path / "c.safetensors", tensors), layouts.CONTROLNET))


def test_other_controlnets(tmp_path):
    flux = {"controlnet_blocks.0.weight": torch.zeros(2, 2), "transformer_blocks.0.attn.to_q.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=r"this is a ControlNet of another model, not a SANA ControlNet"):
        load(save(tmp_path / "flux.safetensors", flux), layouts.CONTROLNET)
    with pytest.raises(CheckpointError, match="this is a SANA transformer, not a SANA ControlNet"):
        load(save(tmp_path / "sana.safetensors", trunk().state_dict()), layouts.CONTROLNET)


def test_damaged_description(tmp_path):
    branch = of_config()
    about = {"controlnet": {"config": dataclasses.asdict(branch.config) | {"wiring": "x"}, "settings": {}}}
    path = save(tmp_path / "c.safetensors", branch.state_dict(), {checkpoint.METADATA_KEY: json.dumps(about)})
    with pytest.raises(CheckpointError, match="wiring is 'x'"):
        load(path, layouts.CONTROLNET)
    assert tensorfile.read(path).tensors
