"""Every published layout to (configuration, native tensors) and back, and what is refused with which words."""

import copy
import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import standin
import torch
from oracles import relative_error, shapes_of
from tiny_networks import GEMMA, NATIVE, SANA10, SANA15, SPRINT, TEACHER, native, nvlabs, save

from sprint_core import convert
from sprint_core.models.gemma import GemmaConfig
from sprint_core.models.transformer import SanaTransformer, TransformerConfig
from sprint_core.text.formats import text_preset
from sprint_core.text.loading import find_tokenizer, prompt_format
from sprint_core.text.tokenizers import load_tokenizer, tokenizer_state
from sprint_core.weights import checkpoint, keymaps, layouts, part, presets, tensorfile
from sprint_core.weights.checkpoint import CheckpointError, build, load
from sprint_core.weights.kinds import parts_in
from sprint_core.weights.presets import Preset

PIPELINE = ("transformer", "autoencoder", "text_encoder")  # the parts of a folder
SPIECE = torch.arange(7, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def tiny_row(monkeypatch):
    """A published model of the tiny size, so that shapes alone tell its configuration."""
    monkeypatch.setitem(presets.PRESETS, "tiny", Preset("tiny", "Tiny_diffusers", SPRINT, 64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole pipeline folder in the diffusers layout."""
    return standin.make(tmp_path_factory.mktemp("models") / "sprint")


def save_pickle(path: Path, tensors: dict[str, torch.Tensor], **options) -> Path:
    torch.save({"state_dict": tensors, "epoch": 1}, path, **options)
    return path


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def assert_same(weights: checkpoint.Weights, tensors: dict[str, torch.Tensor]) -> None:
    assert set(weights.tensors) == set(tensors)
    assert all(torch.equal(weights.tensors[name], tensors[name]) for name in tensors)
    assert shapes_of(build(weights)) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# --- transformers ---------------------------------------------------------------------------------


def transformer_layouts(folder: Path) -> dict[str, Path]:
    """The same tiny transformer in every container."""
    folder.mkdir(exist_ok=True)
    tensors = layouts.TRANSFORMER.to_diffusers(NATIVE["transformer"], SPRINT)
    files = {"pipeline folder": standin.make(folder / "pipeline")}
    files["component folder"] = folder / "pipeline" / "transformer"
    files["nvlabs .pth"] = save_pickle(folder / "Sana_Sprint.pth", nvlabs())
    files["nvlabs .pth, legacy"] = save_pickle(folder / "old.pth", nvlabs(), _use_new_zipfile_serialization=False)
    files["nvlabs .safetensors"] = save(folder / "nvlabs.safetensors", nvlabs())
    for prefix in layouts.PARTS["transformer"].prefixes:
        files[f"diffusers, {prefix!r}"] = save(folder / f"d{prefix}.safetensors", prefixed(prefix, tensors))
        files[f"nvlabs, {prefix!r}"] = save(folder / f"n{prefix}.safetensors", prefixed(prefix, nvlabs()))
    shards = folder / "shards"
    shards.mkdir()
    names = sorted(tensors)
    parts = {
        "diffusion_pytorch_model-00001-of-00002": names[::2],
        "diffusion_pytorch_model-00002-of-00002": names[1::2],
    }
    for stem, held in parts.items():
        save(shards / f"{stem}.safetensors", {name: tensors[name] for name in held})
    index = {"weight_map": {name: f"{stem}.safetensors" for stem, held in parts.items() for name in held}}
    (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (shards / "config.json").write_text(json.dumps(layouts.transformer.config_to_diffusers(SPRINT)))
    files["shards"] = shards
    variant = folder / "variant"
    variant.mkdir()
    save(variant / "diffusion_pytorch_model.fp16.safetensors", tensors)
    files["variant"] = variant
    everything = prefixed("model.diffusion_model.", nvlabs()) | prefixed("vae.", NATIVE["autoencoder"])
    everything |= prefixed("text_encoders.gemma2_2b.transformer.", NATIVE["text_encoder"])
    files["all in one"] = save(folder / "all.safetensors", everything)
    return files


@torch.no_grad()
def test_every_layout_of_a_transformer_gives_the_same_bytes(tmp_path):
    """The same native file, and the same velocity to the last bit.

    The latter once the weights are copied out of their files, as a device would: those of a
    safetensors file start anywhere, and MKL rounds differently (2e-7) where they are not aligned.
    """
    generator = torch.Generator().manual_seed(1)
    x, caption = torch.randn(1, 32, 2, 3, generator=generator), torch.randn(1, 4, 64, generator=generator)
    inputs = (x, torch.tensor([0.7]), caption, torch.tensor([4.5]))
    mapped, copied, files = [], set(), set()
    for name, path in transformer_layouts(tmp_path / "in").items():
        weights = load(path, layouts.TRANSFORMER)
        assert weights.config == SPRINT, name
        assert_same(weights, NATIVE["transformer"])
        model = build(weights)
        mapped.append(model(*inputs))
        copied.add(copy.deepcopy(model)(*inputs).numpy().tobytes())
        checkpoint.save(tmp_path / "out.safetensors", [weights], {})
        files.add((tmp_path / "out.safetensors").read_bytes())
    assert len(mapped) == 18 and len(files) == len(copied) == 1
    assert all(relative_error(velocity, mapped[0]) < 1e-6 for velocity in mapped)


@pytest.mark.parametrize("config", [SPRINT, TEACHER, SANA15, SANA10], ids=["sprint", "teacher", "1.5", "1.0"])
def test_configuration_of_every_kind(tmp_path, config, caplog):
    folder = standin.make(tmp_path / "pipeline", config)
    assert load(folder, layouts.TRANSFORMER).config == config
    assert not caplog.records  # a config.json leaves nothing to assume
    path = save_pickle(tmp_path / "sana.pth", nvlabs(config))
    weights = load(path, layouts.TRANSFORMER)
    if config == TEACHER:  # SANA 1.5 has the same tensors
        assert weights.config == SANA15
        assert load(path, layouts.TRANSFORMER, time_scale=1.0).config == config
    else:
        assert weights.config == config
    assert load(path, layouts.TRANSFORMER, time_scale=7.0).config == dataclasses.replace(config, time_scale=7.0)


def test_an_assumed_time_scale_is_said(tmp_path, caplog):
    path = save(tmp_path / "sana15.safetensors", nvlabs(SANA15))
    with caplog.at_level(logging.WARNING):
        assert "0..1000" in load(path, layouts.TRANSFORMER).assumed
    assert "sana15.safetensors: assumed time scale 0..1000" in caplog.text
    caplog.clear()
    assert not load(path, layouts.TRANSFORMER, time_scale=1000.0).assumed
    assert not load(save(tmp_path / "s.safetensors", nvlabs(SPRINT)), layouts.TRANSFORMER).assumed
    assert not load(save(tmp_path / "1.safetensors", nvlabs(SANA10)), layouts.TRANSFORMER).assumed
    assert not caplog.records
    bare = tmp_path / "folder"
    bare.mkdir()
    save(bare / "model.safetensors", nvlabs(SANA15))
    assert load(bare, layouts.TRANSFORMER).assumed  # a folder without config.json says no more than a file


@pytest.mark.parametrize(
    ("positions", "base", "scale", "shift"),
    [(0, 0, 1.0, 3.0), (1024, 0, 1.0, 3.0), (4096, 64, 1.0, 3.0), (16384, 128, 2.0, 6.0)],
)
def test_position_embeddings_tell_2k_and_4k(tmp_path, positions, base, scale, shift):
    weights = load(save_pickle(tmp_path / "sana.pth", nvlabs(SANA10, positions)), layouts.TRANSFORMER)
    assert (weights.config.pos_embed_base, weights.config.pos_embed_scale) == (base, scale)
    assert weights.settings["flow_shift"] == shift


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"student.net._orig_mod.{name}",
        lambda name: f"unet.model.diffusion_model.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}".replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
        lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),
    ],
    ids=["data parallel", "compiled", "student", "unet", "sharded", "a compiled layer"],
)
@pytest.mark.parametrize("tensors", [nvlabs(), NATIVE["transformer"]], ids=["authors", "diffusers"])
def test_wrappers_of_trainers(tmp_path, wrap, tensors):
    """In any nesting; a teacher beside the student is left alone."""
    wrapped = {wrap(name): tensor for name, tensor in tensors.items()} | {"teacher.x": torch.zeros(1)}
    plain = load(save(tmp_path / "plain.safetensors", tensors), layouts.TRANSFORMER)
    weights = load(save(tmp_path / "wrapped.safetensors", wrapped), layouts.TRANSFORMER)
    weights.tensors.pop("teacher.x", None)
    assert_same(weights, plain.tensors)
    assert weights.config == plain.config


def test_settings_of_a_transformer(tmp_path):
    folder = standin.make(tmp_path / "pipeline", SANA10)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    for data, shift in (({"flow_shift": 2.5}, 2.5), ({"shift": 4.0}, 4.0), ({}, 3.0)):
        scheduler.write_text(json.dumps(data))
        for path in (folder, folder / "transformer"):
            assert load(path, layouts.TRANSFORMER).settings == {"flow_shift": shift, "size_px": 1024}
    sprint = load(save_pickle(tmp_path / "s.pth", nvlabs()), layouts.TRANSFORMER)
    assert sprint.settings["size_px"] == 64  # the tiny row's


def test_the_size_of_a_512_px_model_is_that_of_its_config_json(tmp_path):
    """Nothing else tells it from one of 1024 px; a converted file keeps it."""
    folder = standin.make(tmp_path / "pipeline", SANA10)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": 16}))
    assert load(folder, layouts.TRANSFORMER).settings["size_px"] == 512
    converted = tmp_path / "one.safetensors"
    convert.main([str(folder), str(converted), "--part", "transformer"])
    assert load(converted, layouts.TRANSFORMER).settings["size_px"] == 512


def test_unpublished_sizes_need_a_configuration(tmp_path):
    tensors = keymaps.from_native(native(dataclasses.replace(SPRINT, depth=1)), layouts.transformer.NVLABS)
    with pytest.raises(CheckpointError, match=r"x.pth: cannot tell .* a config\.json is needed"):
        load(save_pickle(tmp_path / "x.pth", tensors), layouts.TRANSFORMER)


# --- auto-encoders --------------------------------------------------------------------------------


def test_every_layout_of_an_autoencoder(tmp_path, folder):
    tensors = NATIVE["autoencoder"]
    original = keymaps.from_native(tensors, layouts.autoencoder.DCAE)
    paths = [folder, folder / "vae", save_pickle(tmp_path / "dc-ae.pt", original)]
    for i, prefix in enumerate(layouts.PARTS["autoencoder"].prefixes):
        paths.append(save(tmp_path / f"native{i}.safetensors", prefixed(prefix, tensors)))
        paths.append(save(tmp_path / f"original{i}.safetensors", prefixed(prefix, original)))
    for path in paths:
        weights = load(path, layouts.AUTOENCODER)
        assert weights.config == standin.AUTOENCODER
        assert_same(weights, tensors)


# --- text encoders --------------------------------------------------------------------------------


def gemma_folder(path: Path, tensors: dict, config: GemmaConfig = GEMMA) -> Path:
    path.mkdir()
    save(path / "model.safetensors", tensors)
    names = {"vocab_size": "vocab", "hidden_size": "width", "num_hidden_layers": "depth", "head_dim": "head_dim"}
    names |= {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "intermediate_size": "ffn"}
    values = {theirs: getattr(config, ours) for theirs, ours in names.items()}
    (path / "config.json").write_text(json.dumps({"model_type": "gemma2", **values}))
    return path


def test_every_layout_of_a_text_encoder(tmp_path):
    tensors = NATIVE["text_encoder"]
    bare = keymaps.from_native(tensors, layouts.text_encoder.GEMMA_BARE)
    causal = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    assert "embed_tokens.weight" in bare
    paths = [gemma_folder(tmp_path / "bare", bare), gemma_folder(tmp_path / "causal", causal)]
    for i, prefix in enumerate(layouts.PARTS["text_encoder"].prefixes):
        paths.append(save(tmp_path / f"{i}.safetensors", prefixed(prefix, causal)))
        paths.append(save(tmp_path / f"bare{i}.safetensors", prefixed(prefix, bare)))
    for path in paths:
        weights = load(path, layouts.TEXT_ENCODER)
        assert weights.config == GEMMA and not weights.extras
        assert_same(weights, tensors)


@pytest.mark.parametrize("key", ["spiece_model", "tokenizer_json"])
def test_a_tokenizer_in_the_same_file(tmp_path, key):
    path = save(tmp_path / "gemma.safetensors", NATIVE["text_encoder"] | {key: SPIECE})
    weights = load(path, layouts.TEXT_ENCODER)
    assert set(weights.extras) == {key} and torch.equal(weights.extras[key], SPIECE)
    assert_same(weights, NATIVE["text_encoder"])


def test_tokenizers_are_found(tmp_path, folder):
    tokens = load_tokenizer(folder).encode("a cat")
    assert find_tokenizer(load(folder, layouts.TEXT_ENCODER)).encode("a cat") == tokens

    file = save(tmp_path / "gemma.safetensors", NATIVE["text_encoder"])
    with pytest.raises(CheckpointError, match=r"gemma\.safetensors: no tokenizer .* put tokenizer\.json or"):
        find_tokenizer(load(file, layouts.TEXT_ENCODER))
    elsewhere = folder / "tokenizer"
    (tmp_path / "tokenizer.json").write_bytes((elsewhere / "tokenizer.json").read_bytes())
    assert find_tokenizer(load(file, layouts.TEXT_ENCODER)).encode("a cat") == tokens

    json_tensor = torch.frombuffer(bytearray((elsewhere / "tokenizer.json").read_bytes()), dtype=torch.uint8)
    embedded = save(tmp_path / "with.safetensors", NATIVE["text_encoder"] | {"tokenizer_json": json_tensor})
    (tmp_path / "tokenizer.json").unlink()
    assert find_tokenizer(load(embedded, layouts.TEXT_ENCODER)).encode("a cat") == tokens
    damaged = save(tmp_path / "damaged.safetensors", NATIVE["text_encoder"] | {"spiece_model": SPIECE})
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors: its tokenizer cannot be used"):
        find_tokenizer(load(damaged, layouts.TEXT_ENCODER))


# --- native files ---------------------------------------------------------------------------------


def test_native_file_of_one_part(tmp_path):
    weights = load(save_pickle(tmp_path / "x.pth", nvlabs(SANA15)), layouts.TRANSFORMER, time_scale=1.0)
    weights.settings["flow_shift"] = 5.0
    path = tmp_path / "native.safetensors"
    checkpoint.save(path, [weights], {"source": "Sana.pth", "command": "convert"})
    again = load(path, layouts.TRANSFORMER)
    assert (again.config, again.settings, again.assumed) == (TEACHER, weights.settings, "")
    assert_same(again, weights.tensors)
    about = json.loads(tensorfile.read(path).metadata["sana_sprint"])
    assert about["provenance"] == {"source": "Sana.pth", "command": "convert"}


def test_native_file_of_all_parts(tmp_path, folder):
    parts = [load(folder, layouts.PARTS[kind]) for kind in PIPELINE]
    encoder = parts[-1]
    preset = dataclasses.replace(text_preset("diffusers"), max_tokens=77)
    encoder.settings["text"] = dataclasses.asdict(preset)
    encoder.extras |= tokenizer_state(find_tokenizer(encoder))
    path = tmp_path / "all.safetensors"
    checkpoint.save(path, parts, {})
    assert parts_in(tensorfile.read(path).tensors) == list(PIPELINE)
    for weights in parts:
        again = load(path, weights.layout)
        assert (again.config, again.settings) == (weights.config, weights.settings)
        assert_same(again, weights.tensors)
    assert prompt_format(again) == preset
    assert prompt_format(load(folder, layouts.TEXT_ENCODER)) == text_preset("nvlabs")
    assert find_tokenizer(again).encode("hi") == find_tokenizer(encoder).encode("hi")


def test_description_as_a_tensor(tmp_path):
    """A host that saves tensors and drops the header keeps the configuration."""
    weights = load(save_pickle(tmp_path / "x.pth", nvlabs(SANA15)), layouts.TRANSFORMER, time_scale=1.0)
    tensors = weights.tensors | {checkpoint.TENSOR_KEY: checkpoint.describe_tensor(weights)}
    again = load(save(tmp_path / "host.safetensors", prefixed("diffusion_model.", tensors)), layouts.TRANSFORMER)
    assert (again.config, again.settings) == (TEACHER, weights.settings)
    assert_same(again, weights.tensors)


@pytest.mark.parametrize(
    "about",
    [
        "{",
        "[]",
        '{"transformer": {}}',
        '{"transformer": []}',
        '{"transformer": {"config": {"novelty": 1}}}',
    ],
)
def test_damaged_description(tmp_path, about):
    path = save(tmp_path / "x.safetensors", NATIVE["transformer"], {"sana_sprint": about})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: (its sana_sprint metadata|cannot tell)"):
        load(path, layouts.TRANSFORMER)


# --- building -------------------------------------------------------------------------------------


def test_dtypes(tmp_path, caplog):
    tensors = {k: v.bfloat16() for k, v in NATIVE["transformer"].items()}
    tensors["caption_norm.weight"] = tensors["caption_norm.weight"].float()
    weights = load(save(tmp_path / "x.safetensors", tensors), layouts.TRANSFORMER)
    assert part.majority_dtype(weights.tensors) == torch.bfloat16
    with caplog.at_level(logging.INFO):
        assert {p.dtype for p in build(weights).parameters()} == {torch.bfloat16}
    assert "bfloat16, 214,816 parameters" in caplog.text
    model = build(weights, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_files_dtype_is_that_of_most_elements():
    """Of elements, not of tensors; layers that are quantised one by one do not count."""
    half, small, byte = torch.zeros(5, 4, dtype=torch.bfloat16), torch.zeros(3), torch.zeros(99, dtype=torch.int8)
    tensors = {"a.weight": half, "b.weight": small, "b.bias": small}
    assert part.majority_dtype(tensors) == torch.bfloat16
    quantised = {"c.weight": byte, "c.weight_scale": torch.zeros(99), "c.comfy_quant": byte}
    assert part.majority_dtype(tensors | quantised) == torch.bfloat16


def test_untouched_weights_stay_mapped(tmp_path):
    weights = load(save(tmp_path / "x.safetensors", NATIVE["transformer"]), layouts.TRANSFORMER)
    before = {name: tensor.data_ptr() for name, tensor in weights.tensors.items()}
    assert {name: p.data_ptr() for name, p in build(weights).named_parameters()} == before


MEMORY = """
import sys
sys.path += [sys.argv[1], sys.argv[1] + "/tests"]
import torch
import standin
from sprint_core.models import transformer
from sprint_core.weights import checkpoint, layouts, presets

def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))

def use(path):
    for p in checkpoint.build(checkpoint.load(path, layouts.TRANSFORMER)).parameters():
        p.view(-1)[::1024].max()  # reads every page

presets.PRESETS["tiny"] = presets.Preset("tiny", "", standin.TRANSFORMER, 64)
use(sys.argv[2])  # what the first model costs, whatever its size
config = transformer.TransformerConfig(width=1152, depth=2, cross_heads=16)
presets.PRESETS["small"] = presets.Preset("small", "", config, 1024)
before = peak()
for path in sys.argv[3:]:
    use(path)
    print(peak() - before)
"""


def test_loading_takes_little_more_memory_than_the_file(tmp_path):
    """Peak resident memory of a fresh process that loads, builds and reads every weight."""
    config = TransformerConfig(width=1152, depth=2, cross_heads=16)
    shapes = shapes_of(SanaTransformer(config, device="meta"))
    tensors = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
    paths = [save(tmp_path / "tiny.safetensors", NATIVE["transformer"]), save(tmp_path / "x.safetensors", tensors)]
    paths.append(save_pickle(tmp_path / "x.pth", keymaps.from_native(tensors, layouts.transformer.NVLABS)))
    size = paths[1].stat().st_size
    assert size > 180e6
    command = [sys.executable, "-c", MEMORY, Path(checkpoint.__file__).parents[2], *paths]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    for rise in map(int, done.stdout.split()):  # of the first file, then of both, one after the other
        assert 0.9 * size < rise <= 1.1 * size, f"{rise / size:.2f} times the file"


# --- refusals -------------------------------------------------------------------------------------


def test_pipeline_folders_with_a_part_missing(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no 'transformer' folder; download it whole"):
        load(tmp_path, layouts.TRANSFORMER)


@pytest.mark.parametrize("text", ["{", "[]", '{"_class_name": "FluxTransformer2DModel"}', '{"_class_name": "Sana"}'])
def test_bad_config_json(tmp_path, text):
    save(tmp_path / "model.safetensors", NATIVE["transformer"])
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=tmp_path.name):
        load(tmp_path, layouts.TRANSFORMER)


def test_missing_extra_and_misshapen_tensors_are_listed(tmp_path):
    tensors = dict(NATIVE["transformer"])
    for x in "qkv":
        del tensors[f"transformer_blocks.1.attn1.to_{x}.weight"]
    tensors["proj_out.bias"] = torch.zeros(31)
    tensors |= {f"new.{i:02}": torch.zeros(1) for i in range(12)}
    weights = load(save(tmp_path / "x.safetensors", tensors), layouts.TRANSFORMER)
    with pytest.raises(CheckpointError) as error:
        build(weights)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'x.safetensors'}: not a complete file for a SANA transformer: ")
    missing = [f"transformer_blocks.1.attn1.to_{x}.weight" for x in "kqv"]
    assert f"3 tensors missing: {', '.join(missing)};" in message
    assert f"12 tensors unexpected: {', '.join(f'new.{i:02}' for i in range(10))}, ...;" in message
    assert "1 tensors of another shape: proj_out.bias (31,) instead of (32,); download it again" in message


def test_quantised_files_are_for_the_host(tmp_path):
    tensors = NATIVE["transformer"] | {"proj_out.comfy_quant": torch.zeros(2, dtype=torch.uint8)}
    weights = load(save(tmp_path / "x.safetensors", tensors), layouts.TRANSFORMER)
    checkpoint.check_names(weights, ignore=checkpoint.QUANT_SUFFIXES)
    with pytest.raises(CheckpointError, match="quantised; it runs inside ComfyUI only"):
        build(weights)


def test_config_json_of_another_library_is_ignored(tmp_path):
    """The authors' DC-AE folder has one that only names the model: the tensors say the rest."""
    folder = tmp_path / "dc-ae"
    folder.mkdir()
    save(folder / "model.safetensors", NATIVE["autoencoder"])
    (folder / "config.json").write_text('{"model_name": "dc-ae-f32c32-sana-1.1"}')
    assert load(folder, layouts.AUTOENCODER).config == standin.AUTOENCODER


def test_time_scale_against_the_file_is_said(folder, caplog):
    assert load(folder, layouts.TRANSFORMER, time_scale=1000.0).config.time_scale == 1000.0
    assert "though the file says 0..1" in caplog.text
