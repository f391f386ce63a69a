"""ComfyUI's nodes on a device apart, in its memory modes: the CPU's images, and few copies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# At most, where networks fit: copies there and back, and scalars that are read, of a later run with a prompt.
MOST = {
    "hed": (2, 1, 2),
    "text": (5, 4, 5),
    "image": (8, 5, 5),
    "control": (11, 5, 9),
    "stock": (5, 5, 13),
    "written": (4, 4, 8),
}
SCRIPT = Path(__file__).parent / "in_comfyui.py"
STREAMING = ("novram", "mixed", "streamed", "tight")  # modes in which weights travel for every image
MODES = ("normal", "low", "dynamic", *STREAMING)


@pytest.fixture(scope="module")
def made(comfyui_path, library) -> dict[str, dict[str, dict]]:
    """Each image of in_comfyui.py, and what it took, by the mode: on the CPU, and on the second device."""
    command = [sys.executable, str(SCRIPT), str(comfyui_path), "cpu", *MODES]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", MODES)
def test_images_are_the_cpus(made, mode):
    for name, one in made[mode].items():
        image, expected = torch.tensor(one.pop("image")), torch.tensor(made["cpu"][name]["image"])
        torch.testing.assert_close(image, expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        if mode not in STREAMING and name in MOST:
            taken = tuple(one[kind] for kind in ("to_device", "to_host", "scalars"))
            assert all(count <= most for count, most in zip(taken, MOST[name], strict=True)), (name, taken)


def test_the_hooked_lora_changes_the_image(made):
    hooked, text = (torch.tensor(made["cpu"][name]["image"]) for name in ("hooked", "text"))
    assert (hooked - text).abs().max() > 0.01


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "tight"])  # which takes as many copies as it likes
def test_a_prompt_stays_encoded_after_a_hook(made, mode):
    assert made[mode]["unhooked"]["kernels"] == made[mode]["text"]["kernels"]


@pytest.mark.parametrize("name", ["text", "image", "stock", "written", "unhooked"])
def test_streamed_layers_come_straight_from_their_file(made, name):
    """Where memory is tight again and again, without a copy from the host more than where there is room."""
    assert made["tight"][name]["read"] > 0
    assert made["tight"][name]["to_device"] == made["streamed"][name]["to_device"]
    assert made["dynamic"][name]["read"] == 0  # networks so small are loaded as a whole
