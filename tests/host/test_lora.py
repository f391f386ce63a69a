"""Load SANA LoRA in a real ComfyUI: diffusers' merge on the same weights, DoRA's formula, stacking, refusals."""

import copy

import pytest
import safetensors.torch
import torch
from diffusers import SanaTransformer2DModel

LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_k", "transformer_blocks.1.attn2.to_out.0")
NODE = "SanaSprintLoraLoader"
RANK = 4


def matrices(rows=64, columns=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, RANK, generator=generator) / 8, torch.randn(RANK, columns, generator=generator) / 8


def peft_file(prefix="transformer.", dora=False) -> dict:
    tensors = {}
    for i, layer in enumerate(LAYERS):
        up, down = matrices(seed=i)
        tensors |= {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
        if dora:
            tensors[f"{prefix}{layer}.lora_magnitude_vector"] = 1 + torch.rand(
                64, generator=torch.Generator().manual_seed(i)
            )
    return tensors


@pytest.fixture(scope="module")
def lora_file(host):
    def write(name, tensors, metadata=None):
        folder = host.base / "models" / "loras"
        folder.mkdir(exist_ok=True)
        safetensors.torch.save_file(tensors, folder / name, metadata)
        return name

    return write


@pytest.fixture
def merged(host, pipeline_folder):
    """merged(MODEL): its weights as ComfyUI runs them, under native names."""
    import comfy.model_management as mm

    def weights(model):
        mm.load_models_gpu([model], force_full_load=True)
        state = model.model.diffusion_model.state_dict()
        copies = {name: tensor.clone() for name, tensor in state.items()}
        mm.unload_all_models()
        return copies

    return weights


def test_equals_diffusers(node, model, merged, lora_file, pipeline_folder, close):
    """`load_lora_weights` and `fuse_lora` on the same file: the same weights, and so the same images."""
    lora_file("peft.safetensors", peft_file())
    theirs = SanaTransformer2DModel.from_pretrained(pipeline_folder / "transformer")
    theirs.load_lora_adapter(peft_file(), prefix="transformer")
    theirs.fuse_lora()
    patched, clip = node(NODE, model=model, lora_name="peft.safetensors")
    assert clip is None
    ours, plain = merged(patched), merged(model)
    for layer in LAYERS:
        want = dict(theirs.named_modules())[layer].base_layer.weight
        close(ours[f"{layer}.weight"], want.detach(), 1e-4)
    changed = {name for name, tensor in ours.items() if not torch.equal(tensor, plain[name])}
    assert changed == {f"{layer}.weight" for layer in LAYERS}


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.7])
def test_strength(node, model, merged, lora_file, close, strength):
    lora_file("peft.safetensors", peft_file())
    patched, _ = node(NODE, model=model, lora_name="peft.safetensors", strength_model=strength)
    got, plain = merged(patched), merged(model)
    for i, layer in enumerate(LAYERS):
        up, down = matrices(seed=i)
        close(got[f"{layer}.weight"], plain[f"{layer}.weight"] + strength * up @ down, 1e-5)


@pytest.mark.parametrize("other", [False, True], ids=["alone", "while another is merged"])
def test_dora_by_its_formula(node, model, merged, lora_file, close, other, sample):
    """diffusers drops the magnitudes: m (W + D) / |W + D| by hand, where W has no other LoRA's changes."""
    if other:
        sample(model=node(NODE, model=model, lora_name=lora_file("peft.safetensors", peft_file()))[0], steps=1)
        assert model.backup
    tensors = peft_file(dora=True)
    patched, _ = node(NODE, model=model, lora_name=lora_file("dora.safetensors", tensors))
    got, plain = merged(patched), merged(model)
    for i, layer in enumerate(LAYERS):
        up, down = matrices(seed=i)
        after = plain[f"{layer}.weight"] + up @ down
        m = tensors[f"transformer.{layer}.lora_magnitude_vector"][:, None]
        close(got[f"{layer}.weight"], m * after / after.norm(dim=1, keepdim=True), 1e-4)


def test_stacking_with_stock_nodes(node, model, merged, lora_file, write_lora, close):
    changes = write_lora("stock.safetensors", "lora_unet_", {LAYERS[0]: (64, 64)})
    lora_file("peft.safetensors", peft_file())
    stacked, _ = node(NODE, model=model, lora_name="peft.safetensors")
    stacked, _ = node(NODE, model=stacked, lora_name="peft.safetensors", strength_model=0.5)
    stacked = node("LoraLoaderModelOnly", model=stacked, lora_name="stock.safetensors", strength_model=0.25)
    up, down = matrices(seed=0)
    want = merged(model)[f"{LAYERS[0]}.weight"] + 1.5 * up @ down + 0.25 * changes[LAYERS[0]]
    close(merged(stacked)[f"{LAYERS[0]}.weight"], want, 1e-5)


def test_every_naming_gives_the_same_image(node, model, sample, lora_file):
    images = []
    for name, prefix in (("a", "transformer."), ("b", ""), ("c", "base_model.model."), ("d", "diffusion_model.")):
        patched, _ = node(NODE, model=model, lora_name=lora_file(f"{name}.safetensors", peft_file(prefix)))
        images.append(sample(model=patched))
    assert all(torch.equal(image, images[0]) for image in images)
    assert not torch.allclose(images[0], sample(), atol=1e-3)


def test_the_text_encoder_too(node, model, clip, lora_file):
    layer = "model.layers.1.self_attn.q_proj"
    up, down = matrices(64, 64)
    tensors = {f"lora_te_{layer.replace('.', '_')}.lora_up.weight": up}
    tensors |= {f"lora_te_{layer.replace('.', '_')}.lora_down.weight": down} | peft_file()
    lora_file("both.safetensors", tensors)
    inputs = {"model": model, "lora_name": "both.safetensors", "clip": clip}
    _, patched = node(NODE, **inputs)
    encode = lambda clip: node("CLIPTextEncode", clip=clip, text="a red circle")[0][0]  # noqa: E731
    plain = encode(clip)
    assert not torch.allclose(encode(patched), plain, atol=1e-3)
    _, off = node(NODE, **inputs, strength_clip=0.0)
    assert torch.equal(encode(off), plain)


def test_hooks_and_low_memory_see_ordinary_patches(node, model, lora_file):
    patched, _ = node(NODE, model=model, lora_name=lora_file("peft.safetensors", peft_file()))
    assert set(patched.patches) == {f"diffusion_model.{layer}.weight" for layer in LAYERS}
    assert not model.patches


def test_dora_of_the_text_encoder(node, model, clip, lora_file, close):
    """PEFT's magnitudes of a Gemma's layer: m (W + D) / |W + D| of its rows."""
    import comfy.model_management as mm

    layer = "model.layers.1.self_attn.q_proj"
    up, down = matrices(64, 64)
    m = 1 + torch.rand(64, generator=torch.Generator().manual_seed(1))
    tensors = {f"text_encoder.{layer}.lora_A.weight": down, f"text_encoder.{layer}.lora_B.weight": up}
    lora_file("text-dora.safetensors", tensors | {f"text_encoder.{layer}.lora_magnitude_vector": m})
    weights = []
    for patched in (clip, node(NODE, model=model, lora_name="text-dora.safetensors", clip=clip)[1]):
        mm.load_models_gpu([patched.patcher], force_full_load=True)
        state = patched.cond_stage_model.state_dict()
        weights.append(next(t.clone() for name, t in state.items() if name.endswith(f"{layer}.weight")))
        mm.unload_all_models()
    after = weights[0] + up @ down
    close(weights[1], m[:, None] * after / after.norm(dim=1, keepdim=True), 1e-4)


def test_layers_that_change_nothing_are_named(node, model, lora_file, merged, caplog):
    tensors = peft_file()
    del tensors[f"transformer.{LAYERS[0]}.lora_B.weight"]
    patched, _ = node(NODE, model=model, lora_name=lora_file("half.safetensors", tensors))
    words = f"half.safetensors: 1 layers cannot be applied and are left out: transformer.{LAYERS[0]} (without lora_up"
    assert words in caplog.text
    ours, plain = merged(patched), merged(model)
    changed = {name for name, tensor in ours.items() if not torch.equal(tensor, plain[name])}
    assert changed == {f"{layer}.weight" for layer in LAYERS[1:]}


def test_strength_0_and_what_is_said(node, model, clip, lora_file, caplog):
    lora_file("odd.safetensors", peft_file() | {"bundle_emb.x.gemma": torch.zeros(2)})
    same = node(NODE, model=model, clip=clip, lora_name="odd.safetensors", strength_model=0.0, strength_clip=0.0)
    assert same[0] is model and same[1] is clip
    node(NODE, model=model, lora_name="odd.safetensors")
    assert "odd.safetensors: 1 tensors belong to no layer and are left out: bundle_emb.x.gemma" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"lora_unet_double_blocks_0_img.lora_down.weight": torch.zeros(2, 3)},
            r"bad\.safetensors: none of its 1 tensors",
        ),
        (
            {f"{LAYERS[0]}.lora_A.weight": torch.zeros(2, 96), f"{LAYERS[0]}.lora_B.weight": torch.zeros(96, 2)},
            "another width",
        ),
        ({f"{LAYERS[0]}.lora_A.weight": torch.zeros(2, 64)}, r"bad\.safetensors: none of its 1 layers can be applied"),
        ({}, "none of its 0 tensors"),
    ],
)
def test_refused(node, model, lora_file, unchanged, tensors, words):
    lora_file("bad.safetensors", tensors)
    with unchanged(), pytest.raises(ValueError, match=words):
        node(NODE, model=model, lora_name="bad.safetensors")


def test_files_that_are_none(node, host, model, unchanged):
    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    (folder / "text.safetensors").write_text("no tensors")
    for name, words in (("text.safetensors", r"text\.safetensors"), ("gone.safetensors", "is not in models/loras")):
        with unchanged(), pytest.raises(ValueError, match=words):
            node(NODE, model=model, lora_name=name)
    with unchanged(), pytest.raises(ValueError, match="this MODEL is not a SANA"):
        other = copy.copy(model)
        other.model = torch.nn.Identity()
        node(NODE, model=other, lora_name="text.safetensors")
