"""8 bits made while loading, in a real ComfyUI: the converted file's, bit for bit, and at home among stock nodes."""

import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import standin
import torch

from sprint_core import convert
from sprint_core.models import controlnet
from sprint_core.weights import checkpoint, quantise, tensorfile

pytestmark = pytest.mark.oldest
LAYERS = Path(os.environ.get("SPRINT_COMFYUI", "."), "comfy", "quant_ops.py")
# What this ComfyUI has layers for; the oldest has none of int8.
FORMS = [form for form, name in quantise.FORMATS.items() if not LAYERS.is_file() or f'"{name}"' in LAYERS.read_text()]
LIMITS = {"fp8_e4m3fn": 0.05, "int8": 0.03}  # of a step's result against that of the weights as they were
MODULES = {"transformer_blocks.0.attn1.to_q": (64, 64), "transformer_blocks.1.ff.conv_point": (64, 160)}
CONVOLUTIONS = [f"transformer_blocks.{i}.ff.conv_{kind}.weight" for i in (0, 1) for kind in ("inverted", "point")]
LOADERS = {
    "transformer": ("SanaSprintModelLoader", "model"),
    "text_encoder": ("SanaSprintTextEncoderLoader", "text_encoder"),
}


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture
def load(node):
    def run(name, dtype="auto", kind="transformer"):
        loader, slot = LOADERS[kind]
        return node(loader, **{slot: name}, dtype=dtype)

    return run


@pytest.fixture
def eight(load, pipeline_folder, form):
    return load(pipeline_folder.name, form)


@pytest.fixture(scope="session")
def converted(host, pipeline_folder):
    """converted(kind, form): the name of the file that sprint_core.convert makes of the stand-in."""

    def make(kind, form):
        path = host.base / "models" / "checkpoints" / f"eight-{kind}-{form}.safetensors"
        if not path.exists():
            assert convert.main([str(pipeline_folder), str(path), "--part", kind, "--quantize", form]) == 0
        return path.name

    return make


def state(loaded):
    patcher = getattr(loaded, "patcher", loaded)
    return dict(patcher.model.state_dict())


# --- loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(LOADERS))
def test_what_loading_makes_is_the_converted_file_bit_for_bit(load, pipeline_folder, converted, kind, form):
    made, read = (state(load(name, dtype, kind)) for name, dtype in (
        (pipeline_folder.name, form), (converted(kind, form), "auto")
    ))  # fmt: skip
    assert made.keys() == read.keys()
    assert all(made[name].dtype == read[name].dtype for name in made)
    assert tensorfile.hash_of(made) == tensorfile.hash_of(read)
    marks = [name for name in made if name.endswith(".comfy_quant")]
    assert len(marks) == (20 if kind == "transformer" else 14)
    assert all(made[mark.replace("comfy_quant", "weight")].dtype.itemsize == 1 for mark in marks)


def test_the_state_dict_keeps_its_names_and_shapes(eight, model):
    """Convolutions stay such outside: [c', c, 1, 1]."""
    ours, whole = state(eight), state(model)
    assert {name: tensor.shape for name, tensor in ours.items() if name in whole} == {
        name: tensor.shape for name, tensor in whole.items()
    }
    assert {name.rpartition(".")[2] for name in ours.keys() - whole.keys()} == {"weight_scale", "comfy_quant"}


def test_a_step_is_that_of_the_weights_that_the_bytes_stand_for(load, eight, stored, sample, close, form):
    """Oracle: numbers times scales, in ordinary layers. int8 layers round their input to 8 bits as well."""

    def rounded(tensors):
        for name in [name for name in ours if name.endswith(".weight_scale")]:
            weight = name.removesuffix("_scale")
            scale = ours[name].reshape(-1, *[1] * (tensors[weight].ndim - 1))
            tensors[weight] = ours[weight].float() * scale
        return tensors

    ours = {name.removeprefix("diffusion_model."): tensor for name, tensor in state(eight).items()}
    plain = load(stored("transformer", f"rounded-{form}.safetensors", rounded))
    close(sample(model=eight, steps=1), sample(model=plain, steps=1), 1e-4 if form == "fp8_e4m3fn" else 0.03)


def test_a_step_is_close_to_that_of_the_whole_weights(eight, sample, close, form):
    print(form, close(sample(model=eight, steps=1), sample(steps=1), LIMITS[form]))


def test_a_text_encoder_encodes_nearly_the_same(node, load, pipeline_folder, clip, close, form):
    encoder = load(pipeline_folder.name, form, "text_encoder")
    print(form, close(*(node("CLIPTextEncode", clip=c, text="a cat")[0][0] for c in (encoder, clip)), LIMITS[form]))


# --- a file that is in 8 bits already -----------------------------------------------------------------


def test_a_quantised_file_stays_so_whatever_it_is_computed_in(load, converted, form):
    """Its own form again changes nothing; bf16, fp16 and fp32 are those of its other weights."""
    name = converted("transformer", form)
    auto = tensorfile.hash_of(state(load(name)))
    assert tensorfile.hash_of(state(load(name, form))) == auto
    for dtype, expected in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        network = load(name, dtype).model.diffusion_model
        assert network.transformer_blocks[1].ff.conv_point.weight._qdata.dtype.itemsize == 1
        assert network.patch_embed.proj.weight.dtype == network.proj_out.weight.dtype == expected


def test_a_file_in_another_8_bit_form_is_refused(load, converted):
    """It would be rounded twice."""
    for kind in LOADERS:
        with pytest.raises(ValueError, match="float8_e4m3fn already, not int8; choose dtype auto, or load the file"):
            load(converted(kind, "fp8_e4m3fn"), "int8", kind)


def test_layers_that_this_comfyui_has_not_are_refused(load, host, stored, pipeline_folder, monkeypatch):
    """int8 in the oldest supported one: of a file, and to be made."""
    import comfy.quant_ops

    def change(tensors):
        return quantise.quantised(tensors, "transformer", "int8")

    monkeypatch.delitem(comfy.quant_ops.QUANT_ALGOS, "int8_tensorwise", raising=False)
    file = stored("transformer", "int8-file.safetensors", change)
    for name, dtype in ((file, "auto"), (pipeline_folder.name, "int8")):
        with pytest.raises(ValueError, match="this ComfyUI has no int8_tensorwise layers; update ComfyUI"):
            load(name, dtype)


def test_a_damaged_description_is_refused(load, stored):
    broken = {"transformer_blocks.0.attn1.to_q.comfy_quant": torch.tensor(list(b"{format"), dtype=torch.uint8)}
    name = stored("transformer", "damaged-8-bits.safetensors", lambda tensors: tensors | broken)
    with pytest.raises(ValueError, match=r"damaged-8-bits.*what it says of its quantised layers is damaged"):
        load(name)


def test_convolutions_in_16_bits_beside_8_bit_layers(load, stored, sample, close):
    """As sprint_core.convert made files once: they keep their type in memory."""

    def change(tensors):
        made = quantise.quantised(tensors, "transformer", "fp8_e4m3fn")
        kept = {name: tensor.bfloat16() for name, tensor in tensors.items() if "attn" not in name}
        marks = {name.replace("weight", part) for name in CONVOLUTIONS for part in ("weight_scale", "comfy_quant")}
        return {name: tensor for name, tensor in made.items() if name not in marks} | kept

    model = load(stored("transformer", "mixed-8-bits.safetensors", change))
    network = model.model.diffusion_model
    assert {network.state_dict()[name].dtype for name in CONVOLUTIONS} == {torch.bfloat16}
    assert network.proj_out.weight.dtype == torch.bfloat16
    close(sample(model=model, steps=1), sample(steps=1), 0.05)


# --- LoRA ---------------------------------------------------------------------------------------------


@pytest.fixture
def low_memory(monkeypatch):
    """Everything that is loaded from now on stays off the compute device, and is patched as it runs."""
    import comfy.model_management as mm

    real = mm.LoadedModel.model_load

    def start():
        mm.unload_all_models()
        monkeypatch.setattr(
            mm.LoadedModel, "model_load", lambda self, lowvram_model_memory=0, **kwargs: real(self, 1, **kwargs)
        )

    yield start
    monkeypatch.undo()
    mm.unload_all_models()


def adapter(kind, shapes=MODULES):
    """A LoRA file's tensors, its convolution in a convolution's shape as trainers write it; and what it adds."""
    generator, tensors, changes = torch.Generator().manual_seed(7), {}, {}
    for module, (rows, columns) in shapes.items():
        up, down = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
        ones = (1, 1) if "conv" in module else ()
        changes[f"{module}.weight"] = change = (up @ down).reshape(rows, columns, *ones)
        key = f"diffusion_model.{module}"
        if kind == "diff":
            tensors[f"{key}.diff"] = change
        else:
            tensors[f"{key}.lora_up.weight"] = up.reshape(rows, 2, *ones)
            tensors[f"{key}.lora_down.weight"] = down.reshape(2, columns, *ones)
    return tensors, changes


@pytest.fixture
def patched(node, host):
    def run(model, kind, loader="LoraLoaderModelOnly"):
        (host.base / "models" / "loras").mkdir(exist_ok=True)
        safetensors.torch.save_file(adapter(kind)[0], host.base / "models" / "loras" / "eight.safetensors")
        given = {"model": model, "lora_name": "eight.safetensors", "strength_model": 0.7}
        out = node(loader, **given)
        return out[0] if isinstance(out, tuple | list) else out

    return run


@pytest.mark.parametrize("loader", ["LoraLoaderModelOnly", "SanaSprintLoraLoader", "LoraLoaderBypassModelOnly"])
def test_a_lora_changes_8_bit_layers_as_it_does_others(eight, model, sample, patched, close, form, loader):
    before = sample(model=eight, steps=1)
    changed = sample(model=patched(eight, "lora", loader), steps=1)
    expected = sample(model=patched(model, "lora", loader), steps=1)
    close(changed, expected, LIMITS[form])
    assert (expected - sample(steps=1)).abs().max() > 3 * LIMITS[form] * expected.abs().max()
    assert torch.equal(sample(model=eight, steps=1), before)


@pytest.mark.parametrize("kind", ["lora", "diff"])
def test_a_patch_where_memory_is_short(eight, model, sample, patched, low_memory, close, form, kind):
    """Added as the layer runs, to the weights as they are, without rounding the sum again."""
    expected = sample(model=patched(model, kind), steps=1)
    near = sample(model=patched(eight, kind), steps=1)
    low_memory()
    result = sample(model=patched(eight, kind), steps=1)
    assert eight.model.model_lowvram
    close(result, expected, LIMITS[form])
    close(result, near, LIMITS[form])


def test_a_lora_hook_on_conditioning_is_refused(node, eight, positive, sample, patched):
    """ComfyUI restores a hooked weight without its scale."""
    patched(eight, "lora")
    before = sample(model=eight, steps=1)
    hooks = node("CreateHookLora", lora_name="eight.safetensors", strength_model=0.7, strength_clip=1.0)
    hooked = node("ConditioningSetProperties", cond_NEW=positive, hooks=hooks)
    with pytest.raises(ValueError, match="LoRA hooked to conditioning cannot change layers in 8 bits; apply it to"):
        sample(model=eight, positive=hooked, steps=1)
    assert torch.equal(sample(model=eight, steps=1), before)


# --- merging and saving -------------------------------------------------------------------------------


@pytest.mark.parametrize("eights", [(True, False), (False, True), (True, True)], ids=["first", "second", "both"])
def test_model_merge_simple(node, load, stored, sample, low_memory, close, form, eights):
    """Beside the merge of the whole weights by hand."""

    def scaled(tensors, factor, table):
        return {name: tensor * (table if "table" in name else factor) for name, tensor in tensors.items()}

    second = stored("transformer", "eight-second.safetensors", lambda tensors: scaled(tensors, 0.8, 1.5))
    by_hand = stored("transformer", "eight-merged.safetensors", lambda tensors: scaled(tensors, 0.85, 1.375))
    names = (standin.NAME, second)
    models = [load(name, form if eight else "auto") for name, eight in zip(names, eights, strict=True)]
    merged = node("ModelMergeSimple", model1=models[0], model2=models[1], ratio=0.25)
    expected = sample(model=load(by_hand), steps=1)
    close(sample(model=merged, steps=1), expected, 2 * LIMITS[form])
    low_memory()
    close(sample(model=merged, steps=1), expected, 2 * LIMITS[form])


def test_text_encoders_are_merged(node, load, pipeline_folder, clip, close, form):
    eight = load(pipeline_folder.name, form, "text_encoder")
    for pair in ((eight, clip), (clip, eight), (eight, eight)):
        merged = node("CLIPMergeSimple", clip1=pair[0], clip2=pair[1], ratio=0.5)
        close(*(node("CLIPTextEncode", clip=c, text="a cat")[0][0] for c in (merged, clip)), 2 * LIMITS[form])


@pytest.fixture
def saved(host):
    def move(prefix):
        (file,) = (host.base / "output").rglob(f"{prefix}*.safetensors")
        return shutil.move(file, host.base / "models" / "checkpoints" / f"{prefix}.safetensors").name

    return move


def test_model_save_writes_the_8_bits(node, load, eight, converted, sample, saved, form):
    before = sample(model=eight, steps=1)
    node("ModelSave", model=eight, filename_prefix=f"eight-saved-{form}")
    again = load(saved(f"eight-saved-{form}"))
    assert tensorfile.hash_of(state(again)) == tensorfile.hash_of(state(load(converted("transformer", form))))
    assert torch.equal(sample(model=again, steps=1), before)


def test_model_save_keeps_a_lora(node, load, eight, sample, patched, saved, close, form):
    """In 8 bits again: what runs is what is written."""
    model = patched(eight, "lora")
    expected = sample(model=model, steps=1)
    node("ModelSave", model=model, filename_prefix=f"eight-lora-{form}")
    again = load(saved(f"eight-lora-{form}"))
    close(sample(model=again, steps=1), expected, 1e-4)
    assert state(again)["diffusion_model.transformer_blocks.1.ff.conv_point.weight"].dtype.itemsize == 1


def test_clip_save_writes_the_8_bits(node, load, pipeline_folder, saved, form):
    eight = load(pipeline_folder.name, form, "text_encoder")
    node("CLIPSave", clip=eight, filename_prefix=f"eight-text-{form}")
    again = load(saved(f"eight-text-{form}"), kind="text_encoder")
    assert torch.equal(*(node("CLIPTextEncode", clip=c, text="a cat")[0][0] for c in (eight, again)))


# --- ControlNet ---------------------------------------------------------------------------------------


def test_a_controlnet_steers_8_bits(node, host, eight, positive, vae, pixels, sample, close, form):
    weights = standin.control(controlnet.AUTHORS)
    path = host.base / "models" / "controlnet" / "eight-control.safetensors"
    checkpoint.save(path, [weights], {})
    net = node("SanaSprintControlNetLoader", control_net=path.name)
    apply = {"positive": positive, "control_net": net, "image": pixels, "vae": vae, "strength": 0.7}
    steered = node("SanaSprintControlNetApply", **apply)[0]
    expected = sample(positive=steered, steps=1)
    close(sample(model=eight, positive=steered, steps=1), expected, LIMITS[form])
    assert (expected - sample(steps=1)).abs().max() > 2 * LIMITS[form] * expected.abs().max()
