"""Names and texts of any bytes: the server answers in a sentence, paints on, and keeps the user's folders to itself."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import standin
import torch
from api_prompts import graph, refused, with_model
from PIL import Image
from safetensors.torch import save_file

from launcher.prompt import ComfyError

ROOT = Path(__file__).resolve().parents[2]
NOT_UTF8 = r"empty_\xff.safetensors: its name, or a folder's above it, is not UTF-8; rename it"
FOREIGN = {
    "bytes": (b"empty_\xff.safetensors", NOT_UTF8),
    "newline": (b"empty\nError: all is lost.safetensors", r"empty\nError: all is lost.safetensors: the file is empty"),
    "escape": (b"empty_\x1b[2J.safetensors", r"empty_\x1b[2J.safetensors: the file is empty"),
    "direction": ("empty_\u202eexe.safetensors".encode(), r"empty_\u202eexe.safetensors: the file is empty"),
    "astral": ("empty_\U0001f600\u4e2d.safetensors".encode(), "empty_\U0001f600\u4e2d.safetensors: the file is empty"),
}
SURROGATES = ("\ud83d", "\udcff", "\udcf0\udc9f")


def folder(server, kind: str) -> bytes:
    path = server.base / "models" / kind
    path.mkdir(parents=True, exist_ok=True)
    return os.fsencode(path)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_whose_name_is_not_plain_text(server, kind):
    name, sentence = FOREIGN[kind]
    path = os.path.join(folder(server, "diffusion_models"), name)
    Path(os.fsdecode(path)).write_bytes(b"")
    try:
        message = refused(server, with_model(server, os.fsdecode(name)))
    finally:
        os.unlink(path)
    assert f"(SanaSprintModelLoader): ValueError: {sentence}" in message
    assert f"!!! Exception during processing !!! {sentence}" in server.log_text()
    assert len(message.splitlines()) == 1


def test_a_folder_whose_name_is_not_utf8(server):
    path = os.path.join(folder(server, "diffusers"), b"pipeline_\xe9")
    shutil.copytree(os.fsencode(standin.make(server.base / "models" / "diffusers" / standin.NAME)), path)
    try:
        message = refused(server, graph(loader={"model": os.fsdecode(b"pipeline_\xe9")}))
    finally:
        shutil.rmtree(path)
    assert r"ValueError: pipeline_\xe9/transformer/diffusion_pytorch_model.safetensors: its name" in message


@pytest.mark.parametrize("name", [b"lora_\xff.safetensors", b"lora\n\x07.safetensors"])
def test_a_lora_whose_name_is_not_plain_text(server, name):
    path = Path(os.fsdecode(os.path.join(folder(server, "loras"), name)))
    path.write_bytes(b"")
    prompt = graph(sampler={"model": ["lora", 0]})
    inputs = {"model": ["loader", 0], "lora_name": path.name, "strength_model": 1.0, "strength_clip": 1.0}
    prompt["lora"] = {"class_type": "SanaSprintLoraLoader", "inputs": inputs}
    try:
        message = refused(server, prompt)
    finally:
        path.unlink()
    shown = repr(os.fsencode(path.name))[2:-1]
    assert f"(SanaSprintLoraLoader): ValueError: {shown}: " in message


@pytest.mark.parametrize("text", SURROGATES)
def test_names_of_no_file_are_refused_and_the_server_goes_on(server, text):
    assert "Value not in list" in refused(server, graph(loader={"model": f"x{text}.safetensors"}))


def hostile(kind: str, path: Path) -> None:
    """A file that is no SANA, with text that no log should repeat as it is."""
    matrix = torch.zeros(2, 2)
    if kind == "tensor names":
        torch.save({"\udcff\ud83d\n\x1b[2Jlayer": matrix, "x" * 10_000_000: matrix}, path)
    elif kind == "metadata":
        save_file({"a": matrix}, path, {"sana_sprint": "\n\x1b[2J" + "x" * 10_000_000})
    else:
        weights = {"patch_embed.proj.weight\udcff": matrix, "blocks.0.attn2.to_k.weight\n": matrix}
        torch.save({"state_dict": weights}, path)


@pytest.mark.parametrize("kind", ["tensor names", "metadata", "almost"])
def test_a_file_full_of_foreign_text(server, kind):
    path = Path(os.fsdecode(folder(server, "diffusion_models"))) / f"hostile.{'sft' if kind == 'metadata' else 'pth'}"
    hostile(kind, path)
    try:
        message = refused(server, with_model(server, path.name))
    finally:
        path.unlink()
    assert f"ValueError: {path.name}: " in message and len(message) < 4000
    assert "\x1b[2J" not in server.log.read_text(encoding="utf-8", errors="strict")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("text", SURROGATES)
def test_prompts_with_half_characters_paint(server, text):
    prompt = graph()
    inputs = {"clip": ["loader", 1], "text": f"a red {text} circle", "instruction": "custom"}
    inputs |= {"prompt_format": "authors", "instruction.custom_instruction": f"Paint {text}: "}
    prompt["text"] = {"class_type": "SanaSprintTextEncode", "inputs": inputs}
    saved = server.images(server.run(prompt, timeout=120))[0]
    stored = json.loads(Image.open(io.BytesIO(server.view(saved))).info["prompt"])
    assert stored["text"]["inputs"]["text"] == f"a red {text} circle"


def test_one_command_paints_into_any_folder_for_any_prompt(comfyui_path, tmp_path):
    """With a terminal that shows ASCII alone."""
    out = os.path.join(os.fsencode(tmp_path), b"folder_\xff", "caf\xe9.png".encode())
    (tmp_path / "host").mkdir()
    environment = os.environ | {"COMFYUI_PATH": str(comfyui_path), "SPRINT_PYTHON": sys.executable}
    environment |= {"SPRINT_HOST": str(tmp_path / "host"), "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, str(ROOT / "run.py"), b"a red \xff circle", "--steps", "1", "--out", out]
    ended = subprocess.run(list(map(os.fsencode, words)), env=environment, capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr.decode()
    name, report = ended.stdout.decode("ascii").splitlines()
    assert name.endswith(r"folder_\udcff/caf\xe9.png") and os.fsencode(json.loads(report)["image"]) == out
    assert Image.open(os.fsdecode(out)).format == "PNG"


# --- what stays at home ------------------------------------------------------------------------------
# What every test of this server has saved and logged is searched when it ends: see tests/conftest.py.


def test_an_image_holds_fingerprints_but_no_folder(server):
    """Not even in the hidden text of the graph that is stored in it: images are published."""
    images = server.images(server.run(graph(sampler={"seed": 77}), timeout=120))
    stored = json.loads(Image.open(io.BytesIO(server.view(images[0]))).info["prompt"])
    assert re.fullmatch("[0-9a-f]{32}", stored["loader"]["is_changed"][0][0])
    assert str(server.base) not in json.dumps(stored)


def test_an_error_says_what_to_do_and_nothing_of_the_program(server):
    """Its class is Python's own, and no line of it names a file of code by its place on this machine."""
    path = Path(os.fsdecode(folder(server, "diffusion_models"))) / "empty.safetensors"
    path.write_bytes(b"")
    prompt_id = server.queue(with_model(server, path.name))
    with pytest.raises(ComfyError):
        server.wait(prompt_id, timeout=120)
    path.unlink()
    messages = server.json(f"/history/{prompt_id}")[prompt_id]["status"]["messages"]
    error = next(data for kind, data in messages if kind == "execution_error")
    assert error["exception_type"] == "ValueError"
    assert error["exception_message"].strip() == "empty.safetensors: the file is empty; download it again"
    assert str(server.base) not in json.dumps(error)
    assert re.search(r'File "sana-sprint/nodes/adapters/screen.py"', error["traceback"][-1])
