"""What the loaders list, and which precisions and quantisations they load."""

import json
import shutil

import pytest
import torch

from sprint_core.weights import checkpoint, layouts, part, presets, tensorfile


def listed(node, id, name):
    return node.ids[id].INPUT_TYPES()["required"][name][1]["options"]


@pytest.fixture
def load(node):
    return lambda name, **inputs: node("SanaSprintModelLoader", model=name, **inputs)


# --- lists ------------------------------------------------------------------------------------------


def test_the_bundled_model_comes_first_everywhere(node):
    for id, name in (
        ("SanaSprintLoader", "model"),
        ("SanaSprintModelLoader", "model"),
        ("SanaSprintTextEncoderLoader", "text_encoder"),
        ("SanaSprintVAELoader", "vae"),
    ):
        assert listed(node, id, name)[0] == presets.BUNDLED_NAME


def test_files_of_each_folder_are_listed_once_with_their_subfolder(node, host, pipeline_folder):
    models = host.base / "models"
    weights = pipeline_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for folder in ("diffusion_models/sana", "checkpoints"):
        (models / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(weights, models / folder / f"listed-{folder[0]}.safetensors")
    (models / "checkpoints" / "notes.txt").write_text("no model")
    names = listed(node, "SanaSprintModelLoader", "model")
    assert names.count("sana/listed-d.safetensors") == names.count("listed-c.safetensors") == 1
    assert "notes.txt" not in names
    assert "sana/listed-d.safetensors" not in listed(node, "SanaSprintVAELoader", "vae")


def test_of_equal_names_the_first_folder_counts(node, host, stored, sample):
    name = stored("transformer", "twice.safetensors")
    first = host.base / "models" / "diffusion_models" / name
    first.parent.mkdir(exist_ok=True)
    (host.base / "models" / "checkpoints" / name).rename(first)
    expected = sample(model=node("SanaSprintModelLoader", model=name), steps=1)
    stored("transformer", name, lambda tensors: {k: v * 0.5 for k, v in tensors.items()})
    assert torch.equal(sample(model=node("SanaSprintModelLoader", model=name), steps=1), expected)


def test_a_folder_is_one_entry_and_its_shards_are_hidden(node, host, pipeline_folder, clip):
    """A Hugging Face text encoder in two shards, as Gemma is published."""
    folder = host.base / "models" / "text_encoders" / "gemma-sharded"
    folder.mkdir(parents=True)
    source = pipeline_folder / "text_encoder"
    tensors = tensorfile.read(source).tensors
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, some in parts.items():
        tensorfile.write(folder / file, {name: tensors[name] for name in some}, {})
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(source / "config.json", folder)
    shutil.copy(pipeline_folder / "tokenizer" / "tokenizer.json", folder)
    shutil.copy(folder / next(iter(parts)), folder.parent / next(iter(parts)))  # loose, as a download leaves it

    entries = [name for name in listed(node, "SanaSprintTextEncoderLoader", "text_encoder") if "gemma" in name]
    assert entries == ["gemma-sharded"]
    assert not any("-of-" in name for name in listed(node, "SanaSprintTextEncoderLoader", "text_encoder"))
    sharded = node("SanaSprintTextEncoderLoader", text_encoder="gemma-sharded")
    assert torch.equal(*(node("CLIPTextEncode", clip=c, text="a cat")[0][0] for c in (sharded, clip)))


@pytest.fixture
def text_encoders(host, pipeline_folder):
    """put(folder, index=True, config=True): the stand-in's Gemma as shards in a folder below models/text_encoders."""
    root, made = host.base / "models" / "text_encoders", []

    def put(folder: str, index: bool = True, config: bool = True):
        (root / folder).mkdir(parents=True, exist_ok=True)
        tensors = tensorfile.read(pipeline_folder / "text_encoder").tensors
        names = sorted(tensors)
        files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, some in files.items():
            tensorfile.write(root / folder / file, {name: tensors[name] for name in some}, {})
            made.append(root / folder / file)
        weight_map = {name: file for file, some in files.items() for name in some}
        extras = {"model.safetensors.index.json": json.dumps({"weight_map": weight_map})} if index else {}
        if config:
            extras["config.json"] = (pipeline_folder / "text_encoder" / "config.json").read_text()
        extras["tokenizer.json"] = (pipeline_folder / "tokenizer" / "tokenizer.json").read_text()
        for file, text in extras.items():
            (root / folder / file).write_text(text)
            made.append(root / folder / file)

    yield put
    for file in made:
        file.unlink()


@pytest.mark.parametrize("index", [False, True], ids=["no index", "index"])
@pytest.mark.parametrize("folder, name", [("", "text_encoders/"), ("a/b/c/d/e", "a/b/c/d/e")], ids=["straight", "deep"])
def test_gemma_as_people_put_it(node, clip, text_encoders, folder, name, index):
    """Its files straight in models/text_encoders, or many folders down; with an index of the shards or without."""
    text_encoders(folder, index)
    assert name in listed(node, "SanaSprintTextEncoderLoader", "text_encoder")
    assert not any("-of-" in entry for entry in listed(node, "SanaSprintTextEncoderLoader", "text_encoder"))
    encoder = node("SanaSprintTextEncoderLoader", text_encoder=name)
    assert torch.equal(*(node("CLIPTextEncode", clip=c, text="a cat")[0][0] for c in (encoder, clip)))


def test_shards_without_a_description_are_one_entry(node, text_encoders):
    text_encoders("no-config", config=False)
    entries = [name for name in listed(node, "SanaSprintTextEncoderLoader", "text_encoder") if "no-config" in name]
    assert entries == ["no-config"]


@pytest.mark.parametrize("encoding, is_entry", [("utf-16", True), ("utf-8-sig", True), ("utf-16-le", False)])
def test_a_description_by_its_byte_order_mark(node, host, pipeline_folder, encoding, is_entry):
    """As all other JSON is read; without a mark it is no text, and the folder's file is listed instead."""
    folder = host.base / "models" / "diffusion_models" / "described"
    shutil.copytree(pipeline_folder / "transformer", folder)
    config = folder / "config.json"
    config.write_bytes(config.read_text().encode(encoding))
    try:
        entries = [name for name in listed(node, "SanaSprintModelLoader", "model") if name.startswith("described")]
        assert entries == ["described" if is_entry else "described/diffusion_pytorch_model.safetensors"]
    finally:
        shutil.rmtree(folder)


def test_every_file_of_the_stock_lists_is_listed(node, host, pipeline_folder):
    """At any depth; a stray config.json hides none, nor does a pipeline's folder or a link that leads in a circle."""
    import folder_paths

    root = host.base / "models" / "checkpoints"
    weights = pipeline_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    places = ("deep/1/2/3/4/5/x.safetensors", "stray/x.safetensors", "stray/y.safetensors", "stray/below/z.safetensors")
    places += ("part/extra.safetensors", "whole/single.safetensors")
    for place in places:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(weights, root / place)
    (root / "stray" / "config.json").write_text("{}")
    shutil.copytree(pipeline_folder / "transformer", root / "part", dirs_exist_ok=True)
    shutil.copytree(pipeline_folder, root / "whole", dirs_exist_ok=True)
    (root / "deep" / "circle").symlink_to(root / "deep")
    try:
        entries = listed(node, "SanaSprintModelLoader", "model")
        stock = [name for name in folder_paths.get_filename_list("checkpoints") if "circle" not in name]
        inside = [name for name in stock if name.startswith(("part/diffusion_pytorch", "whole/"))]
        assert set(places) <= set(stock)
        assert set(stock) - set(inside) <= set(entries)
        assert {"part", "whole", "whole/single.safetensors"} <= set(entries) and "stray" not in entries
        assert not [name for name in entries if "circle" in name or name.startswith("whole/vae")]
    finally:
        (root / "deep" / "circle").unlink()
        for folder in ("deep", "stray", "part", "whole"):
            shutil.rmtree(root / folder)


def test_folders_of_extra_model_paths_are_listed(node, host, pipeline_folder, tmp_path):
    import folder_paths

    shutil.copytree(pipeline_folder / "transformer", tmp_path / "unet" / "elsewhere")
    folder_paths.add_model_folder_path("diffusion_models", str(tmp_path / "unet"))  # as the yaml file does
    try:
        assert "elsewhere" in listed(node, "SanaSprintModelLoader", "model")
        assert node("SanaSprintModelLoader", model="elsewhere").model.sprint
    finally:
        folder_paths.folder_names_and_paths["diffusion_models"][0].remove(str(tmp_path / "unet"))
    assert "elsewhere" not in listed(node, "SanaSprintModelLoader", "model")


@pytest.fixture
def second_folder(tmp_path):
    """second_folder(key): one more model folder of ComfyUI's, as extra_model_paths.yaml adds it, behind the others."""
    import folder_paths

    added = []

    def add(key):
        path = tmp_path / "elsewhere" / key
        path.mkdir(parents=True)
        folder_paths.add_model_folder_path(key, str(path))
        added.append((key, str(path)))
        return path

    yield add
    for key, path in added:
        folder_paths.folder_names_and_paths[key][0].remove(path)


def test_of_two_files_of_one_name_it_is_said_which_is_read(load, host, stored, sample, second_folder, caplog):
    """A link to the file that is read is no other one."""

    def halved(tensors):
        return {name: tensor * 0.5 for name, tensor in tensors.items()}

    name, other = stored("transformer", "namesake.safetensors"), second_folder("checkpoints") / "namesake.safetensors"
    first = host.base / "models" / "checkpoints" / name
    expected = sample(model=load(name), steps=1)
    other.symlink_to(first)
    with caplog.at_level("WARNING"):
        load(name)
        assert not caplog.records
        other.unlink()
        shutil.copy(host.base / "models" / "checkpoints" / stored("transformer", "halved.safetensors", halved), other)
        assert torch.equal(sample(model=load(name), steps=1), expected)
    says = "read from models/checkpoints; elsewhere/checkpoints has another of this name, rename it to choose it"
    assert [record.getMessage() for record in caplog.records] == [f"{name}: {says}"]
    first.unlink()


def test_of_two_loras_of_one_name_it_is_said_which_is_read(node, host, model, write_lora, second_folder, caplog):
    write_lora("namesake.safetensors", "lora_unet_", {"transformer_blocks.1.attn2.to_q": (64, 64)})
    shutil.copy(host.base / "models" / "loras" / "namesake.safetensors", second_folder("loras"))
    with caplog.at_level("WARNING"):
        node("SanaSprintLoraLoader", model=model, lora_name="namesake.safetensors")
    says = "read from models/loras; elsewhere/loras has another of this name, rename it to choose it"
    assert [record.getMessage() for record in caplog.records] == [f"namesake.safetensors: {says}"]


@pytest.mark.parametrize("average", [False, True], ids=["weights", "average"])
def test_the_average_of_a_training_save(load, host, pipeline_folder, sample, average, caplog):
    """The file has the stand-in's weights once; the other set would paint something else."""
    import logging

    weights = checkpoint.load(pipeline_folder, layouts.TRANSFORMER)
    others = {name: tensor * 1.01 for name, tensor in weights.tensors.items()}
    pair = (others, weights.tensors) if average else (weights.tensors, others)
    data = {key: {**tensors, checkpoint.TENSOR_KEY: checkpoint.describe_tensor(weights)}
            for key, tensors in zip(("state_dict", "state_dict_ema"), pair, strict=True)}  # fmt: skip
    folder = host.base / "models" / "checkpoints"
    folder.mkdir(exist_ok=True)
    torch.save(data, folder / "training.pth")
    caplog.set_level(logging.INFO)
    model = load("training.pth", average=average)
    assert torch.equal(sample(model=model), sample())
    assert f"training.pth: weights of state_dict{'_ema' if average else ''}; the file also has" in caplog.text
    build, arguments = model.cached_patcher_init  # with which ComfyUI loads it anew
    assert torch.equal(sample(model=build(*arguments)), sample())


def test_a_changed_file_is_read_again(node, host, stored):
    kind = node.ids["SanaSprintModelLoader"]
    name = stored("transformer", "changing.safetensors")
    stamp = kind.fingerprint_inputs(name, "auto", "auto")
    assert stamp == kind.fingerprint_inputs(name, "auto", "auto")
    stored("transformer", "changing.safetensors", lambda t: {k: v + 1 for k, v in t.items()})
    assert stamp != kind.fingerprint_inputs(name, "auto", "auto")


def test_a_pipeline_folder_serves_every_loader(node, loaded, pipeline_folder, sample):
    name = pipeline_folder.name
    assert torch.equal(sample(model=node("SanaSprintModelLoader", model=name)), sample())
    assert node("SanaSprintVAELoader", vae=name).first_stage_model.config == loaded[2].first_stage_model.config
    assert node("SanaSprintTextEncoderLoader", text_encoder=name).tokenizer.preset == loaded[1].tokenizer.preset


# --- precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype, limit", [("fp32", torch.float32, 0.0), ("fp16", torch.float16, 0.01), ("bf16", torch.bfloat16, 0.05)]
)
def test_the_chosen_dtype_is_used(load, pipeline_folder, sample, close, name, dtype, limit):
    model = load(pipeline_folder.name, dtype=name)
    assert model.model_dtype() == dtype
    error = close(sample(model=model, steps=1), sample(steps=1), limit)
    assert (error > 0) == (limit > 0)


def test_the_all_in_one_loader_gives_every_part_its_dtype(node, pipeline_folder, sample, pixels, close):
    model, clip, vae = node("SanaSprintLoader", model=pipeline_folder.name, dtype="bf16")
    assert model.model_dtype() == clip.cond_stage_model.compute_dtype == vae.vae_dtype == torch.bfloat16
    latent = node("VAEEncode", vae=vae, pixels=pixels)
    image = node("VAEDecode", vae=vae, samples=latent)
    assert latent["samples"].dtype == image.dtype == torch.float32
    assert image.isfinite().all()


# --- quantised files ----------------------------------------------------------------------------------


def layers(tensors):
    """The matrices of the blocks: what quantised files of other families leave in full precision stays so."""
    return [k for k, v in tensors.items() if v.ndim == 2 and k.startswith(("transformer_blocks.", "model.layers."))]


def linear(tensors):
    return [name for name in layers(tensors) if "scale_shift_table" not in name and name.endswith(".weight")]


def comfy_quant(tensors, format="float8_e4m3fn"):
    """ComfyUI's per-layer format: weight in fp8, weight_scale, and comfy_quant, JSON as bytes."""
    import comfy.quant_ops

    description = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
    for name in linear(tensors):
        layout = comfy.quant_ops.QUANT_ALGOS[format]["comfy_tensor_layout"]
        weight = comfy.quant_ops.QuantizedTensor.from_float(tensors[name], layout, scale="recalculate")
        stem = name.removesuffix(".weight")
        tensors |= {
            name: weight._qdata,
            f"{stem}.weight_scale": weight._params.scale.reshape(()),
            f"{stem}.comfy_quant": description.clone(),
        }
    return tensors


def scaled_fp8(tensors):
    """The older format: weight in fp8, scale_weight, and one marker for the file."""
    for name in linear(tensors):
        scale = tensors[name].abs().max() / 448
        tensors[name.removesuffix("weight") + "scale_weight"] = scale.reshape(())
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
    return tensors | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}


@pytest.fixture
def quant_header(host, pipeline_folder):
    """The format of ComfyUI's documentation: the layers are named in the header, and by their names in the file."""
    weights = checkpoint.load(pipeline_folder, layouts.TRANSFORMER)
    tensors = comfy_quant(dict(weights.tensors))
    layers = {k.removesuffix(".comfy_quant"): {"format": "float8_e4m3fn"} for k in tensors if k.endswith("_quant")}
    prefix, header = "model.diffusion_model.", {checkpoint.METADATA_KEY: json.dumps(part.describe(weights))}
    header["_quantization_metadata"] = json.dumps({"layers": {prefix + name: layer for name, layer in layers.items()}})
    tensors = {prefix + k: v for k, v in tensors.items() if not k.endswith("_quant")}
    tensorfile.write(host.base / "models" / "checkpoints" / "header.safetensors", tensors, header)
    return "header.safetensors"


def test_layers_that_the_header_calls_quantised(load, quant_header, stored, sample, close):
    """Equal but for rounding, which follows from where a mapped tensor lies in its file."""
    same = load(stored("transformer", "no-header.safetensors", comfy_quant))
    close(sample(model=load(quant_header), steps=1), sample(model=same, steps=1), 1e-5)


def plain_fp8(tensors):
    return {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}


@pytest.mark.parametrize("change, limit", [(plain_fp8, 0.2), (comfy_quant, 0.05), (scaled_fp8, 0.05)])
def test_fp8_models_load_sample_and_take_a_lora(node, load, stored, sample, clip, close, write_lora, change, limit):
    name = stored("transformer", f"{change.__name__}.safetensors", change)
    quantised = load(name)
    weight = quantised.model.diffusion_model.transformer_blocks[0].attn1.to_q.weight
    if change is not plain_fp8:  # ComfyUI widens that where there is memory for it
        assert weight._qdata.dtype == torch.float8_e4m3fn
    image = sample(model=quantised, steps=1)
    print(change.__name__, close(image, sample(steps=1), limit))
    write_lora("fp8.safetensors", "lora_unet_", {"transformer_blocks.0.attn1.to_q": (64, 64)})
    patched = node("LoraLoader", model=quantised, clip=clip, lora_name="fp8.safetensors")[0]
    assert (sample(model=patched, steps=1) - image).abs().max() > 1e-2
    assert torch.equal(sample(model=quantised, steps=1), image)


@pytest.mark.parametrize("change, limit", [(plain_fp8, 0.2), (comfy_quant, 0.05), (scaled_fp8, 0.05)])
def test_fp8_text_encoders_load_and_encode(node, stored, clip, close, change, limit):
    file = stored("text_encoder", f"te-{change.__name__}.safetensors", change)
    quantised = node("SanaSprintTextEncoderLoader", text_encoder=file)
    tokens = [node("CLIPTextEncode", clip=c, text="a cat")[0][0] for c in (quantised, clip)]
    print(change.__name__, close(*tokens, limit))


@pytest.mark.parametrize("form, limit", [("fp8_e4m3fn", 0.05), ("int8", 0.03)])
def test_files_that_we_quantise(node, host, load, pipeline_folder, sample, clip, close, form, limit):
    """By sprint_core.convert: they load in the ordinary loaders, stay 8 bits in memory, and paint nearly the same."""
    from sprint_core import convert

    checkpoints = host.base / "models" / "checkpoints"
    for kind in ("transformer", "text_encoder"):
        words = [str(pipeline_folder), str(checkpoints / f"{kind}-{form}.safetensors"), "--part", kind]
        assert convert.main([*words, "--quantize", form, "--force"]) == 0
    model = load(f"transformer-{form}.safetensors")
    weight = model.model.diffusion_model.transformer_blocks[0].attn1.to_q.weight
    assert weight._qdata.element_size() == 1
    print(form, "model", close(sample(model=model, steps=1), sample(steps=1), limit))
    encoder = node("SanaSprintTextEncoderLoader", text_encoder=f"text_encoder-{form}.safetensors")
    tokens = [node("CLIPTextEncode", clip=c, text="a cat")[0][0] for c in (encoder, clip)]
    print(form, "text", close(*tokens, limit))


def test_quantised_files_are_for_comfyui_alone(host, stored):
    name = stored("transformer", "core.safetensors", comfy_quant)
    weights = checkpoint.load(host.base / "models" / "checkpoints" / name, layouts.TRANSFORMER)
    with pytest.raises(ValueError, match=r"core\.safetensors.*quantised"):
        checkpoint.build(weights)


def test_loading_a_vae_logs_no_complaint_of_comfyuis(node, host, pipeline_folder, caplog):
    import logging

    filters = list(logging.getLogger().filters)
    node("SanaSprintVAELoader", vae=pipeline_folder.name)
    assert "No VAE weights" not in caplog.text
    assert logging.getLogger().filters == filters
