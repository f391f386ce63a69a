"""Small prompts, and what a running server says of those that fail."""

import time

import pytest

from launcher.prompt import ComfyError
from sprint_core.weights import presets

BUNDLED = presets.BUNDLED_NAME


def custom_size(width: int, height: int) -> dict:
    """Inputs of Empty SANA Latent, in pixels."""
    return {"size": "custom", "size.width": width, "size.height": height}


def graph(**changes: dict) -> dict:
    """The smallest text-to-image prompt, with inputs changed per node: loader={'dtype': 'bf16'}."""
    nodes = {
        "loader": ("SanaSprintLoader", {"model": BUNDLED, "dtype": "auto"}),
        "text": ("CLIPTextEncode", {"clip": ["loader", 1], "text": "a red circle"}),
        "latent": ("SanaSprintEmptyLatent", custom_size(64, 64) | {"batch_size": 1}),
        "sampler": (
            "SanaSprintSampler",
            {
                "model": ["loader", 0],
                "positive": ["text", 0],
                "latent_image": ["latent", 0],
                "seed": 0,
                "guidance": 4.5,
                "steps": 1,
                "schedule": "auto",
                "denoise": 1.0,
            },
        ),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["loader", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "errors"}),
    }
    prompt = {name: {"class_type": kind, "inputs": dict(inputs)} for name, (kind, inputs) in nodes.items()}
    for name, change in changes.items():
        prompt[name]["inputs"].update(change)
    return prompt


def refused(server, prompt: dict) -> str:
    """The error that a prompt ends with; afterwards a good prompt must work."""
    with pytest.raises(ComfyError) as caught:
        server.run(prompt, timeout=120)
    assert server.images(server.run(graph(sampler={"seed": time.monotonic_ns()})))
    return str(caught.value)


def with_model(server, name: str) -> dict:
    """The good graph with its MODEL from a file in diffusion_models."""
    prompt = graph(sampler={"model": ["model", 0]})
    prompt["model"] = {
        "class_type": "SanaSprintModelLoader",
        "inputs": {"model": name, "dtype": "auto", "time_scale": "auto"},
    }
    return prompt
