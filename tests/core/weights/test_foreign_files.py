"""What is no file of weights, or of weights that cannot run here, is named for what it is, with what to do."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import standin
import torch
from tiny_networks import NATIVE, SPRINT, save

from sprint_core.weights import layouts, presets, quantise
from sprint_core.weights.checkpoint import Source, load
from sprint_core.weights.tensorfile import WEIGHT_SUFFIXES, CheckpointError, read

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3217030792\n"
FILES = {
    "Git LFS": (POINTER, "pointer of Git LFS", "git lfs pull"),
    "git-annex": (b"/annex/objects/MD5E-s123--x.safetensors\n", "pointer of git-annex", "git annex get"),
    "page": (b"<!DOCTYPE html>\n<html><head><title>Log in</title>", "a web page", "hf download"),
    "page in capitals": (b"\xef\xbb\xbf \n<HTML>404</HTML>", "a web page", "hf download"),
    "S3": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page", "hf download"),
    "answer": (b'{"error":"Access to model X is restricted"}', "a text, not weights", "hf download"),
    "words": (b"Invalid username or password.", "a text, not weights", "hf download"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 80, "a GGUF file", "take the bf16, fp16 or fp32 version"),
    "archive": (b"\x1f\x8b\x08" + b"\0" * 80, "an archive", "unpack it"),
    "image": (b"\x89PNG\r\n\x1a\n" + b"\0" * 80, "an image", "choose another file"),
}


@pytest.mark.parametrize("suffix", [*WEIGHT_SUFFIXES, ".gguf"])
@pytest.mark.parametrize("kind", FILES)
def test_files_that_hold_no_tensors(tmp_path, kind, suffix):
    content, what, advice = FILES[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: this is ") and what in message and advice in message
    assert "download it again" not in message and "truncated" not in message


def test_openvino(tmp_path):
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    (tmp_path / "openvino_model.bin").write_bytes(bytes(range(200)))
    with pytest.raises(CheckpointError, match=r"openvino_model\.bin: this is a model of OpenVINO"):
        read(tmp_path / "openvino_model.bin")


def test_containers_are_told_by_their_content(tmp_path):
    """As people rename them."""
    tensors = {"a": torch.ones(2)}
    safetensors.torch.save_file(tensors, tmp_path / "really_safe.pth")
    torch.save(tensors, tmp_path / "really_pickled.safetensors")
    for path in tmp_path.iterdir():
        assert torch.equal(read(path).tensors["a"], tensors["a"])


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_only_what_is_truncated_is_to_be_downloaded_again(tmp_path, cut):
    path = save(tmp_path / "x.safetensors", NATIVE["transformer"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    words = rf"x\.safetensors: truncated, {len(whole) - cut:,} of {len(whole):,} bytes are there; download it again"
    with pytest.raises(CheckpointError, match=words):
        read(path)
    path.write_bytes(whole[:8] + whole[8:].replace(b'"F32"', b'"Q99"', 1))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its header is damaged .*; take another copy of it"):
        read(path)
    path.write_bytes(b"\x20\0\0\0\0\0\0\0no header" + bytes(100))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a safetensors file.*; choose another file"):
        read(path)


LINEAR = "transformer_blocks.0.attn1.to_q"
TOOLS = {
    "bitsandbytes": {f"{LINEAR}.weight.absmax": torch.ones(3), f"{LINEAR}.weight.quant_map": torch.ones(16)},
    "bitsandbytes, int8": {f"{LINEAR}.SCB": torch.ones(64)},
    "SVDQuant": {f"{LINEAR}.qweight": torch.ones(2, 2, dtype=torch.int8), f"{LINEAR}.wscales": torch.ones(2)},
    "quanto": {f"{LINEAR}.weight._data": torch.ones(2, 2, dtype=torch.int8), f"{LINEAR}.weight._scale": torch.ones(2)},
    "GPTQ": {f"{LINEAR}.qweight": torch.ones(2, 2, dtype=torch.int32), f"{LINEAR}.qzeros": torch.ones(2)},
    "compressed-tensors": {f"{LINEAR}.weight_packed": torch.ones(2, 2, dtype=torch.int32)},
}


@pytest.mark.parametrize("beside", [True, False], ids=["SANA", "alone"])
@pytest.mark.parametrize("tool", TOOLS)
def test_weights_that_other_tools_quantised(tmp_path, tool, beside):
    tensors = {k: v for k, v in NATIVE["transformer"].items() if k != f"{LINEAR}.weight"} if beside else {}
    path = save(tmp_path / "x.safetensors", tensors | TOOLS[tool])
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: its weights are quantised by .*{tool.split(',')[0]}"):
        load(path, layouts.TRANSFORMER)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint16, torch.uint64, torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["transformer", "text_encoder", "autoencoder"])
def test_whole_numbers_are_no_weights(tmp_path, kind, dtype):
    tensors = {name: t.to(dtype) if t.ndim > 1 else t for name, t in NATIVE[kind].items()}
    words = rf"x\.safetensors: its weights are whole numbers \({str(dtype)[6:]}\) without the scales that they need"
    with pytest.raises(CheckpointError, match=words):
        load(save(tmp_path / "x.safetensors", tensors), layouts.PARTS[kind])


@pytest.mark.parametrize("dtype", ["complex64", "float8_e8m0fnu"])
def test_weights_that_would_lose_phase_or_sign_are_refused(tmp_path, dtype):
    name = f"{LINEAR}.weight"
    tensors = NATIVE["transformer"] | {name: NATIVE["transformer"][name].to(getattr(torch, dtype))}
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: its weights are {dtype}, which no SANA's are"):
        load(save(tmp_path / "x.safetensors", tensors), layouts.TRANSFORMER)


@pytest.mark.parametrize("wrapped", [True, False])
def test_one_tensor_twice_is_read_only_where_both_are_the_same(tmp_path, wrapped):
    """Under a wrapper's name in one file, or in two shards, of which the second used to win without a word."""
    name, good = f"{LINEAR}.weight", NATIVE["transformer"]

    def stored(folder: Path, second: torch.Tensor) -> Source:
        folder.mkdir()
        if wrapped:
            return Source(save(folder / "x.safetensors", good | {f"module.{name}": second}))
        save(folder / "model-00001-of-00002.safetensors", good)
        save(folder / "model-00002-of-00002.safetensors", {name: second})
        return Source(folder)

    same = stored(tmp_path / "same", good[name].clone())
    assert torch.equal(same.read(same.path).tensors[name], good[name])
    other = stored(tmp_path / "other", -good[name])
    with pytest.raises(CheckpointError, match=rf"other.*: it holds {name} twice, with different numbers"):
        other.read(other.path)


def test_our_own_int8_files_stay_readable(tmp_path, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", presets.Preset("tiny", "Tiny_diffusers", SPRINT, 64))
    tensors = quantise.quantised(NATIVE["transformer"], "transformer", "int8")
    assert load(save(tmp_path / "x.safetensors", tensors), layouts.TRANSFORMER).is_quantised


@pytest.mark.parametrize(
    "kind, words",
    [
        ("StableDiffusionXLPipeline", "a StableDiffusionXLPipeline of diffusers, another model"),
        ("SanaVideoPipeline", "SANA-Video, which makes videos"),
        ("FluxPipeline", "a FluxPipeline of diffusers, another model"),
    ],
)
def test_pipelines_of_other_models(tmp_path, kind, words):
    folder = standin.make(tmp_path / "pipeline")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    for part in ("transformer", "autoencoder"):
        with pytest.raises(CheckpointError, match=words) as error:
            load(folder, layouts.PARTS[part])
        assert str(error.value).startswith(str(folder)) and "download it" not in str(error.value)
    assert load(folder, layouts.TEXT_ENCODER).config == standin.TEXT  # Gemma serves other pipelines, too
    Path(folder / "text_encoder").rename(folder / "clip")
    with pytest.raises(CheckpointError, match=words):
        load(folder, layouts.TEXT_ENCODER)


def test_video_and_families_are_named_without_their_tensors(tmp_path):
    video = NATIVE["transformer"] | {"transformer_blocks.0.ff.conv_temp.weight": torch.zeros(1)}
    sdxl = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 2)}
    for tensors, words in ((video, "a SANA-Video model"), (sdxl, "a Stable Diffusion or SDXL model")):
        with pytest.raises(
            CheckpointError, match=f"this is {words}, not a SANA transformer; choose another file, "
        ) as error:
            load(save(tmp_path / "x.safetensors", tensors), layouts.TRANSFORMER)
        assert "first tensors" not in str(error.value)
