"""The bundled model paints what it painted before the files moved, bit for bit. Deleted once the move is done."""

import hashlib

import pytest
import torch

from sprint_core.pipeline import Control, Pipeline
from sprint_core.weights import checkpoint, layouts, presets

EXPECTED = {
    "text-1": "22a29ab04be3fe38",
    "text-2": "fdc597326c31ebd7",
    "text-4": "e78446c0e726dfd6",
    "image": "4e8535d58d3bebba",
    "control": "506930c5f9a0eb68",
}


def fingerprint(image: torch.Tensor) -> str:
    return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(presets.BUNDLED, dtype=torch.float32)


def images(pipeline) -> dict[str, torch.Tensor]:
    found = {}
    prompts, seeds = ["a red circle above a blue square", "three green triangles"], [1, 2]
    for steps in (1, 2, 4):
        found[f"text-{steps}"] = pipeline.generate(prompts, seeds=seeds, steps=steps)
    found["image"] = pipeline.generate(prompts[:1], seeds=[3], image=found["text-1"][1:], strength=0.6)
    net = checkpoint.build(checkpoint.load(presets.BUNDLED_CONTROL, layouts.CONTROLNET), dtype=torch.float32)
    hint = torch.zeros(1, 256, 256, 3)
    hint[:, 60:64, 60:200] = hint[:, 196:200, 60:200] = hint[:, 60:200, 60:64] = hint[:, 60:200, 196:200] = 1.0
    found["control"] = pipeline.generate(["a yellow square"], seeds=[4], controls=[Control(net, hint, 0.9)])
    return found


def test_bits(pipeline):
    assert {name: fingerprint(image) for name, image in images(pipeline).items()} == EXPECTED
