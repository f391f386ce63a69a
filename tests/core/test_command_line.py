"""The command line python -m sprint_core: its images, its last line of JSON, and one line for what is wrong."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import standin
import torch
from oracles import randn
from PIL import Image

from sprint_core import __main__, pipeline
from sprint_core.models.nag import NAG
from sprint_core.pipeline import Pipeline
from sprint_core.weights import checkpoint, keymaps, layouts

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "A red Circle to the left of a blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return standin.make(tmp_path_factory.mktemp("models") / "sprint")


def command(capsys, *words) -> dict:
    """Run it; the last line of its output, read as JSON."""
    capsys.readouterr()
    assert __main__.main([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_command_line(folder, tmp_path, capsys):
    out = tmp_path / "new" / "image.png"
    options = ("--model", folder, "--size", "96x64", "--out", out)
    result = command(capsys, PROMPT, *options, "--seed", 7, "--batch", 2, "--steps", 4)
    assert result["images"] == [str(out), str(tmp_path / "new" / "image-1.png")]
    assert result | {"steps": 4, "seeds": [7, 8], "size": [96, 64], "device": "cpu"} == result
    assert set(result["seconds"]) == {"load", "generate"}
    want = Pipeline.load(folder).generate([PROMPT] * 2, seeds=[7, 8], size=(96, 64), steps=4)
    for image, path in zip(want, result["images"], strict=True):
        assert np.array_equal(pixels(path), image.mul(255).round().byte().numpy())
    files = [Path(path).read_bytes() for path in result["images"]]
    command(capsys, PROMPT, *options, "--seed", 7, "--batch", 2, "--steps", 4)
    assert [Path(path).read_bytes() for path in result["images"]] == files  # same seed, same bytes


def test_command_line_names_what_is_not_read(tmp_path, capsys, caplog):
    """The bundled model reads 32 tokens; the notice comes once for a batch."""
    prompt = "a red apple to the left of a large blue car, " * 4 + "and a green leaf"
    options = ("--out", tmp_path / "a.png", "--size", "64x64", "--steps", 1, "--batch", 2)
    with caplog.at_level(logging.WARNING):
        command(capsys, prompt, *options)
    (notice,) = [r.getMessage() for r in caplog.records if "not read" in r.getMessage()]
    assert "32 tokens" in notice and notice.endswith(' green leaf"')
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        command(capsys, "a slice of pizza", *options)
    assert not caplog.records


def test_command_line_without_out_overwrites_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ("a circle", "--steps", "1", "--size", "64x64")
    images = [command(capsys, *size, *words)["images"] for words in ([], ["--batch", "2"], [])]
    names = ["sana_sprint.png"], ["sana_sprint_2.png", "sana_sprint_2-1.png"], ["sana_sprint_3.png"]
    assert images == [[str(tmp_path / "output" / name) for name in each] for each in names]


def test_a_model_without_its_other_parts_says_how_to_name_them(folder, tmp_path, capsys, caplog):
    checkpoint.save(tmp_path / "t.safetensors", [checkpoint.load(folder, layouts.TRANSFORMER)], {})
    assert __main__.main(["a cat", "--model", str(tmp_path / "t.safetensors")]) == 1
    assert "not a DC-AE" in caplog.text and "or name that part's file as autoencoder (--vae)" in caplog.text
    vae = ["--vae", str(folder)]
    assert __main__.main(["a cat", "--model", str(tmp_path / "t.safetensors"), *vae]) == 1
    assert "or name that part's file as text_encoder (--text-encoder)" in caplog.records[-1].getMessage()
    (tmp_path / "two").mkdir()
    for part in ("transformer", "vae"):
        (tmp_path / "two" / part).symlink_to(folder / part)
    assert __main__.main(["a cat", "--model", str(tmp_path / "two")]) == 1
    message = caplog.records[-1].getMessage()
    assert "it holds transformer and vae, not a Gemma-2 text encoder" in message and "(--text-encoder)" in message
    assert __main__.main(["a cat", "--model", str(folder), "--vae", str(tmp_path / "t.safetensors")]) == 1
    assert "or name" not in caplog.records[-1].getMessage()


def test_command_line_schedules_and_dtype(folder, tmp_path, capsys):
    options = ("--model", folder, "--size", "64x64", "--out", tmp_path / "x.png")
    for words, steps in ((("--schedule", "app", "--steps", 5), 5), (("--schedule", "1.5708,1.3,0.6"), 3)):
        assert command(capsys, PROMPT, *options, *words)["steps"] == steps
    assert command(capsys, PROMPT, *options, "--dtype", "bf16", "--guidance", 2)["steps"] == 2


def test_command_line_image_to_image(folder, tmp_path, capsys, caplog):
    source = tmp_path / "source.png"
    Image.fromarray((randn(70, 100, 4).sigmoid() * 255).byte().numpy(), "RGBA").save(source)
    options = ("--model", folder, "--image", source, "--out", tmp_path / "x.png")
    result = command(capsys, PROMPT, *options, "--strength", 0.5, "--batch", 2)
    assert result["size"] == [96, 64] and "size 100x70 rounded to 96x64" in caplog.text
    seen = Image.open(source)
    seen = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    resized = seen.resize((96, 64), Image.Resampling.LANCZOS)
    image = torch.from_numpy(np.array(resized)).float()[None] / 255
    want = Pipeline.load(folder).generate([PROMPT] * 2, seeds=[0, 1], image=image, strength=0.5)
    for painted, path in zip(want, result["images"], strict=True):
        assert np.array_equal(pixels(path), painted.mul(255).round().byte().numpy())
    assert command(capsys, PROMPT, *options, "--size", "64x64")["size"] == [64, 64]


def test_command_line_with_a_negative_prompt(folder, tmp_path, capsys):
    options = ("--model", folder, "--size", "96x64", "--out", tmp_path / "a.png", "--negative", "a blue square")
    result = command(capsys, PROMPT, *options, "--negative-scale", 5)
    more = {"seeds": [0], "size": (96, 64), "negative": "a blue square"}
    want = Pipeline.load(folder).generate([PROMPT], nag=NAG(scale=5.0), **more)
    assert np.array_equal(pixels(result["images"][0]), want[0].mul(255).round().byte().numpy())
    usual = command(capsys, PROMPT, *options)
    want = Pipeline.load(folder).generate([PROMPT], **more)
    assert np.array_equal(pixels(usual["images"][0]), want[0].mul(255).round().byte().numpy())


def test_command_line_without_a_model_uses_the_bundled_one(tmp_path, capsys):
    result = command(capsys, "two cats on a blue background", "--out", tmp_path / "x.png")
    assert result["size"] == [256, 256]
    want = Pipeline.load(pipeline.presets.BUNDLED).generate(["two cats on a blue background"], seeds=[0])
    assert np.array_equal(pixels(result["images"][0]), want[0].mul(255).round().byte().numpy())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--schedule", "paper", "--steps", "5"), "1 to 4 steps, not 5"),
        (("--steps", "41"), "1 to 40 steps, not 41"),
        (("--schedule", "app", "--steps", "41"), "1 to 40 steps, not 41"),
        (("--schedule", "2.0"), "angle 2 lies outside"),
        (("--schedule", "0.5,1.0"), "angles must fall strictly"),
        (("--schedule", "fast"), "a custom schedule is a list of angles"),
        (("--size", "wide"), "--size wide: write it as 1024x1024"),
        (("--size", "64"), "--size 64: write it as 1024x1024"),
        (("--size", "16x64"), "size 16x64: sides must lie in 64 to 8192 pixels"),
        (("--size", "64x9000"), "sides must lie in 64 to 8192 pixels"),
        (("--batch", "0"), "--batch is 0; it must be at least 1"),
        (("--guidance", "0"), "guidance is 0"),
        (("--guidance", "nan"), "guidance is nan"),
        (("--image", "nowhere.png"), "nowhere.png"),
        (("--model", "nowhere"), "nowhere: no such file"),
        (("--model", "sprint-0.6B"), "hf download Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers"),
        (("--vae", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (("--out", "x.txt"), "--out x.txt: name it .png, .jpg or .webp"),
    ],
)
def test_command_line_errors(folder, tmp_path, capsys, caplog, monkeypatch, words, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert __main__.main([PROMPT, "--model", str(folder), *words]) == 1
    record = caplog.records[-1]
    assert record.levelno == logging.ERROR and message in record.getMessage()
    assert "{" not in capsys.readouterr().out and not list(tmp_path.glob("*.png"))


def test_command_line_refuses_bad_images_and_strengths(folder, tmp_path, caplog):
    source, text_file = tmp_path / "source.png", tmp_path / "text.png"
    Image.new("RGB", (64, 64)).save(source)
    text_file.write_text("no image")
    options = [PROMPT, "--model", str(folder), "--out", str(tmp_path / "x.png")]
    for strength in ("0", "1.5", "nan"):
        assert __main__.main([*options, "--image", str(source), "--strength", strength]) == 1
        assert f"strength (denoise) is {strength}" in caplog.records[-1].getMessage()
    assert __main__.main([*options, "--image", str(text_file)]) == 1
    assert "text.png" in caplog.records[-1].getMessage()
    with pytest.raises(SystemExit) as stop:
        __main__.main([*options, "--seed", "one"])
    assert stop.value.code == 2  # argparse's own, with its usage line


def test_nvlabs_file_and_folder_paint_the_same_image(folder, tmp_path, capsys, monkeypatch):
    tiny = pipeline.presets.Preset("tiny", "", standin.TRANSFORMER, 64)
    monkeypatch.setitem(pipeline.presets.PRESETS, "tiny", tiny)
    native = checkpoint.load(folder, layouts.TRANSFORMER).tensors
    torch.save({"state_dict": keymaps.from_native(native, layouts.transformer.NVLABS)}, tmp_path / "Sana_Sprint.pth")
    options = ("--vae", folder, "--text-encoder", folder, "--size", "96x64", "--out", tmp_path / "x.png")
    images = []
    for model in (folder, tmp_path / "Sana_Sprint.pth"):
        command(capsys, PROMPT, "--model", model, *options)
        images.append(np.asarray(Image.open(tmp_path / "x.png"), np.int16))
    assert np.abs(images[0] - images[1]).max() <= 1  # of 255: kernels round by where a file's tensors are aligned


def process(*words: object) -> subprocess.CompletedProcess:
    """The command line as people call it."""
    command_line = [sys.executable, "-m", "sprint_core", *map(str, words)]
    return subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--device", "meta"), "--device meta: it holds no numbers"),
        (("--out", "folder.png"), "--out folder.png: this is a folder; choose another name"),
        (("--image", "folder.png"), "--image folder.png: this is a folder; name an image in it"),
        (("--strength", "0.6"), "--strength: of no use without --image IMAGE"),
        (("--negative-scale", "5"), "--negative-scale: of no use without --negative TEXT"),
        (("--negative", "red", "--negative-scale", "0.5"), "scale is 0.5; it must lie in 1 to 50"),
    ],
)
def test_what_can_never_work_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, caplog, options, says):
    """A traceback after the last step, and an error after the image was made."""
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    with caplog.at_level(logging.INFO):
        assert __main__.main(["a cat", "--size", "64x64", *options]) == 1
    assert says in caplog.text and "parameters" not in caplog.text


def test_a_process_shows_its_help():
    shown = process("--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: python -m sprint_core")
    options = ["model", "vae", "text-encoder", "steps", "schedule", "guidance", "seed", "batch", "size", "image"]
    options += ["strength", "control", "control-model", "control-strength", "control-range", "edges", "hed"]
    options += ["dtype", "device", "out", "negative", "negative-scale"]
    assert all(f"  --{option}" in shown.stdout for option in options)


def test_a_process_paints_and_ends_with_json(folder, tmp_path):
    out = tmp_path / "cat.png"
    options = ("--model", folder, "--size", "64x64", "--steps", 1, "--device", "cpu", "--out", out)
    finished = process("a cat", *options)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["images"] == [str(out)] and result["size"] == [64, 64] and result["steps"] == 1
    assert pixels(out).shape == (64, 64, 3)
    refused = process("a cat", *options, "--guidance", 0)
    assert refused.returncode == 1 and not refused.stdout
    assert "error: guidance is 0" in refused.stderr.splitlines()[-1]
