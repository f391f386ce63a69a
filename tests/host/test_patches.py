"""LoRA, merges and saving, against weights changed by hand; and our loaders on what ComfyUI saved."""

import dataclasses
import json
import shutil

import pytest
import standin
import torch

from sprint_core.weights import checkpoint, layouts, tensorfile

LIMIT = 1e-4  # ComfyUI sums in another order than the test
TABLE = "transformer_blocks.0.scale_shift_table.weight"
MODULES = {"transformer_blocks.0.attn1.to_q": (64, 64), "transformer_blocks.1.ff.conv_point": (64, 160)}


@pytest.fixture
def load(node):
    return lambda name, **inputs: node("SanaSprintModelLoader", model=name, **inputs)


@pytest.fixture
def saved(host):
    """saved("ModelSave's prefix", "new.safetensors"): moves what a stock node saved to where the loaders look."""

    def move(prefix, name):
        (file,) = (host.base / "output").rglob(f"{prefix}*.safetensors")
        target = host.base / "models" / "checkpoints" / name
        shutil.move(file, target)
        return target

    return move


@pytest.fixture(scope="session")
def teacher_folder(host):
    """A multi-step teacher whose time scale is not what its tensors suggest."""
    config = dataclasses.replace(standin.TEACHER, time_scale=1000.0)
    return standin.make(host.base / "models" / "diffusers" / "teacher-0..1000", config, seed=1)


# --- LoRA and merging -------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix, separator", [("lora_unet_", "_"), ("diffusion_model.", ".")])
def test_lora_loader_adds_the_product_of_its_factors(
    node, model, clip, sample, load, stored, write_lora, prefix, separator, close
):
    changes = write_lora("model.safetensors", prefix, MODULES, separator)

    def merge(tensors):
        for module, change in changes.items():
            weight = tensors[f"{module}.weight"]
            tensors[f"{module}.weight"] = weight + 0.6 * change.reshape(weight.shape)
        return tensors

    before = sample(steps=1)
    patched = node("LoraLoader", model=model, clip=clip, lora_name="model.safetensors", strength_model=0.6)[0]
    result = sample(model=patched, steps=1)
    close(result, sample(model=load(stored("transformer", "merged_lora.safetensors", merge)), steps=1), LIMIT)
    assert (result - before).abs().max() > 1e-2
    assert torch.equal(sample(steps=1), before)


def scaled(tensors, factor, table_factor):
    return {
        name: tensor * (table_factor if "scale_shift_table" in name else factor) for name, tensor in tensors.items()
    }


@pytest.fixture
def second(load, stored):
    """Another model: every tensor differs, and the tables double."""
    return load(stored("transformer", "second.safetensors", lambda tensors: scaled(tensors, 0.9, 2.0)))


def test_model_merge_simple_merges_every_tensor(node, model, second, sample, load, stored, close):
    merged = node("ModelMergeSimple", model1=model, model2=second, ratio=0.25)
    by_hand = stored(
        "transformer", "by_hand.safetensors", lambda tensors: scaled(tensors, 0.25 + 0.75 * 0.9, 0.25 + 0.75 * 2.0)
    )
    close(sample(model=merged, steps=1), sample(model=load(by_hand), steps=1), LIMIT)


def test_model_merge_simple_merges_the_modulation_tables(node, model, second, sample, pipeline_folder):
    merged = node("ModelMergeSimple", model1=model, model2=second, ratio=0.0)
    original = checkpoint.load(pipeline_folder, layouts.TRANSFORMER).tensors[TABLE]
    table, seen = model.model.diffusion_model.get_submodule(TABLE.removesuffix(".weight")), []
    hook = table.register_forward_hook(lambda _, x, rows: seen.append(rows.clone()))
    sample(model=merged, steps=1)
    sample(steps=1)
    hook.remove()
    assert torch.allclose(seen[0], 2 * original, atol=1e-6) and torch.equal(seen[1], original)


def test_a_lora_hook_on_conditioning(node, model, clip, positive, write_lora, sample, close):
    """Hooked weights are patched in and out around each evaluation."""
    write_lora("hook.safetensors", "lora_unet_", MODULES)
    hooks = node("CreateHookLora", lora_name="hook.safetensors")
    hooked = node("ConditioningSetProperties", cond_NEW=positive, hooks=hooks)
    patched = node("LoraLoader", model=model, clip=clip, lora_name="hook.safetensors")[0]
    before = sample(steps=1)
    close(sample(positive=hooked, steps=1), sample(model=patched, steps=1), LIMIT)
    assert torch.equal(sample(steps=1), before)


# --- saving -----------------------------------------------------------------------------------------


def test_checkpoint_save_is_read_back_whole(node, loaded, saved, sample, pixels):
    model, clip, vae = loaded
    node("CheckpointSave", model=model, clip=clip, vae=vae, filename_prefix="all")
    path = saved("all", "all.safetensors")
    name = path.name
    blobs = {k: v for k, v in tensorfile.read(path).tensors.items() if k.endswith(checkpoint.TENSOR_KEY)}
    parts = {kind: part for blob in blobs.values() for kind, part in json.loads(blob.numpy().tobytes()).items()}
    assert {kind: bool(part["source"] and part["preset"]) for kind, part in parts.items()} == {
        "transformer": True,
        "text_encoder": True,
        "autoencoder": True,
    }
    again = node("SanaSprintLoader", model=name)
    prompt = [node("CLIPTextEncode", clip=c, text="a cat")[0][0] for c in (clip, again[1])]
    assert torch.equal(*prompt)
    assert torch.equal(sample(model=again[0]), sample())
    images = [node("VAEDecode", vae=v, samples=node("VAEEncode", vae=v, pixels=pixels)) for v in (vae, again[2])]
    assert torch.equal(*images)


def test_model_save_keeps_a_teachers_time_scale_and_shift(node, load, saved, teacher_folder, close):
    teacher = load(teacher_folder.name)
    node("ModelSave", model=teacher, filename_prefix="teacher")
    again = load(saved("teacher", "teacher.safetensors").name)
    for part in (teacher, again):
        assert part.model.diffusion_model.config.time_scale == 1000.0
        assert part.get_model_object("model_sampling").shift == 3.0
    x, s, text = torch.randn(1, 32, 3, 4), torch.tensor([0.6]), torch.randn(1, 5, 64)
    close(again.model.diffusion_model(x, s, context=text), teacher.model.diffusion_model(x, s, context=text), 1e-6)


def test_model_save_keeps_a_merge(node, model, clip, write_lora, load, saved, sample, close):
    write_lora("saved.safetensors", "lora_unet_", MODULES)
    patched = node("LoraLoader", model=model, clip=clip, lora_name="saved.safetensors")[0]
    expected = sample(model=patched, steps=1)
    node("ModelSave", model=patched, filename_prefix="merged")
    close(sample(model=load(saved("merged", "merged.safetensors").name), steps=1), expected, LIMIT)
    sample()  # weights unpatched


def test_clip_save_keeps_tokenizer_and_prompt_format(node, clip, saved, host):
    node("CLIPSave", clip=clip, filename_prefix="text")
    file = saved("text", "text.safetensors")
    again = node("SanaSprintTextEncoderLoader", text_encoder=file.name)
    assert again.tokenizer.preset == clip.tokenizer.preset
    for prompt in ("a cat", "a (red:1.3) circle"):
        assert torch.equal(*(node("CLIPTextEncode", clip=c, text=prompt)[0][0] for c in (again, clip)))


def test_vae_save_keeps_what_no_tensor_shows(node, stored, saved, pixels):
    config = dataclasses.replace(standin.AUTOENCODER, decoder_conv_act="silu")
    original = node("SanaSprintVAELoader", vae=stored("autoencoder", "silu.safetensors", config=config))
    node("VAESave", vae=original, filename_prefix="vae")
    file = saved("vae", "vae.safetensors")
    again = node("SanaSprintVAELoader", vae=file.name)
    for vae in (original, again):
        assert vae.first_stage_model.config.decoder_conv_act == "silu"
    latents = [node("VAEEncode", vae=v, pixels=pixels) for v in (again, original)]
    assert torch.equal(latents[0]["samples"], latents[1]["samples"])
    assert checkpoint.load(file, layouts.AUTOENCODER).config == config  # the core reads it too
