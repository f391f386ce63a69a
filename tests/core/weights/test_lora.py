"""LoRA files in every trainer's naming come out under native names, with the same change of weights."""

import json

import peft
import pytest
import standin
import torch

from sprint_core.models.gemma import Gemma
from sprint_core.models.transformer import SanaTransformer
from sprint_core.weights import adapters, keymaps, layouts, lora, tensorfile
from sprint_core.weights.checkpoint import CheckpointError
from sprint_core.weights.lora_settings import CONFIG, METADATA_KEY, LoraSettings

MODEL = SanaTransformer(standin.TRANSFORMER, device="meta")
SHAPES = {name: tuple(tensor.shape) for name, tensor in MODEL.state_dict().items()}
TEXT = {name: tuple(t.shape) for name, t in Gemma(standin.TEXT, device="meta").state_dict().items()}
WEIGHTS = standin.random_model(MODEL)
LAYERS = (
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.1.attn2.to_out.0",
    "transformer_blocks.1.ff.conv_point",
)
RANK = 2
PLAIN = LoraSettings({})


def said(text: str) -> LoraSettings:
    """Of a header that diffusers wrote."""
    return LoraSettings({METADATA_KEY: text})


def matrices(layer: str, shapes=SHAPES, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Up and down matrices of a layer, of its rank of shape."""
    rows, columns, *kernel = shapes[f"{layer}.weight"]
    generator = torch.Generator().manual_seed(len(layer) + seed)
    tail = [1] * len(kernel)
    return (
        torch.randn(rows, RANK, *tail, generator=generator),
        torch.randn(RANK, columns, *tail, generator=generator),
    )


def change(parts: dict) -> torch.Tensor:
    """What an adapter adds to its weight."""
    if "diff" in parts:
        return parts["diff"]
    if "hada_w1_a" in parts:
        scale = parts["alpha"].item() / RANK if "alpha" in parts else 1.0
        return scale * (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    up, down = (
        parts.get(a, parts.get(b))
        for a, b in (("lora_B.weight", "lora_up.weight"), ("lora_A.weight", "lora_down.weight"))
    )
    scale = parts["alpha"].item() / down.shape[0] if "alpha" in parts else 1.0
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(*up.shape[:1], down.shape[1], *up.shape[2:])


def file(name_of, spelling="lora_down.weight lora_up.weight", alpha=None) -> dict:
    """A LoRA of LAYERS; name_of(layer) is the trainer's name of it."""
    down_name, up_name = spelling.split()
    tensors = {}
    for layer in LAYERS:
        up, down = matrices(layer)
        tensors |= {f"{name_of(layer)}.{up_name}": up, f"{name_of(layer)}.{down_name}": down}
        if alpha is not None:
            tensors[f"{name_of(layer)}.alpha"] = torch.tensor(float(alpha))
    return tensors


PEFT = "lora_A.weight lora_B.weight"
NAMINGS = {
    "diffusers": (lambda layer: f"transformer.{layer}", PEFT),
    "bare": (lambda layer: layer, PEFT),
    "PEFT": (lambda layer: f"base_model.model.{layer}", PEFT),
    "PEFT of a pipeline": (lambda layer: f"base_model.model.transformer.{layer}", PEFT),
    "PEFT, named adapter": (lambda layer: f"base_model.model.{layer}", "lora_A.default.weight lora_B.default.weight"),
    "ComfyUI": (lambda layer: f"diffusion_model.{layer}", "lora_down.weight lora_up.weight"),
    "OneTrainer": (lambda layer: f"lora_transformer_{layer.replace('.', '_')}", "lora_down.weight lora_up.weight"),
    "kohya": (lambda layer: f"lora_unet_{layer.replace('.', '_')}", "lora_down.weight lora_up.weight"),
    "LyCORIS": (lambda layer: f"lycoris_{layer.replace('.', '_')}", "lora_down.weight lora_up.weight"),
}


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("naming", NAMINGS)
def test_namings(naming, alpha):
    found = lora.read(file(*NAMINGS[naming], alpha), PLAIN, SHAPES)
    assert set(found.transformer) == set(LAYERS) and not found.skipped and not found.text
    for layer in LAYERS:
        up, down = matrices(layer)
        want = (up.flatten(1) @ down.flatten(1)).reshape(SHAPES[f"{layer}.weight"]) * (alpha or RANK) / RANK
        assert torch.allclose(change(found.transformer[layer]), want, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True], ids=["dots", "underscores"])
def test_fused_layers_of_the_authors(flat):
    """A LoRA of qkv or kv changes each native layer as it changes its rows of the fused one."""
    names = keymaps.foreign_names([name for name in SHAPES if name.endswith(".weight")], layouts.transformer.NVLABS)
    fused = {name: native for name, native in names.items() if len(native) > 1}
    assert len(fused) == 2 * standin.TRANSFORMER.depth
    tensors, want = {}, {}
    for name, native in fused.items():
        up, down = torch.randn(len(native) * 64, RANK), torch.randn(RANK, SHAPES[native[0]][1])
        layer = name.removesuffix(".weight")
        layer = f"lycoris_{layer.replace('.', '_')}" if flat else layer
        tensors |= {
            f"{layer}.lora_up.weight": up,
            f"{layer}.lora_down.weight": down,
            f"{layer}.alpha": torch.tensor(1.0),
        }
        want |= dict(zip(native, (up @ down / RANK).chunk(len(native)), strict=True))
    found = lora.read(tensors, PLAIN, SHAPES)
    assert not found.skipped
    assert {f"{layer}.weight" for layer in found.transformer} == set(want)
    for name, delta in want.items():
        assert torch.allclose(change(found.transformer[name.removesuffix(".weight")]), delta, atol=1e-5)


def test_fused_lokr_and_loha():
    native = [f"transformer_blocks.0.attn1.to_{x}" for x in "qkv"]
    w1, w2a, w2b = torch.randn(6, 4), torch.randn(32, RANK), torch.randn(RANK, 16)
    lokr = {"w1": w1, "w2_a": w2a, "w2_b": w2b}
    tensors = {f"lycoris_blocks_0_attn_qkv.lokr_{k}": v for k, v in lokr.items()}
    tensors["lycoris_blocks_0_attn_qkv.alpha"] = torch.tensor(1.0)
    found = lora.read(tensors, PLAIN, SHAPES)
    want = torch.kron(w1, w2a @ w2b) / RANK
    assert torch.allclose(torch.cat([change(found.transformer[layer]) for layer in native]), want, atol=1e-5)
    loha = [torch.randn(192, RANK), torch.randn(RANK, 64), torch.randn(192, RANK), torch.randn(RANK, 64)]
    tensors = {f"blocks.0.attn.qkv.hada_{k}": v for k, v in zip(("w1_a", "w1_b", "w2_a", "w2_b"), loha, strict=True)}
    found = lora.read(tensors, PLAIN, SHAPES)
    want = (loha[0] @ loha[1]) * (loha[2] @ loha[3])
    assert torch.allclose(torch.cat([change(found.transformer[layer]) for layer in native]), want, atol=1e-5)


def test_lokr_of_plain_layers_stays_as_it_is():
    tensors = {f"lycoris_transformer_blocks_0_attn1_to_q.lokr_{w}": torch.randn(8, 8) for w in ("w1", "w2")}
    found = lora.read(tensors, PLAIN, SHAPES)
    assert set(found.transformer["transformer_blocks.0.attn1.to_q"]) == {"lokr_w1", "lokr_w2"}


@pytest.mark.parametrize("prefix", ["text_encoder.", "lora_text_encoder_", "lora_te_", "lora_te1_"])
def test_text_encoder(prefix):
    layer = "model.layers.1.self_attn.q_proj"
    name = prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer)
    up, down = matrices(layer, TEXT)
    tensors = file(*NAMINGS["diffusers"]) | {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    found = lora.read(tensors, PLAIN, SHAPES, TEXT)
    assert set(found.text) == {layer} and len(found.transformer) == len(LAYERS)
    alone = lora.read(tensors, PLAIN, SHAPES)
    assert len(alone.skipped) == 2 and all(layer.split(".")[-1] in skipped for skipped in alone.skipped)


def test_time_embedder_of_models_without_guidance():
    layer = "time_embed.timestep_embedder.linear_1"
    up, down = matrices(layer)
    name = "transformer.time_embed.emb.timestep_embedder.linear_1"
    assert set(lora.read({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, PLAIN, SHAPES).transformer) == {
        layer
    }


def test_alpha_in_the_metadata():
    about = {"transformer.lora_alpha": 4, "transformer.r": RANK, "transformer.alpha_pattern": {"attn1.to_q": 8}}
    found = lora.read(file(*NAMINGS["diffusers"]), said(json.dumps(about)), SHAPES)
    alphas = {layer: parts["alpha"].item() for layer, parts in found.transformer.items()}
    assert alphas == {LAYERS[0]: 8.0, LAYERS[1]: 4.0, LAYERS[2]: 4.0}
    named = lora.read(file(*NAMINGS["diffusers"], alpha=1.0), said(json.dumps(about)), SHAPES)
    assert all(parts["alpha"].item() == 1.0 for parts in named.transformer.values())
    assert lora.read(file(*NAMINGS["diffusers"]), said("damaged"), SHAPES).count == 3


@pytest.mark.parametrize("spelling", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
def test_dora_by_its_formula(spelling):
    """m (W + D) / |W + D|, in a host that computes m' (W + D) / |W|."""
    layer = LAYERS[0]
    up, down = matrices(layer)
    w = WEIGHTS[f"{layer}.weight"]
    m = 1 + torch.rand(64, generator=torch.Generator().manual_seed(1))
    tensors = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    tensors[f"{layer}.{spelling}"] = m[:, None] if spelling == "dora_scale" else m
    parts = lora.read(tensors, PLAIN, SHAPES, weight=WEIGHTS.get).transformer[layer]
    after = w + up @ down
    want = m[:, None] * after / after.norm(dim=1, keepdim=True)
    assert torch.allclose(parts["dora_scale"] * after / w.norm(dim=1, keepdim=True), want, atol=1e-5)


def tuned(**settings) -> peft.PeftModel:
    """The model with a LoRA of PEFT's own, whose matrices are random."""
    network = SanaTransformer(standin.TRANSFORMER, device="meta")
    network.load_state_dict({name: tensor.clone() for name, tensor in WEIGHTS.items()}, assign=True)
    model = peft.get_peft_model(network, peft.LoraConfig(target_modules=list(LAYERS), **settings))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
    return model


SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rank-stabilised": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"attn1.to_q": 2, ".*ff.*": 1},
        "alpha_pattern": {"attn1.to_q": 3, r"transformer_blocks\.\d+\.ff\.conv_.*": 5},
    },
    "rank-stabilised patterns": {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"to_q": 2}},
    "DoRA": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "rank-stabilised DoRA": {"r": 4, "lora_alpha": 8, "use_dora": True, "use_rslora": True},
}  # fmt: skip


@pytest.mark.parametrize("where", ["beside", "header"])
@pytest.mark.parametrize("name", SETTINGS)
def test_files_of_peft_change_the_weights_as_peft_does(tmp_path, name, where):
    """Its own files, with adapter_config.json beside them or the same in diffusers' header; its own merged weights."""
    model = tuned(**SETTINGS[name])
    model.save_pretrained(tmp_path)
    tensors = tensorfile.read(tmp_path / "adapter_model.safetensors").tensors
    config = (tmp_path / CONFIG).read_text()
    settings = LoraSettings({}, tmp_path / CONFIG) if where == "beside" else said(config)
    found = lora.read(tensors, settings, SHAPES, weight=WEIGHTS.get)
    assert set(found.transformer) == set(LAYERS) and not found.skipped
    merged = model.merge_and_unload().state_dict()
    for layer, parts in found.transformer.items():
        weight = WEIGHTS[f"{layer}.weight"]
        after = weight + change(parts)
        if "dora_scale" in parts:  # as ComfyUI applies it: over the norms of the weight before
            assert parts["dora_scale"].ndim == weight.ndim
            norms = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
            after = parts["dora_scale"] * after / norms
        error = (after - merged[f"{layer}.weight"]).abs().max() / merged[f"{layer}.weight"].abs().max()
        assert error <= 1e-5, layer


@pytest.mark.parametrize(
    "text",
    [
        "damaged",
        "[]",
        '{"lora_alpha": "x"}',
        '{"lora_alpha": 1, "alpha_pattern": {"(": 2}}',
        '{"lora_alpha": 1, "alpha_pattern": 3}',
    ],
)
def test_damaged_settings_are_one_warning(tmp_path, text, caplog):
    (tmp_path / CONFIG).write_text(text)
    settings = LoraSettings({}, tmp_path / CONFIG, "x.safetensors")
    assert len(caplog.records) == 1 and "x.safetensors: its settings (adapter_config.json)" in caplog.text
    found = lora.read(file(*NAMINGS["diffusers"]), settings, SHAPES)
    assert found.count == 3 and not any("alpha" in parts for parts in found.transformer.values())


@pytest.mark.parametrize("layer", LAYERS)
def test_magnitudes_of_every_rank(layer):
    """[rows], [rows, 1], and PEFT's [1, rows, 1, 1] of a convolution are the same; those of columns stay."""
    up, down = matrices(layer)
    rows, columns, *kernel = SHAPES[f"{layer}.weight"]
    m = 1 + torch.rand(rows, generator=torch.Generator().manual_seed(1))
    shapes = [(rows,), (rows, 1), (rows, 1, *kernel)] + ([(1, rows, *kernel)] if kernel else [])
    scales = []
    for shape in shapes:
        tensors = {
            f"{layer}.lora_A.weight": down,
            f"{layer}.lora_B.weight": up,
            f"{layer}.dora_scale": m.reshape(shape),
        }
        scales.append(lora.read(tensors, PLAIN, SHAPES, weight=WEIGHTS.get).transformer[layer]["dora_scale"])
    for scale in scales:
        assert scale.shape == (rows, 1, *kernel) and torch.equal(scale, scales[0])
    if not kernel:
        tensors[f"{layer}.dora_scale"] = torch.ones(1, columns)
        parts = lora.read(tensors, PLAIN, SHAPES, weight=WEIGHTS.get).transformer[layer]
        assert torch.equal(parts["dora_scale"], torch.ones(1, columns))


def test_dora_with_alpha_equals_peft():
    """What peft merges, and what a host that divides by |W| makes of our parts, are the same weight."""
    layer = LAYERS[0]
    network = SanaTransformer(standin.TRANSFORMER, device="meta")
    network.load_state_dict({name: tensor.clone() for name, tensor in WEIGHTS.items()}, assign=True)
    settings = {"r": RANK, "lora_alpha": 5, "use_dora": True, "target_modules": [layer]}
    tuned = peft.get_peft_model(network, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in tuned.named_parameters():
        if "lora" in name:
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
    tensors = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(tuned).items()}
    about = said(json.dumps({"lora_alpha": 5}))
    parts = lora.read(tensors, about, SHAPES, weight=WEIGHTS.get).transformer[layer]
    w = WEIGHTS[f"{layer}.weight"].clone()
    got = parts["dora_scale"] * (w + change(parts)) / w.norm(dim=1, keepdim=True)
    want = tuned.merge_and_unload().state_dict()[f"{layer}.weight"]
    assert torch.allclose(got, want, atol=1e-5)


def test_what_matches_nothing():
    flux = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 3)}
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors: none of its 1 tensors.*double_blocks_0.*another family"
    ):
        lora.read(flux, PLAIN, SHAPES, source="x.safetensors")
    with pytest.raises(CheckpointError, match="none of its 0 tensors belongs to this model; its first: none"):
        lora.read({}, PLAIN, SHAPES)
    wide = {f"{LAYERS[0]}.lora_A.weight": torch.zeros(2, 96), f"{LAYERS[0]}.lora_B.weight": torch.zeros(96, 2)}
    with pytest.raises(CheckpointError, match=r"a LoRA of another width: .*to_q has .*the model's layer is \[64, 64\]"):
        lora.read(wide, PLAIN, SHAPES)


def test_what_is_left_out_is_named():
    layer = "transformer_blocks.0.attn2.to_q"
    tensors = file(*NAMINGS["diffusers"]) | {
        "bundle_emb.token.gemma": torch.zeros(2),
        "transformer.unknown.lora_A.weight": torch.zeros(2, 2),
        f"transformer.{layer}.lora_A.weight": torch.zeros(2, 96),
    }
    found = lora.read(tensors, PLAIN, SHAPES)
    assert set(found.transformer) == set(LAYERS)
    want = {"bundle_emb.token.gemma", "transformer.unknown.lora_A.weight", f"transformer.{layer} (of another shape)"}
    assert set(found.skipped) == want


# --- what is applied, and what is not ---------------------------------------------------------------

LYCORIS = {
    "LoHa": (peft.LoHaConfig, {}),
    "LoHa with cores": (peft.LoHaConfig, {"use_effective_conv2d": True}),
    "LoKr": (peft.LoKrConfig, {}),
    "LoKr with cores": (peft.LoKrConfig, {"use_effective_conv2d": True, "decompose_both": True}),
    "LoKr, whole": (peft.LoKrConfig, {"r": 64}),
}


@pytest.mark.parametrize("alpha", [None, 3.0], ids=["default", "alpha"])
@pytest.mark.parametrize("name", LYCORIS)
def test_loha_and_lokr_of_peft_change_the_weights_as_peft_does(tmp_path, name, alpha):
    """Linear layers, 1x1 and depthwise 3x3 convolutions, of files that PEFT writes."""
    kind, settings = LYCORIS[name]
    layers = [*LAYERS, "transformer_blocks.0.ff.conv_depth"]
    network = SanaTransformer(standin.TRANSFORMER, device="meta")
    network.load_state_dict({name: tensor.clone() for name, tensor in WEIGHTS.items()}, assign=True)
    config = kind(**{"r": 4, "target_modules": layers, "alpha": alpha or 8} | settings)
    model = peft.get_peft_model(network, config)
    generator = torch.Generator().manual_seed(2)
    for parameter_name, parameter in model.named_parameters():
        if "hada" in parameter_name or "lokr" in parameter_name:
            parameter.data = torch.rand(parameter.shape, generator=generator) / 4
    model.save_pretrained(tmp_path)
    tensors = tensorfile.read(tmp_path / "adapter_model.safetensors").tensors
    found = lora.read(tensors, LoraSettings({}, tmp_path / CONFIG), SHAPES)
    assert set(found.transformer) == set(layers) and not found.skipped
    merged = model.merge_and_unload().state_dict()
    for layer, parts in found.transformer.items():
        weight = WEIGHTS[f"{layer}.weight"]
        after = weight + adapters.change(parts).reshape(weight.shape)
        assert torch.allclose(after, merged[f"{layer}.weight"], rtol=1e-4, atol=1e-4), layer


def adapter(layer: str = LAYERS[0], **parts: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{layer}.{part.replace('__', '.')}": tensor for part, tensor in parts.items()}


def number(value: float) -> torch.Tensor:
    return torch.tensor(value)


UP, DOWN = torch.ones(64, RANK), torch.ones(RANK, 64)
DEPTHWISE = "transformer_blocks.0.ff.conv_depth"
IDLE = {
    "only A": (adapter(lora_A__weight=DOWN), "without lora_up.weight"),
    "only B": (adapter(lora_B__weight=UP), "without lora_down.weight"),
    "two ranks": (adapter(lora_A__weight=DOWN, lora_B__weight=torch.ones(64, 3)), "matrices of different rank"),
    "rank 0": (adapter(lora_A__weight=torch.ones(0, 64), lora_B__weight=torch.ones(64, 0)), "rank 0"),
    "only alpha": (adapter(alpha=number(1.0)), "only alpha"),
    "alpha 0": (adapter(lora_A__weight=DOWN, lora_B__weight=UP, alpha=number(0.0)), "alpha 0"),
    "alphas": (adapter(lora_A__weight=DOWN, lora_B__weight=UP, alpha=torch.ones(2)), "alpha is no number"),
    "alpha NaN": (adapter(lora_A__weight=DOWN, lora_B__weight=UP, alpha=number(float("nan"))), "alpha is no number"),
    "only magnitudes": (adapter(dora_scale=torch.ones(64)), "only dora_scale"),
    "magnitudes": (adapter(lora_A__weight=DOWN, lora_B__weight=UP, dora_scale=torch.ones(63)), "of another shape"),
    "LoKr": (adapter(lokr_w1=torch.ones(8, 8), lokr_w2=torch.ones(4, 8)), "of another shape"),
    "half a LoKr": (adapter(lokr_w1=torch.ones(8, 8), lokr_w2_a=torch.ones(8, 2)), "without lokr_w2"),
    "LoHa": (adapter(hada_w1_a=UP, hada_w1_b=DOWN, hada_w2_a=UP, hada_w2_b=torch.ones(3, 64)), "different rank"),
    "half a LoHa": (adapter(hada_w1_a=UP, hada_w1_b=DOWN, hada_w2_a=UP), "without hada_w2_b"),
    "OFT": (adapter(oft_blocks=torch.ones(4, 15, 15)), "of another shape"),
    "BOFT": (adapter(oft_blocks=torch.ones(2, 8, 8, 8)), "without alpha"),
    "GLoRA": (adapter(a1__weight=DOWN.T, a2__weight=DOWN, b1__weight=UP), "without b2.weight"),
    "difference": (adapter(diff=torch.ones(64, 63)), "of another shape"),
    "whole weight": (adapter(set_weight=torch.ones(64)), "of another shape"),
    "bias": (adapter("transformer_blocks.0.attn1.to_out.0", diff_b=torch.ones(63)), "diff_b of another shape"),
    "no bias": (adapter(diff_b=torch.ones(64)), "diff_b, but no bias"),
    "kernel": (adapter(DEPTHWISE, lora_A__weight=torch.ones(2, 8), lora_B__weight=torch.ones(320, 2)), "another shape"),
    "two kinds": (adapter(lora_A__weight=DOWN, lora_B__weight=UP, diff=torch.ones(64, 64)), "LoRA and diff at once"),
}  # fmt: skip


@pytest.mark.parametrize("case", IDLE)
def test_what_changes_nothing_is_left_out_and_named(case):
    """Beside layers that are applied; alone it is an error that says the same."""
    tensors, reason = IDLE[case]
    layer = next(iter(tensors)).split(".weight")[0].rsplit(".", 1)[0]
    beside = {LAYERS[1]: matrices(LAYERS[1])} if layer != LAYERS[1] else {LAYERS[2]: matrices(LAYERS[2])}
    good = {f"{k}.lora_{x}.weight": m for k, pair in beside.items() for x, m in zip("BA", pair, strict=True)}
    found = lora.read(tensors | good, PLAIN, SHAPES)
    assert set(found.transformer) == set(beside)
    assert len(found.skipped) == 1 and reason in found.skipped[0] and "transformer_blocks.0" in found.skipped[0]
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors: (none of its 1 layers can be applied|a LoRA of another)"
    ):
        lora.read(tensors, PLAIN, SHAPES, source="x.safetensors")


def test_a_bad_bias_does_not_hide_a_good_weight():
    parts = adapter(lora_A__weight=DOWN, lora_B__weight=UP, diff_b=torch.ones(3))
    found = lora.read(parts, PLAIN, SHAPES)
    assert set(found.transformer[LAYERS[0]]) == {"lora_up.weight", "lora_down.weight"}
    assert found.skipped == [f"{LAYERS[0]} (diff_b, but no bias)"]


def test_kernels_flattened_by_comfyui_are_applied():
    """TrainLoraNode writes the down matrix of a depthwise 3x3 kernel as [rank, 9]."""
    up, down = torch.randn(320, RANK), torch.randn(RANK, 9)
    flat = adapter(DEPTHWISE, lora_down__weight=down, lora_up__weight=up, alpha=number(1.0))
    kernel = adapter(DEPTHWISE, lora_down__weight=down.reshape(RANK, 1, 3, 3), lora_up__weight=up[..., None, None])
    for tensors, scale in ((flat, 1 / RANK), (kernel, 1.0)):
        found = lora.read(tensors, PLAIN, SHAPES)
        assert not found.skipped
        delta = adapters.change(found.transformer[DEPTHWISE]).reshape(320, 1, 3, 3)
        assert torch.allclose(delta, scale * (up @ down).reshape(320, 1, 3, 3), atol=1e-5)


def test_one_layer_under_two_names():
    up, down = matrices(LAYERS[0])
    tensors = {f"transformer.{LAYERS[0]}.lora_A.weight": down, f"transformer.{LAYERS[0]}.lora_B.weight": up}
    other = {name.replace("transformer.", "diffusion_model.", 1): 2 * tensor for name, tensor in tensors.items()}
    again = {f"transformer.{LAYERS[0]}.lora_A.other.weight": 2 * down}
    for extra in (other, again):
        found = lora.read(tensors | extra, PLAIN, SHAPES)
        assert torch.equal(found.transformer[LAYERS[0]]["lora_down.weight"], down)
        assert len(found.skipped) == 1 and "a second one for the same layer" in found.skipped[0]


@pytest.mark.parametrize("spelling", ["lora.down.weight lora.up.weight", "lora_linear_layer.down.weight "
                                      "lora_linear_layer.up.weight", "lora_A lora_B", "lora_A.x lora_B.x"])  # fmt: skip
def test_older_spellings(spelling):
    found = lora.read(file(lambda layer: f"transformer.{layer}", spelling), PLAIN, SHAPES)
    assert set(found.transformer) == set(LAYERS) and not found.skipped


def test_a_lora_of_the_text_encoder_alone_asks_for_the_clip():
    up, down = matrices("model.layers.1.self_attn.q_proj", TEXT)
    name = "lora_te_model_layers_1_self_attn_q_proj"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    with pytest.raises(CheckpointError, match="it changes the text encoder alone; connect the CLIP"):
        lora.read(tensors, PLAIN, SHAPES)
    assert lora.read(tensors, PLAIN, SHAPES, TEXT).count == 1


def test_untrained():
    zero = adapter(lora_A__weight=DOWN, lora_B__weight=0 * UP)
    assert lora.read(zero, PLAIN, SHAPES).is_zero
    some = adapter(LAYERS[1], lora_A__weight=DOWN, lora_B__weight=UP)
    assert not lora.read(zero | some, PLAIN, SHAPES).is_zero
