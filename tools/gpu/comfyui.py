"""ComfyUI's nodes, one image in one step: lines of JSON with milliseconds. host.py writes the models and runs this.

python -m tools.gpu.comfyui MACHINE BASE SIZE_PX RUNS      # MACHINE as in tests/machines.py
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks import SHORT, prompt_of
from tools.gpu.host import CONTROL, PIPELINE
from tools.gpu.timing import ROOT, finite, milliseconds

sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "device")]


def ways(node: Callable[..., Any], size_px: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """With the prompt encoded before, with a new prompt, and with a ControlNet and a new image for it."""
    dtype = {"dtype": "bf16"} if torch.cuda.is_available() else {}
    model, clip, vae = node("SanaSprintLoader", model=PIPELINE, **dtype)
    net = node("SanaSprintControlNetLoader", control_net=CONTROL)
    size = {"size": "custom", "size.width": size_px, "size.height": size_px}
    count = iter(range(1, 10**6))

    def encoded(seed: int):
        return node("CLIPTextEncode", clip=clip, text=prompt_of(SHORT, seed))

    def paint(positive) -> Tensor:
        latent = node("SanaSprintEmptyLatent", **size)
        inputs = {"model": model, "positive": positive, "latent_image": latent, "seed": next(count), "steps": 1}
        return node("VAEDecode", vae=vae, samples=node("SanaSprintSampler", **inputs))

    def controlled() -> Tensor:
        image = torch.zeros(1, size_px, size_px, 3)
        image[:, next(count) % size_px] = 1.0
        both = node("SanaSprintControlNetApply", positive=kept, control_net=net, image=image, vae=vae)
        return paint(both[0])

    kept = encoded(0)
    yield "prompt_kept", lambda: paint(kept)
    yield "new_prompt", lambda: paint(encoded(next(count)))
    yield "controlnet", controlled


@torch.inference_mode()
def measure(machine: str, base: Path, size_px: int, runs: int) -> Iterator[dict]:
    import in_comfyui

    started = time.perf_counter()
    host = in_comfyui.conftest()
    host.start_comfyui(Path(os.environ["SPRINT_COMFYUI"]), base, machine)
    yield {"start_sec": round(time.perf_counter() - started, 1)}
    import comfy.model_management as mm

    started = time.perf_counter()
    for name, paint in ways(host.node_runner(), size_px):
        image = paint()
        yield {f"first_{name}_sec": round(time.perf_counter() - started, 1)}
        yield {name: milliseconds(paint, mm.get_torch_device(), runs, 2) | {"finite": finite(image)}}
        started = time.perf_counter()


def main(machine: str, base: str, size_px: str, runs: str) -> int:
    lines = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            for row in measure(machine, Path(base), int(size_px), int(runs)):
                lines.write(json.dumps(row) + "\n")
                lines.flush()
        except Exception:
            lines.write(json.dumps({"error": traceback.format_exc()[-3000:]}) + "\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
