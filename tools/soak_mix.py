"""What the clients of soak.py ask for: shipped workflows at random settings, broken files, values out of range."""

import copy
import json
import os
import pickle
import random
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launcher.client import Client
from launcher.prompt import LOADER_NODE, SAMPLER_NODE, TEXT_NODES, api_prompt
from sprint_core.emoji import captions
from sprint_core.emoji.concepts import common
from sprint_core.weights import presets

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "workflows").glob("SANA-Sprint 0[1-6] *.json"))
CANVAS_NODE = "SanaSprintLiveCanvas"
SIZES_PX = ((256, 256), (256, 256), (128, 128), (192, 320), (384, 256), (64, 448), (512, 512))
BATCHES = (1, 1, 1, 2, 3)
ODD_TEXTS = (
    "",
    "(a red apple:1.4) to the left of a (blue car:0.6)",
    "ein großer roter Apfel, 一个红苹果, \U0001f34e",
    "a green apple, " * 30,
)


@dataclass(frozen=True)
class Case:
    """A prompt with a name to speak of it."""

    name: str
    prompt: dict


@dataclass(frozen=True)
class Broken(Case):
    """A prompt that needs a file which is broken; `file` is relative to ComfyUI's base directory."""

    file: str
    data: bytes

    @property
    def words(self) -> str:
        """What the error has to say: the file's name, up to where it may be written in another way."""
        return Path(self.file).name.split(".")[0]


class Mix(NamedTuple):
    """What all prompts are made of."""

    object_info: dict
    prompts: dict[str, dict]  # of the shipped workflows, by their files' stems

    @classmethod
    def of(cls, server: Client) -> "Mix":
        info = server.object_info()
        saved = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in WORKFLOWS}
        return cls(info, {name: api_prompt(ui, info) for name, ui in saved.items()})

    def vary(self, name: str, rng: random.Random) -> Case:
        return vary(name, self.prompts[name], rng)


def text(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice(ODD_TEXTS)
    return captions.write(captions.draw(rng, None, common()), rng)


def vary(workflow: str, prompt: dict, rng: random.Random) -> Case:
    """The workflow's prompt with a size, texts, seeds, steps and so on of its own."""
    prompt, words, batch = copy.deepcopy(prompt), text(rng), rng.choice(BATCHES)
    width, height = rng.choice(SIZES_PX)
    seed, guidance, steps = rng.randrange(2**48), rng.choice((3.0, 4.5, 6.0)), rng.randint(1, 4)
    changes = {
        LOADER_NODE: {"dtype": rng.choice(("auto", "auto", "auto", "bf16"))},
        "SanaSprintEmptyLatent": {"size": "custom", "size.width": width, "size.height": height, "batch_size": batch},
        SAMPLER_NODE: {"seed": seed, "guidance": guidance, "steps": steps},
        "KSampler": {"seed": seed},
        CANVAS_NODE: {"seed": seed, "guidance": guidance, "final_steps": steps},
        "SanaSprintControlNetApply": {"strength": rng.choice((0.5, 1.0))},
    }
    for node in prompt.values():
        node["inputs"].update(changes.get(node["class_type"], {}))
        if node["class_type"] in (*TEXT_NODES, CANVAS_NODE):
            node["inputs"]["text"] = words
        if node["class_type"] == SAMPLER_NODE and node["inputs"]["denoise"] < 1:
            node["inputs"]["denoise"] = rng.choice((0.4, 0.6, 0.8))
    return Case(f"{workflow}, {width}x{height}, {batch} images, {steps} steps, seed {seed}, {words!r:.60}", prompt)


def cases(mix: Mix, count: int, rng: random.Random) -> list[Case]:
    """As many of each workflow."""
    names = sorted(mix.prompts)
    return [mix.vary(names[i % len(names)], rng) for i in range(count)]


class _Code:
    def __reduce__(self) -> tuple:
        return os.getcwd, ()  # harmless, but nothing that a reader of weights may call


def _safetensors(tensors: dict[str, list[int]]) -> bytes:
    """A file of float32 zeros; `tensors`: shapes by name."""
    header, size = {}, 0
    for name, (rows, columns) in tensors.items():
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [size, size + 4 * rows * columns]}
        size += 4 * rows * columns
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def _broken_data(kind: str, rng: random.Random) -> bytes:
    if kind == "bundled_in_part":
        data = presets.BUNDLED.read_bytes()
        return data[: rng.randrange(len(data) // 2)]
    return {
        "empty": b"",
        "truncated": _safetensors({"a": [100, 10]})[:500],
        "page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3217000000\n",
        "long_header": struct.pack("<Q", 2**40) + b"{}",
        "foreign": _safetensors({"model.diffusion_model.input_blocks.0.0.weight": [4, 4]}),
        "noise": rng.randbytes(2000),
        "code": pickle.dumps({"a": _Code()}),
    }[kind]


BROKEN_KINDS = ("bundled_in_part", "empty", "truncated", "page", "pointer", "long_header", "foreign", "noise", "code")
ENDINGS = {"code": "pth", "noise": "pth"}
# The folder of the file: the node that reads it, the name of its input, and which input takes its output.
READERS = {
    "diffusion_models": ("SanaSprintModelLoader", "model", "model"),
    "text_encoders": ("SanaSprintTextEncoderLoader", "text_encoder", "clip"),
    "vae": ("SanaSprintVAELoader", "vae", "vae"),
    "loras": ("SanaSprintLoraLoader", "lora_name", "model"),
    "controlnet": ("SanaSprintControlNetLoader", "control_net", "control_net"),
    "input": ("LoadImage", "image", "pixels"),
}


def broken(mix: Mix, number: int, rng: random.Random) -> Broken:
    """A workflow in which one broken file is read in place of a good one."""
    kind, folder = rng.choice(BROKEN_KINDS), rng.choice(list(READERS))
    reader, name_input, socket = READERS[folder]
    odd = rng.choice(("", "", " \u00fc (1)", " \u00fc (1)", *["\udcff"] * (sys.platform == "linux")))  # no UTF-8
    ending = "png" if folder == "input" else ENDINGS.get(kind, "safetensors")
    file = f"soak_{number}.{kind}{odd}.{ending}"
    names = {"control_net": "SANA-Sprint 05 ControlNet Soft Edges", "pixels": "SANA-Sprint 02 Image to Image"}
    workflow = names.get(socket, "SANA-Sprint 01 Text to Image")
    prompt = mix.vary(workflow, rng).prompt
    inputs = defaults(mix.object_info[reader]) | {name_input: file}
    if folder == "loras":
        inputs["model"] = next(n["inputs"]["model"] for n in prompt.values() if n["class_type"] == SAMPLER_NODE)
    for node in prompt.values():
        if isinstance(node["inputs"].get(socket), list):
            node["inputs"][socket] = ["broken", 0]
    prompt["broken"] = {"class_type": reader, "inputs": inputs}
    place = "input" if folder == "input" else f"models/{folder}"
    return Broken(f"{reader} with {kind}", prompt, f"{place}/{file}", _broken_data(kind, rng))


def defaults(info: dict) -> dict:
    """What the widgets of a node show at first; `info` is the node's part of /object_info."""
    values = {}
    for name, (kind, *rest) in info["input"]["required"].items():
        options = rest[0] if rest else {}
        choices = kind if isinstance(kind, list) else options.get("options") or [None]
        first = choices[0]["key"] if isinstance(choices[0], dict) else choices[0]  # of a dynamic combo
        values[name] = options.get("default", first)
    return {name: value for name, value in values.items() if value is not None}


OUT_OF_RANGE = (
    (SAMPLER_NODE, {"steps": 9, "schedule": "paper"}),
    (SAMPLER_NODE, {"denoise": 0.0}),
    (SAMPLER_NODE, {"guidance": -1.0}),
    (SAMPLER_NODE, {"schedule": "custom", "schedule.angles": "1.0, 1.2"}),
    (SAMPLER_NODE, {"schedule": "custom", "schedule.angles": "cat"}),
    ("SanaSprintEmptyLatent", {"size": "custom", "size.width": 16}),
    (LOADER_NODE, {"model": "not there"}),
)


def out_of_range(mix: Mix, rng: random.Random) -> Case:
    """A workflow with a value that its node refuses."""
    kind, change = rng.choice(OUT_OF_RANGE)
    prompt = mix.vary("SANA-Sprint 01 Text to Image", rng).prompt
    for node in prompt.values():
        if node["class_type"] == kind:
            node["inputs"].update(change)
    return Case(f"{kind} with {change}", prompt)
