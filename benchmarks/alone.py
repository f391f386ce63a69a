"""Loading and peak memory, which only a process of its own can tell: weights in files, then an image of them.

    python -m benchmarks.alone ours|theirs FOLDER SIZE_PX DTYPE

The folder has what `write` put there. The text encoder is released before the image is decoded, on both sides.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import Taken, resident_mib
from benchmarks.networks import SHORT, Ours, Words, prompt_of
from benchmarks.theirs import instruction, sana_sprint
from sprint_core import convert
from sprint_core.devices import DTYPES
from sprint_core.pipeline import Pipeline
from sprint_core.text.encoder import TextEncoder
from sprint_core.text.formats import text_preset
from sprint_core.text.loading import find_tokenizer
from sprint_core.text.tokenizers import tokenizer_state
from sprint_core.weights import checkpoint, layouts, presets

ROOT = Path(__file__).resolve().parents[1]


def write(ours: Ours, folder: Path) -> None:
    """The networks as a diffusers pipeline's folders, which both sides read."""
    networks = {
        "transformer": ours.transformer,
        "autoencoder": ours.autoencoder,
        "text_encoder": ours.text_encoder.gemma,
    }
    parts = [
        checkpoint.Weights(layouts.PARTS[kind], net.config, net.state_dict(), folder) for kind, net in networks.items()
    ]
    bundled = find_tokenizer(checkpoint.load(presets.BUNDLED, layouts.TEXT_ENCODER))
    parts[-1].extras = tokenizer_state(bundled)  # as every encoder has one; nobody uses it
    for out in convert.outputs(parts, "diffusers", {}):
        (folder / out.name).parent.mkdir(parents=True, exist_ok=True)
        out.write(folder / out.name)


def measure(ours: Ours, against: bool, runs: int) -> dict[str, dict[str, Taken]]:
    """Both sides in turn, each time in a new process. The files are in the page cache, after a first round."""
    if ours.device.type != "cpu" or ours.preset is None:
        raise ValueError("--parts load measures full-size models on the CPU; choose --model 0.6B --device cpu")
    sides = ["ours", "theirs"] if against else ["ours"]
    taken = {part: {side: Taken() for side in sides} for part in ("load", "alone")}
    dtype = next(name for name, dtype in DTYPES.items() if dtype == ours.dtype)
    with tempfile.TemporaryDirectory(prefix="sana_sprint_bench.") as folder:
        write(ours, Path(folder))
        for name in ("transformer", "autoencoder", "text_encoder", "pipeline"):
            ours.__dict__.pop(name, None)  # room for the others
        gc.collect()
        for counted in tqdm([False] + [True] * runs, desc="processes", leave=False):
            for side in sides:
                command = [sys.executable, "-m", __spec__.name, side, folder, str(ours.size_px), dtype]
                output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
                if counted:
                    result = json.loads(output.splitlines()[-1])
                    taken["load"][side].seconds.append(result["load_sec"])
                    taken["alone"][side].seconds.append(result["picture_sec"])
                    taken["alone"][side].peak_mib.append(result["peak_mib"])
    return taken


# --- in the process -----------------------------------------------------------------------------------


def load_ours(folder: Path, dtype: torch.dtype) -> Callable[[int], Tensor]:
    kinds = ("transformer", "autoencoder", "text_encoder")
    parts = {kind: checkpoint.load(folder, layouts.PARTS[kind]) for kind in kinds}
    networks = {kind: checkpoint.build(part, dtype=dtype) for kind, part in parts.items()}
    gemma = networks.pop("text_encoder")
    encoder = TextEncoder(gemma, Words(gemma.config.vocab), text_preset("diffusers"))
    pipeline = Pipeline(networks["transformer"], networks["autoencoder"], encoder)
    del parts, networks, gemma, encoder  # so that the pipeline alone decides what lives

    def make_image(size_px: int) -> Tensor:
        caption = pipeline.encode_text([prompt_of(SHORT, 0)])
        pipeline.text_encoder = None
        gc.collect()
        return pipeline.generate(caption, seeds=[0], size=(size_px, size_px), steps=1)

    return make_image


def load_theirs(folder: Path, dtype: torch.dtype) -> Callable[[int], Tensor]:
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Gemma2Model

    pipeline = sana_sprint(
        transformer=SanaTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype),
        vae=AutoencoderDC.from_pretrained(folder / "vae", torch_dtype=dtype),
        text_encoder=Gemma2Model.from_pretrained(folder / "text_encoder", dtype=dtype),
    )

    def make_image(size_px: int) -> Tensor:
        rows, mask = pipeline.encode_prompt(prompt_of(SHORT, 0), complex_human_instruction=instruction())
        pipeline.text_encoder = None
        gc.collect()
        options = {"height": size_px, "width": size_px, "use_resolution_binning": False, "output_type": "pt"}
        return pipeline(
            prompt_embeds=rows,
            prompt_attention_mask=mask,
            num_inference_steps=1,
            intermediate_timesteps=None,
            **options,
        ).images

    return make_image


@torch.inference_mode()
def main(side: str, folder: str, size_px: str, dtype: str) -> None:
    if side == "theirs":
        import diffusers  # noqa: F401  (importing is no loading)
        import transformers  # noqa: F401
    started = time.perf_counter()
    make_image = (load_ours if side == "ours" else load_theirs)(Path(folder), DTYPES[dtype])
    loaded = time.perf_counter()
    make_image(int(size_px))
    result = {
        "load_sec": loaded - started,
        "picture_sec": time.perf_counter() - loaded,
        "peak_mib": resident_mib("VmHWM"),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
