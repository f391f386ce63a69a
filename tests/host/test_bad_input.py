"""Bad input: an error that names the file or value, what is wrong and what to do; and the next run works."""

import logging
import pickle
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from api_prompts import custom_size

from sprint_core.weights import checkpoint, layouts, presets, tensorfile


@pytest.fixture
def refused(node, host, unchanged):
    """refused(loader id, input, file, "what", ...): loading it fails; the message has its name and the rest."""

    def check(id, name, file, *words):
        with unchanged(), pytest.raises(ValueError) as error:
            node(id, **{name: file})
        message = str(error.value)
        for word in (file, *words):
            assert word in message, message
        return message

    return check


@pytest.fixture
def file(host):
    """file("name.safetensors", tensors): a file in models/checkpoints; tensors may be bytes."""

    def write(name, content):
        path = host.base / "models" / "checkpoints" / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            tensorfile.write(path, {key: torch.zeros(2, 2) for key in content}, {})
        return name

    return write


MODEL = ("SanaSprintModelLoader", "model")
TEXT = ("SanaSprintTextEncoderLoader", "text_encoder")
VAE = ("SanaSprintVAELoader", "vae")
SLOTS = [MODEL, TEXT, VAE, ("SanaSprintLoader", "model")]
SLOT_IDS = ["model", "text", "vae", "all"]


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", SLOTS, ids=SLOT_IDS)
def test_a_truncated_file(refused, host, stored, slot):
    path = host.base / "models" / "checkpoints" / stored("transformer", "truncated.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    refused(*slot, path.name, "truncated", "download it again")


@pytest.mark.parametrize("slot", SLOTS, ids=SLOT_IDS)
@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9", ("pointer of Git LFS", "git lfs pull")),
        (b"<!doctype html><html>Log in</html>", ("a web page", "hf download")),
        (b"GGUF\x03\0\0\0" + b"\0" * 64, ("a GGUF file", "take the bf16")),
    ],
    ids=["LFS", "page", "GGUF"],
)
def test_what_holds_no_tensors(refused, file, slot, content, words):
    assert "download it again" not in refused(*slot, file("foreign.safetensors", content), *words)


@pytest.mark.parametrize("slot, kind", [(MODEL, "transformer"), (TEXT, "text_encoder"), (VAE, "autoencoder")])
def test_whole_numbers_without_scales(refused, stored, slot, kind):
    def rounded(tensors):
        return {k: (t * 100).to(torch.int8) if t.ndim > 1 else t for k, t in tensors.items()}

    refused(*slot, stored(kind, f"numbers-{kind}.safetensors", rounded), "whole numbers (int8) without the scales")


@pytest.mark.parametrize("name", ["empty.safetensors", "empty.pth"])
def test_an_empty_file(refused, file, name):
    refused(*MODEL, file(name, b""), "empty", "download it again")


@pytest.mark.parametrize("name", ["page.safetensors", "page.pth"])
def test_a_web_page_saved_as_a_model(refused, file, name):
    refused(*MODEL, file(name, b"<!DOCTYPE html><html>404</html>" * 10), "not a")


class Code:
    ran = False

    def __reduce__(self):
        return (exec, ("import os; os.environ['SANA_SPRINT_PICKLE_RAN'] = '1'",))


@pytest.mark.parametrize("bare", [True, False], ids=["bare pickle", "torch.save"])
def test_a_pickle_that_wants_to_run_code(refused, file, host, monkeypatch, bare):
    import os

    monkeypatch.delenv("SANA_SPRINT_PICKLE_RAN", raising=False)
    name = file("code.pth", pickle.dumps(Code(), protocol=2))
    if not bare:
        torch.save({"state_dict": Code()}, host.base / "models" / "checkpoints" / name)
    refused(*MODEL, name, "would run code", "safetensors")
    assert "SANA_SPRINT_PICKLE_RAN" not in os.environ


@pytest.mark.parametrize(
    "names, what",
    [
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.mid.block_1.norm1.weight"],
            "SDXL",
        ),
        (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "FLUX"),
        (["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"], "a LoRA"),
        (["lora_unet_transformer_blocks_0_attn1_to_q.lora_up.weight"], "a LoRA"),
        (["input_block.weight", "transformer_blocks.0.ff.conv_inverted.weight"], "ControlNet"),
        (["decoder.mid.block_1.norm1.weight", "encoder.conv_in.weight"], "auto-encoder"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "T5"),
        (["what.is.this"], "does not know"),
    ],
)
def test_a_model_of_another_family(refused, file, names, what):
    message = refused(*MODEL, file("foreign.safetensors", names), what, "choose another file")
    assert "SANA transformer" in message


@pytest.mark.parametrize(
    "slot, kind, what, expected",
    [
        (MODEL, "autoencoder", "a DC-AE", "SANA transformer"),
        (MODEL, "text_encoder", "Gemma-2", "SANA transformer"),
        (VAE, "transformer", "SANA transformer", "a DC-AE"),
        (TEXT, "autoencoder", "a DC-AE", "Gemma-2"),
    ],
)
def test_our_own_files_in_the_wrong_slot(refused, stored, slot, kind, what, expected):
    message = refused(*slot, stored(kind, f"misplaced-{kind}.safetensors"), what, "choose another file")
    assert re.search(f"this is .*{what}.*, not .*{expected}", message)


@pytest.mark.parametrize("slot, kind", [(MODEL, "transformer"), (TEXT, "text_encoder"), (VAE, "autoencoder")])
def test_missing_and_extra_tensors_are_listed_but_at_most_ten(refused, stored, slot, kind):
    def damage(tensors):
        kept = sorted(tensors)
        for name in kept[-12:]:
            del tensors[name]
        return tensors | {"surplus.weight": torch.zeros(2)}

    message = refused(
        *slot, stored(kind, f"damaged-{kind}.safetensors", damage), "12 tensors missing", "1 tensors unexpected",
        "surplus.weight", ", ...", "download it again",
    )  # fmt: skip
    listed = message.split("missing: ")[1].split(";")[0]
    assert listed.count(",") == 10  # ten names, and the dots


def test_a_tensor_of_another_shape(refused, stored):
    change = lambda tensors: tensors | {"proj_out.bias": torch.zeros(7)}  # noqa: E731
    refused(*MODEL, stored("transformer", "shape.safetensors", change), "proj_out.bias (7,) instead of (32,)")


def test_a_text_encoder_folder_without_a_tokenizer(refused, host, pipeline_folder):
    folder = host.base / "models" / "text_encoders" / "no-tokenizer"
    shutil.copytree(pipeline_folder / "text_encoder", folder)
    refused(*TEXT, folder.name, "no tokenizer", "tokenizer.json")


def test_a_pipeline_folder_without_one_part(refused, host, pipeline_folder):
    folder = host.base / "models" / "diffusers" / "incomplete"
    shutil.copytree(pipeline_folder, folder)
    shutil.rmtree(folder / "vae")
    refused("SanaSprintLoader", "model", folder.name, "vae")


def test_a_file_that_is_gone(node, unchanged):
    with unchanged(), pytest.raises(ValueError, match=r"gone\.safetensors .*diffusion_models.* refresh"):
        node("SanaSprintModelLoader", model="gone.safetensors")


# --- latents and sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 16])
def test_a_latent_of_another_vae(sample, ksample, unchanged, channels):
    latent = {"samples": torch.ones(1, channels, 12, 16)}
    for run in (sample, ksample):
        with unchanged(), pytest.raises(ValueError, match=f"{channels} channels.*32.*DC-AE.*Empty SANA Latent"):
            run(latent_image=latent)


def test_decoding_a_latent_of_another_vae(node, vae, unchanged):
    for id in ("VAEDecode", "VAEDecodeTiled"):
        with unchanged(), pytest.raises(ValueError, match=r"\[1, 4, 12, 16\].*32"):
            node(id, vae=vae, samples={"samples": torch.ones(1, 4, 12, 16)})


def test_sizes_are_rounded_to_32_and_it_is_said(node, caplog):
    with caplog.at_level(logging.WARNING):
        latent = node("SanaSprintEmptyLatent", **custom_size(1000, 530))
    assert latent["samples"].shape == (1, 32, 17, 31)
    assert "1000 x 530 rounded to 992 x 544" in caplog.text


@pytest.mark.parametrize("size", [(0, 512), (512, 63), (16384, 512)])
def test_sizes_out_of_range(node, unchanged, size):
    with unchanged(), pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*64 to 8192"):
        node("SanaSprintEmptyLatent", **custom_size(*size))


# --- numbers that reach a node through a link, which ComfyUI does not check ----------------------------


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"steps": 0}, "1 to 40 steps, not 0"),
        ({"steps": 0, "schedule": "paper"}, "1 to 4 steps, not 0"),
        ({"steps": 5, "schedule": "paper"}, "1 to 4 steps, not 5; 'app' has up to 40"),
        ({"steps": 41}, "1 to 40 steps, not 41"),
        ({"steps": 41, "schedule": "app"}, "1 to 40 steps, not 41"),
        ({"denoise": 0.0}, r"denoise.* is 0.*\(0, 1\]"),
        ({"denoise": 1.5}, r"denoise.* is 1.5.*\(0, 1\]"),
        ({"denoise": float("nan")}, "denoise.* is nan"),
        ({"schedule": "custom"}, "at least one angle"),
        ({"schedule": "custom", "schedule.angles": "fast"}, "list of angles"),
        ({"schedule": "custom", "schedule.angles": "1.0, 1.3"}, "fall strictly, but 1.3 follows 1"),
        ({"schedule": "custom", "schedule.angles": "2.0, 1.3"}, "2 lies outside"),
        ({"schedule": "custom", "schedule.angles": "1.3, -0.5"}, "-0.5 lies outside"),
        ({"schedule": "custom", "schedule.angles": "nan"}, "nan lies outside"),
    ],
)
def test_steps_angles_and_strength_out_of_range(node, sample, unchanged, inputs, message):
    for run in (lambda: sample(**inputs), lambda: node("SanaSprintSchedule", **inputs)):
        with unchanged(), pytest.raises(ValueError, match=message):
            run()


@pytest.mark.parametrize("guidance", [0.0, -4.5, float("nan"), float("inf")])
def test_guidance_out_of_range(sample, unchanged, guidance):
    with unchanged(), pytest.raises(ValueError, match=f"guidance is {guidance:g}.*4.5"):
        sample(guidance=guidance)


@pytest.mark.parametrize(
    "slot, name, value, offered",
    [
        (SLOTS[3], "dtype", "fp8", "auto, bf16, fp16, fp32"),
        (MODEL, "time_scale", "0..2", "auto, 0..1, 0..1000"),
        (TEXT, "device", "gpu:0", "auto, cpu"),
        (("SanaSprintControlNetLoader", "control_net"), "wiring", "theirs", "auto, authors, diffusers"),
    ],
    ids=["all", "model", "text", "control"],
)
def test_loader_options_that_are_not_offered(node, slot, name, value, offered):
    loader, file_input = slot
    file = presets.BUNDLED_CONTROL_NAME if file_input == "control_net" else presets.BUNDLED_NAME
    with pytest.raises(ValueError, match=f"{name} is {value!r}; choose one of {offered}"):
        node(loader, **{file_input: file, name: value})


# --- foreign objects ------------------------------------------------------------------------------------


def test_a_model_of_another_family_in_our_sampler(node, sample, unchanged):
    foreign = SimpleNamespace(model=object())
    with unchanged(), pytest.raises(ValueError, match=r"not a SANA-Sprint.*KSampler"):
        sample(model=foreign)
    with pytest.raises(ValueError, match="not a SANA"):
        node("SanaSprintEmptyLatent", model=foreign)


# --- NaN ------------------------------------------------------------------------------------------------


def nan(tensors):
    name = next(name for name in tensors if name in ("proj_out.bias", "decoder.conv_in.bias"))
    return tensors | {name: torch.full_like(tensors[name], torch.nan)}


def test_nan_from_the_model_is_an_error_once_after_the_last_step(node, stored, sample, ksample, unchanged):
    broken = node("SanaSprintModelLoader", model=stored("transformer", "nan.safetensors", nan))
    steps = []
    hook = broken.model.diffusion_model.register_forward_hook(lambda *_: steps.append(1))
    for run in (sample, ksample):
        says = r"nan\.safetensors: its tensor proj_out\.bias holds NaN or infinity; download"
        with unchanged(), pytest.raises(ValueError, match=says):
            run(model=broken, steps=3, **({"schedule": "app"} if run is sample else {}))
    hook.remove()
    assert len(steps) == 6


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_nan_from_the_vae_is_an_error_and_no_black_image(node, stored, unchanged, dtype):
    broken = node("SanaSprintVAELoader", vae=stored("autoencoder", "nan-vae.safetensors", nan), dtype=dtype)
    latent = {"samples": torch.zeros(1, 32, 4, 4)}
    for id in ("VAEDecode", "VAEDecodeTiled"):
        says = r"nan-vae\.safetensors: its tensor decoder\.conv_in\.bias holds NaN"
        with unchanged(), pytest.raises(ValueError, match=says):
            node(id, vae=broken, samples=latent, **({"tile_size": 64} if "Tiled" in id else {}))


def test_a_nan_latent_is_no_black_image(node, vae, unchanged):
    with unchanged(), pytest.raises(ValueError, match="what came into the VAE holds NaN"):
        node("VAEDecode", vae=vae, samples={"samples": torch.full((1, 32, 3, 4), torch.nan)})


@pytest.mark.parametrize("tiled", ["VAEEncode", "VAEEncodeTiled"])
def test_nan_from_the_encoder_is_an_error(node, stored, pixels, unchanged, tiled):
    def broken(tensors):
        return tensors | {"encoder.conv_out.bias": torch.full_like(tensors["encoder.conv_out.bias"], torch.inf)}

    vae = node("SanaSprintVAELoader", vae=stored("autoencoder", "nan-encoder.safetensors", broken), dtype="fp32")
    size = {"tile_size": 64, "overlap": 32} if "Tiled" in tiled else {}
    says = r"nan-encoder\.safetensors: its tensor encoder\.conv_out\.bias holds NaN or infinity"
    with unchanged(), pytest.raises(ValueError, match=says):
        node(tiled, vae=vae, pixels=pixels, **size)
    with unchanged(), pytest.raises(ValueError, match="what came into the VAE holds NaN"):
        node(tiled, vae=vae, pixels=pixels * torch.nan, **size)


def test_nan_in_the_text_encoder_is_named_when_it_shows(node, stored, unchanged):
    def broken(tensors):
        return tensors | {"model.norm.weight": torch.full_like(tensors["model.norm.weight"], torch.nan)}

    clip = node("SanaSprintTextEncoderLoader", text_encoder=stored("text_encoder", "nan-text.safetensors", broken))
    for text in ("a cat", "a (cat:1.3)"):
        with (
            unchanged(),
            pytest.raises(ValueError, match=r"nan-text\.safetensors: its tensor model\.norm\.weight holds"),
        ):
            node("CLIPTextEncode", clip=clip, text=text)


def test_nan_in_a_lora_is_told_from_nan_in_the_weights(node, host, model, sample, ksample, write_lora, unchanged):
    write_lora("nan-lora.safetensors", "lora_unet_", {"transformer_blocks.1.attn2.to_q": (64, 64)})
    path = host.base / "models" / "loras" / "nan-lora.safetensors"
    tensors = tensorfile.read(path).tensors
    tensorfile.write(path, {name: tensor * torch.inf for name, tensor in tensors.items()}, {})
    broken = node("LoraLoaderModelOnly", model=model, lora_name=path.name, strength_model=1.0)
    says = r"a LoRA's change of diffusion_model\..*attn2.* holds NaN or infinity; take that LoRA out"
    for run in (sample, ksample):
        with unchanged(), pytest.raises(ValueError, match=says):
            run(model=broken)


def test_a_nan_conditioning_is_told(sample, positive, unchanged):
    with unchanged(), pytest.raises(ValueError, match="the conditioning holds NaN or infinity; check the text encoder"):
        sample(positive=[[positive[0][0] * torch.nan, positive[0][1]]])


def test_every_message_is_one_the_core_can_make(stored, host):
    """Loading is the core's: the node adds nothing to the message that a script would miss."""
    path = host.base / "models" / "checkpoints" / stored("autoencoder", "same.safetensors")
    with pytest.raises(tensorfile.CheckpointError, match=re.escape(str(path))):
        checkpoint.load(path, layouts.TRANSFORMER)


# --- hostile and odd input ----------------------------------------------------------------------------


def test_a_link_that_leads_in_a_circle_is_not_listed(node, host, pipeline_folder):
    folder = host.base / "models" / "diffusers"
    (folder / "circle").symlink_to("circle")
    try:
        listed = node.ids["SanaSprintLoader"].INPUT_TYPES()["required"]["model"]
        assert pipeline_folder.name in str(listed) and "circle" not in str(listed)
    finally:
        (folder / "circle").unlink()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("transformer", {"num_layers": 10**6}),
        ("transformer", {"num_layers": "2"}),
        ("transformer", {"num_attention_heads": 10**12}),
        ("transformer", {"num_cross_attention_heads": 0}),
        ("transformer", {"mlp_ratio": 1e308}),
        ("vae", {"encoder_layers_per_block": [1, 1, 1, 1, 1, 10**6]}),
        ("vae", {"attention_head_dim": 0}),
        ("vae", {"downsample_block_type": 7}),
        ("text_encoder", {"num_hidden_layers": 10**6}),
        ("text_encoder", {"rope_theta": -1}),
        ("text_encoder", {"query_pre_attn_scalar": 0}),
        ("text_encoder", {"sliding_window": None}),
    ],
)
def test_a_configuration_out_of_range(refused, host, pipeline_folder, part, change):
    """Refused at once: a million layers would fill the memory before any tensor is missed."""
    import json

    broken = host.base / "models" / "diffusers" / "broken-config"
    shutil.copytree(pipeline_folder, broken)
    try:
        file = broken / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        refused("SanaSprintLoader", "model", broken.name, "cannot tell the configuration")
    finally:
        shutil.rmtree(broken)


@pytest.mark.parametrize("blob", [torch.tensor(10**9), torch.ones(3), torch.ones(2, 2, dtype=torch.uint8)])
def test_a_stored_description_that_is_no_text(refused, host, stored, blob):
    name = stored("transformer", "blob.safetensors", lambda t: t | {checkpoint.TENSOR_KEY: blob})
    refused(*MODEL, name, "metadata is damaged")


@pytest.mark.parametrize("settings", [5, {"flow_shift": "3"}, {"flow_shift": -1}, {"size_px": 0}])
def test_settings_out_of_range(refused, host, pipeline_folder, settings):
    weights = checkpoint.load(pipeline_folder, layouts.TRANSFORMER)
    weights.settings = settings
    checkpoint.save(host.base / "models" / "checkpoints" / "settings.safetensors", [weights], {})
    refused(*MODEL, "settings.safetensors", "settings cannot be used")


def test_a_damaged_tokenizer(refused, host, pipeline_folder):
    broken = host.base / "models" / "diffusers" / "broken-words"
    shutil.copytree(pipeline_folder, broken)
    file = broken / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:2000])
    try:
        refused(*TEXT, broken.name, "damaged tokenizer.json", "download it again")
    finally:
        shutil.rmtree(broken)


def test_a_tokenizer_with_more_tokens_than_the_encoder(refused, host, pipeline_folder):
    broken = host.base / "models" / "diffusers" / "many-words"
    shutil.copytree(pipeline_folder, broken)
    file = broken / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"<0xFF>": 259', '"<0xFF>": 5000'))
    try:
        refused(*TEXT, broken.name, "5001 tokens", "gemma-2-2b-it")
    finally:
        shutil.rmtree(broken)


@pytest.mark.parametrize("tiled", ["VAEEncode", "VAEEncodeTiled"])
def test_an_image_smaller_than_a_latent_cell(node, vae, tiled):
    with pytest.raises(ValueError, match=r"31 x 31 pixels.*at least 32 x 32"):
        node(tiled, vae=vae, pixels=torch.zeros(1, 31, 31, 3))


def test_conditioning_of_another_family(sample, unchanged):
    with unchanged(), pytest.raises(ValueError, match="768 wide, the model reads 64"):
        sample(positive=[[torch.zeros(1, 77, 768), {}]])


@pytest.mark.parametrize("shape", [(1, 32, 0, 4), (0, 32, 4, 4), (1, 32, 1, 4, 4)])
def test_latents_that_are_no_image(sample, unchanged, shape):
    with unchanged(), pytest.raises(ValueError, match="SANA's have 32 channels"):
        sample(latent_image={"samples": torch.zeros(shape)})


def test_sigmas_that_denoise_nothing(custom, unchanged):
    with unchanged(), pytest.raises(ValueError, match="pure noise"):
        custom(sigmas=torch.tensor([1.0]))
    with unchanged(), pytest.raises(ValueError, match="SIGMAS hold NaN"):
        custom(sigmas=torch.tensor([1.0, float("nan"), 0.0]))


@pytest.mark.parametrize("weight", ["nan", "inf", "1e309"])
def test_weights_that_are_no_number(node, clip, weight):
    with pytest.raises(ValueError, match="not a finite number"):
        node("CLIPTextEncode", clip=clip, text=f"(a:{weight})")


def test_half_a_surrogate_pair_is_no_error(node, clip):
    assert node("CLIPTextEncode", clip=clip, text="a cat \ud83d")[0][0].isfinite().all()


def test_a_weight_that_no_model_can_hold_is_named(node, clip, sample):
    import nodes

    with pytest.raises(ValueError, match=r"weight in the prompt is 1e\+38, 1e\+06 is the most"):
        node("CLIPTextEncode", clip=clip, text="a (cat:1e38)")
    assert "1e+38" in nodes.NODE_CLASS_MAPPINGS["SanaSprintTextEncode"].validate_inputs(text="a (cat:1e38)")
    assert sample(positive=node("CLIPTextEncode", clip=clip, text="a (cat:1e6)")).isfinite().all()


def test_an_empty_latent_of_less_than_a_cell(node, sample, unchanged):
    latent = node("EmptyLatentImage", width=16, height=512)
    with unchanged(), pytest.raises(ValueError, match=r"for 16 x 512 pixels; SANA's smallest cell is 32"):
        sample(latent_image=latent)
    assert sample(latent_image=node("EmptyLatentImage", width=32, height=64)).shape == (1, 32, 2, 1)


@pytest.mark.parametrize("samples", [torch.zeros(32, 3, 4), "nested"], ids=["three axes", "nested"])
def test_empty_latents_that_are_no_image(sample, unchanged, samples):
    from comfy.nested_tensor import NestedTensor

    if isinstance(samples, str):
        samples = NestedTensor([torch.zeros(1, 32, 3, 4), torch.zeros(1, 8, 3)])
    with unchanged(), pytest.raises(ValueError, match=r"this latent (is nested|has 3 channels).*Empty SANA Latent"):
        sample(latent_image={"samples": samples, "downscale_ratio_spacial": 8})


@pytest.mark.parametrize(
    "id, name",
    [
        ("SanaSprintSampler", "model"),
        ("SanaSprintSampler", "positive"),
        ("SanaSprintSampler", "latent_image"),
        ("SanaSprintTextEncode", "clip"),
        ("SanaSprintLoraLoader", "model"),
        ("SanaSprintControlNetApply", "image"),
        ("SanaSprintSoftEdges", "image"),
    ],
)
def test_another_packs_node_that_hands_over_none(node, clip, vae, model, positive, empty, unchanged, id, name):
    inputs = {
        "SanaSprintSampler": {"model": model, "positive": positive, "latent_image": empty},
        "SanaSprintTextEncode": {"text": "a cat"},
        "SanaSprintLoraLoader": {"lora_name": "any.safetensors"},
        "SanaSprintControlNetApply": {
            "positive": positive,
            "control_net": object(),
            "image": torch.zeros(1, 64, 64, 3),
            "vae": vae,
        },
        "SanaSprintSoftEdges": {},
    }[id]
    with unchanged(), pytest.raises(ValueError, match=f"^{name}: nothing came in"):
        node(id, **(inputs | {name: None}))
