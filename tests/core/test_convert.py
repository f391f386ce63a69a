"""Conversion: any layout to any other and back, bit for bit; smaller files; nothing half-written."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import standin
import torch
from diffusers import AutoencoderDC, DiffusionPipeline, SanaTransformer2DModel
from transformers import Gemma2Model

from sprint_core import convert, sampler
from sprint_core.models.controlnet import AUTHORS, DIFFUSERS
from sprint_core.pipeline import Pipeline
from sprint_core.text.encoder import TextEncoder
from sprint_core.text.formats import text_preset
from sprint_core.text.loading import find_tokenizer, prompt_format
from sprint_core.text.tokenizers import HFTokenizer
from sprint_core.weights import checkpoint, layouts, presets, quantise, tensorfile
from sprint_core.weights.presets import Preset

PARTS = ("transformer", "autoencoder", "text_encoder")


@pytest.fixture(autouse=True)
def tiny_row(monkeypatch):
    """A published model of the tiny size, so that shapes alone tell its configuration."""
    monkeypatch.setitem(presets.PRESETS, "tiny", Preset("tiny", "Tiny_diffusers", standin.TRANSFORMER, 1024))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return standin.make(tmp_path_factory.mktemp("models") / "sprint")


def run(capsys, *words) -> dict:
    assert convert.main([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def same(a: checkpoint.Weights, b: checkpoint.Weights) -> None:
    assert a.config == b.config and set(a.tensors) == set(b.tensors)
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.mark.parametrize("to", ["native", "comfy", "diffusers"])
def test_a_whole_pipeline(folder, tmp_path, capsys, to):
    out = tmp_path / ("out" if to == "diffusers" else "out.safetensors")
    result = run(capsys, folder, out, "--to", to)
    assert result["parts"] == list(PARTS) and result["bytes"] > 0
    for kind in PARTS:
        source = out / layouts.PARTS[kind].folder if to == "diffusers" else out
        same(*(checkpoint.load(path, layouts.PARTS[kind]) for path in (source, folder)))
    encoder = checkpoint.load(out / "text_encoder" if to == "diffusers" else out, layouts.TEXT_ENCODER)
    assert find_tokenizer(encoder).data == find_tokenizer(checkpoint.load(folder, layouts.TEXT_ENCODER)).data


@pytest.mark.parametrize(
    ("kind", "to", "name"),
    [
        ("transformer", "native", "x.safetensors"),
        ("transformer", "comfy", "x.safetensors"),
        ("transformer", "diffusers", "x"),
        ("transformer", "nvlabs", "x.pth"),
        ("transformer", "nvlabs", "x.safetensors"),
        ("autoencoder", "native", "x.safetensors"),
        ("autoencoder", "diffusers", "x"),
        ("autoencoder", "nvlabs", "x.safetensors"),
        ("text_encoder", "native", "x.safetensors"),
        ("text_encoder", "diffusers", "x"),
    ],
)
def test_there_and_back(folder, tmp_path, capsys, kind, to, name):
    """One part to a layout, and from that to a native file: the same tensors."""
    there, back = tmp_path / "there" / name, tmp_path / "back.safetensors"
    run(capsys, folder, there, "--to", to, "--part", kind)
    same(*(checkpoint.load(path, layouts.PARTS[kind]) for path in (there, folder)))
    run(capsys, there, back)
    same(*(checkpoint.load(path, layouts.PARTS[kind]) for path in (back, folder)))


def test_others_read_it(folder, tmp_path, capsys):
    """diffusers and transformers, from the folders that come out."""
    run(capsys, folder, tmp_path / "out", "--to", "diffusers")
    given = {"output_loading_info": True}
    for kind, name in ((SanaTransformer2DModel, "transformer"), (AutoencoderDC, "vae"), (Gemma2Model, "text_encoder")):
        _, info = kind.from_pretrained(tmp_path / "out" / name, **given)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), name


@pytest.mark.parametrize("changes", [{}, {"guidance_embed": False}])
def test_a_pipeline_of_diffusers(tmp_path, capsys, changes):
    """The folder that comes out is one that diffusers opens whole, and that converts back."""
    source = standin.make(tmp_path / "source", dataclasses.replace(standin.TRANSFORMER, **changes))
    run(capsys, source, tmp_path / "all.safetensors", "--to", "comfy")
    run(capsys, tmp_path / "all.safetensors", tmp_path / "folder", "--to", "diffusers")
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(theirs).__name__ == ("SanaPipeline" if changes else "SanaSprintPipeline")
    if changes:
        assert theirs.scheduler.config.flow_shift == 3.0 and theirs.scheduler.config.use_flow_sigmas
    else:
        assert theirs.scheduler.config.prediction_type == "trigflow"
        ours = Pipeline.load(source)
        gemma, tokenizer = ours.text_encoder.gemma, ours.text_encoder.prompts.tokenizer
        ours.text_encoder = TextEncoder(gemma, tokenizer, text_preset("diffusers"))
        noise = sampler.initial_noise([3], (32, 2, 2))
        options = {"num_inference_steps": 1, "intermediate_timesteps": None, "use_resolution_binning": False}
        picture = theirs("a cat", height=64, width=64, latents=noise, output_type="np", **options).images[0]
        assert np.abs(picture - ours.generate(["a cat"], seeds=[3], steps=1, size=(64, 64))[0].numpy()).max() < 1e-3
    assert run(capsys, tmp_path / "folder", tmp_path / "back.safetensors", "--to", "comfy")["parts"] == list(PARTS)
    for kind in PARTS:
        same(*(checkpoint.load(path, layouts.PARTS[kind]) for path in (tmp_path / "back.safetensors", source)))


def test_the_bundled_model_to_diffusers_and_back(tmp_path, capsys):
    """What no config.json can say survives in the files' headers: its size, and how it reads prompts."""
    run(capsys, presets.BUNDLED, tmp_path / "folder", "--to", "diffusers")
    run(capsys, tmp_path / "folder", tmp_path / "back.safetensors")
    there, back = (Pipeline.load(path) for path in (tmp_path / "folder", tmp_path / "back.safetensors"))
    assert there.size_px == back.size_px == 256
    images = [p.generate(["a red apple"], seeds=[0], steps=1) for p in (Pipeline.load(presets.BUNDLED), there, back)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_an_edited_config_counts(folder, tmp_path, capsys):
    """What diffusers would read of a folder is what we read."""
    run(capsys, folder, tmp_path / "x", "--to", "diffusers", "--part", "transformer")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"guidance_embeds_scale": 0.25}))
    assert checkpoint.load(tmp_path / "x", layouts.TRANSFORMER).config.guidance_scale == 0.25


def test_a_folder_of_two_parts(folder, tmp_path, capsys):
    """Not a pipeline, and read all the same."""
    for kind in ("transformer", "autoencoder"):
        run(capsys, folder, tmp_path / "two" / layouts.PARTS[kind].folder, "--to", "diffusers", "--part", kind)
    result = run(capsys, tmp_path / "two", tmp_path / "two.safetensors")
    assert result["parts"] == ["transformer", "autoencoder"]
    run(capsys, tmp_path / "two.safetensors", tmp_path / "again", "--to", "diffusers")
    assert not (tmp_path / "again" / "model_index.json").exists()


def test_the_authors_layout_has_what_their_model_demands(folder, tmp_path, capsys):
    run(capsys, folder, tmp_path / "x.pth", "--to", "nvlabs", "--part", "transformer")
    tensors = torch.load(tmp_path / "x.pth", weights_only=True)["state_dict"]
    assert tensors["y_embedder.y_embedding"].shape == (300, standin.TRANSFORMER.caption_width)
    assert tensors["logvar_linear.weight"].shape == (1, standin.TRANSFORMER.width)
    assert all(not tensors[name].any() for name in ("y_embedder.y_embedding", "logvar_linear.bias"))
    assert tensors["blocks.0.attn.qkv.weight"].shape == (192, 64)


def test_controlnets(tmp_path, capsys):
    published = standin.control(DIFFUSERS, guidance_embed=False, qk_norm=False, time_scale=1000.0)
    checkpoint.save(tmp_path / "a.safetensors", [published], {})
    run(capsys, tmp_path / "a.safetensors", tmp_path / "folder", "--to", "diffusers")
    same(checkpoint.load(tmp_path / "folder", layouts.CONTROLNET), published)
    checkpoint.save(tmp_path / "b.safetensors", [standin.control(AUTHORS)], {})
    assert convert.main([str(tmp_path / "b.safetensors"), str(tmp_path / "other"), "--to", "diffusers"]) == 1


def test_provenance(folder, tmp_path, capsys):
    run(capsys, folder, tmp_path / "x.safetensors", "--part", "transformer")
    about = json.loads(tensorfile.read(tmp_path / "x.safetensors").metadata["sana_sprint"])
    assert about["provenance"] == {"source": "sprint", "command": "python -m sprint_core.convert --to native"}
    assert about["transformer"]["settings"]["size_px"] == 1024
    weights = checkpoint.load(folder, layouts.TRANSFORMER)
    assert about["transformer"]["preset"] == checkpoint.preset_name(weights)
    assert about["transformer"]["hash"] == tensorfile.hash_of(weights.tensors)


# --- 8 bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "limit"), [("fp8_e4m3fn", 0.04), ("int8", 0.01)])
@pytest.mark.parametrize("kind", list(quantise.LAYERS))
def test_quantised_layers(folder, kind, form, limit):
    """Linear layers and 1x1 convolutions within the format's error, a scale beside each; all else untouched."""
    weights = checkpoint.load(folder, layouts.PARTS[kind])
    tensors = quantise.quantised(weights.tensors, kind, form)
    layers = [name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")]
    assert len(layers) == (20 if kind == "transformer" else 14)
    for layer in layers:
        about = json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))
        assert about == {"format": quantise.FORMATS[form]}
        stored, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]
        assert stored.dtype.itemsize == 1 and scale.dtype == torch.float32
        want = weights.tensors[f"{layer}.weight"].float()
        assert stored.shape == want.shape
        stored, want = stored.flatten(1), want.flatten(1)
        assert ((stored.float() * scale - want).norm() / want.norm()) < limit
    rest = {name for name in weights.tensors if name.removesuffix(".weight") not in layers}
    assert all(torch.equal(tensors[name], weights.tensors[name]) for name in rest)
    assert not any(
        word in layer for layer in layers for word in ("norm", "embed", "table", "depth", "proj_out", "time")
    )


def test_a_layer_of_zeros():
    tensors = {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(4, 4)}
    for form in quantise.FORMATS:
        out = quantise.quantised(tensors, "transformer", form)
        stored = (
            out["transformer_blocks.0.attn1.to_q.weight"].float() * out["transformer_blocks.0.attn1.to_q.weight_scale"]
        )
        assert torch.equal(stored, torch.zeros(4, 4))


def test_quantised_files_are_smaller(folder, tmp_path, capsys):
    for form in (None, *quantise.FORMATS):
        words = ["--quantize", form] if form else []
        run(capsys, folder, tmp_path / f"{form}.safetensors", "--part", "text_encoder", *words)
    sizes = [(tmp_path / f"{form}.safetensors").stat().st_size for form in (None, *quantise.FORMATS)]
    assert max(sizes[1:]) < 0.5 * sizes[0]
    with pytest.raises(ValueError, match="quantised"):
        checkpoint.build(checkpoint.load(tmp_path / "int8.safetensors", layouts.TEXT_ENCODER))


# --- refused, and interrupted -----------------------------------------------------------------------


def refused(caplog, *words) -> str:
    assert convert.main([str(word) for word in words]) == 1
    return caplog.records[-1].getMessage()


def test_refused(folder, tmp_path, capsys, caplog):
    tensorfile.write(tmp_path / "flux.safetensors", {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, {})
    (tmp_path / "there.safetensors").write_bytes(b"something")
    run(capsys, folder, tmp_path / "t.safetensors", "--part", "transformer", "--quantize", "int8")
    cases = {
        (tmp_path / "flux.safetensors", tmp_path / "x.safetensors"): "this is a FLUX model; nothing in it",
        (tmp_path / "gone.safetensors", tmp_path / "x.safetensors"): "gone.safetensors: no such file",
        (folder, tmp_path / "there.safetensors"): "there.safetensors exists; choose another name, or overwrite",
        (folder, tmp_path / "x.bin"): "--to native writes a file ending in .safetensors",
        (
            folder,
            tmp_path / "x.pth",
            "--to",
            "nvlabs",
        ): "it has several parts, and --to nvlabs writes one: choose --part",
        (folder, tmp_path / "x.safetensors", "--to", "diffusers"): "--to diffusers writes a folder",
        (folder, tmp_path / "x.pth", "--to", "nvlabs", "--part", "text_encoder"): "the authors have no layout for this",
        (folder, tmp_path / "x.safetensors", "--part", "controlnet"): "has no 'controlnet' folder",
        (
            folder,
            tmp_path / "x.safetensors",
            "--part",
            "autoencoder",
            "--quantize",
            "int8",
        ): "only transformers and text",
        (tmp_path / "t.safetensors", tmp_path / "x.safetensors", "--quantize", "int8"): "is quantised already",
        (tmp_path / "t.safetensors", tmp_path / "x", "--to", "diffusers"): "diffusers cannot read quantised layers",
        (folder, folder, "--to", "diffusers", "--force"): "writing over what is being read",
    }
    before = sorted(tmp_path.iterdir())
    for words, message in cases.items():
        assert message in refused(caplog, *words)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.safetensors").read_bytes() == b"something"


def test_force_overwrites(folder, tmp_path, capsys):
    for name, to in (("x.safetensors", "native"), ("x", "diffusers")):
        run(capsys, folder, tmp_path / name, "--to", to, "--part", "transformer")
        (tmp_path / "x" / "old.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "x" / "old.txt").write_text("old")
        run(capsys, folder, tmp_path / name, "--to", to, "--part", "transformer", "--force")
        same(checkpoint.load(tmp_path / name, layouts.TRANSFORMER), checkpoint.load(folder, layouts.TRANSFORMER))
        shutil.rmtree(tmp_path / "x") if to == "native" else None
    assert not (tmp_path / "x" / "old.txt").exists()


def test_too_little_disk(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert "MiB are needed and 0 MiB free; make room" in refused(caplog, folder, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["native", "diffusers"])
def test_an_interruption_leaves_the_old_file(folder, tmp_path, capsys, monkeypatch, to):
    target = tmp_path / ("x" if to == "diffusers" else "x.safetensors")
    run(capsys, folder, target, "--to", to, "--part", "transformer")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    class Killed(BaseException):
        pass

    replace = os.replace

    def killed(source, destination):
        if Path(destination) == target:
            raise Killed
        replace(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        convert.main([str(folder), str(target), "--to", to, "--part", "autoencoder", "--force"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_bundled_model_goes_through(tmp_path, capsys):
    run(capsys, presets.BUNDLED, tmp_path / "x.safetensors", "--to", "comfy")
    for kind in PARTS:
        same(*(checkpoint.load(path, layouts.PARTS[kind]) for path in (tmp_path / "x.safetensors", presets.BUNDLED)))
    encoder = checkpoint.load(tmp_path / "x.safetensors", layouts.TEXT_ENCODER)
    assert prompt_format(encoder) == prompt_format(checkpoint.load(presets.BUNDLED, layouts.TEXT_ENCODER))
    assert isinstance(find_tokenizer(encoder), HFTokenizer)
