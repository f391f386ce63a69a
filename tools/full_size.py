"""The published sizes against diffusers, on seeded random weights, in fp32 on the CPU.

    python run.py python tools/full_size.py

Too large for the test suite: needs 12 GB of memory, 4 GB of disk and some minutes. Compares the 0.6B transformer
and ControlNet at 1024x1024 and the DC-AE at 512x512 with diffusers, and measures the memory that loading a
1.6B bf16 file (3.2 GB) takes. The last line is one JSON document.
"""

import gc
import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

import standin  # noqa: E402

from sprint_core.models.autoencoder import Autoencoder  # noqa: E402
from sprint_core.models.autoencoder_config import SANA  # noqa: E402
from sprint_core.models.controlnet import SanaControlNet  # noqa: E402
from sprint_core.models.transformer import SanaTransformer  # noqa: E402
from sprint_core.weights import keymaps, layouts, presets, tensorfile  # noqa: E402
from sprint_core.weights.layouts.autoencoder import config_to_diffusers  # noqa: E402

LOAD = """
import sys, threading, time, psutil
sys.path.append(sys.argv[1])
import torch
from sprint_core.weights import checkpoint, layouts
me = psutil.Process()
before = me.memory_info().rss
peak, running = before, True
def watch():
    global peak
    while running:
        peak = max(peak, me.memory_info().rss)
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
started = time.perf_counter()
model = checkpoint.build(checkpoint.load(sys.argv[2], layouts.TRANSFORMER))
seconds = time.perf_counter() - started
total = sum(parameter.sum() for parameter in model.parameters())  # touch every page
running = False
thread.join()
print((peak - before) / float(sys.argv[3]), seconds)
"""


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def load(model: torch.nn.Module, tensors: dict) -> torch.nn.Module:
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def compare_transformer() -> float:
    """The 0.6B Sprint at 1024x1024 and s = 0.7827, with 300 caption tokens."""
    from diffusers import SanaTransformer2DModel

    config = presets.PRESETS["sprint-0.6B"].transformer
    tensors = standin.random_model(SanaTransformer(config, device="meta"))
    generator = torch.Generator().manual_seed(1)
    x_s, caption = (torch.randn(shape, generator=generator) for shape in ((1, 32, 32, 32), (1, 300, 2304)))
    s, guidance = torch.tensor([0.7827]), torch.tensor([4.5])
    ours = load(SanaTransformer(config, device="meta"), tensors)(x_s, s, caption, guidance)
    described = {k: v for k, v in layouts.transformer.config_to_diffusers(config).items() if k != "_class_name"}
    with torch.device("meta"):
        theirs = SanaTransformer2DModel(**described)
    load(theirs, layouts.TRANSFORMER.to_diffusers(tensors, config))
    mask = torch.ones(1, 300)
    return relative_error(ours, theirs(x_s, caption, s, guidance * 0.1, mask, return_dict=False)[0])


def compare_control() -> float:
    """The 0.6B ControlNet of seven blocks at 1024x1024: the largest error of its residuals, in diffusers' wiring."""
    from diffusers import SanaControlNetModel

    trunk = presets.PRESETS["sana-0.6B"].transformer
    described = {k: v for k, v in layouts.transformer.config_to_diffusers(trunk).items() if k != "_class_name"}
    parameters = inspect.signature(SanaControlNetModel.__init__).parameters
    described = {k: v for k, v in described.items() if k in parameters} | {"num_layers": 7}
    with torch.device("meta"):
        theirs = SanaControlNetModel(**described)
    tensors = standin.random_model(theirs)
    load(theirs, tensors)
    config = layouts.controlnet.config_from_diffusers(described)
    ours = load(SanaControlNet(config, device="meta"), keymaps.to_native(tensors, layouts.transformer.DIFFUSERS))
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 32, 32, 32), (1, 300, 2304), (1, 32, 32, 32))
    x_s, caption, hint = (torch.randn(shape, generator=generator) for shape in shapes)
    s = torch.tensor([0.7827])
    samples = theirs(x_s, caption, 1000 * s, hint, return_dict=False)[0]
    _, *residuals = ours(x_s, s, caption, hint)
    return max(relative_error(a, b) for a, b in zip(residuals, samples, strict=True))


def compare_autoencoder() -> tuple[float, float]:
    """The sana DC-AE at 512x512: encode, decode."""
    from diffusers import AutoencoderDC

    tensors = standin.random_model(Autoencoder(SANA, device="meta"))
    ours = load(Autoencoder(SANA, device="meta"), tensors)
    described = {k: v for k, v in config_to_diffusers(SANA).items() if k != "_class_name"}
    with torch.device("meta"):
        theirs = AutoencoderDC(**described)
    load(theirs, tensors)
    image = torch.rand((1, 3, 512, 512), generator=torch.Generator().manual_seed(1)) * 2 - 1
    latent = ours.encode(image)
    encode = relative_error(latent, theirs.encode(image).latent)
    return encode, relative_error(ours.decode(latent), theirs.decode(latent).sample)


def measure_loading(folder: Path) -> tuple[float, float]:
    """Growth of the peak resident memory over the file's size, and seconds, for the 1.6B in bf16."""
    config = presets.PRESETS["sprint-1.6B"].transformer
    tensors = {k: v.bfloat16() for k, v in standin.random_model(SanaTransformer(config, device="meta")).items()}
    path = folder / "sprint-1.6B.safetensors"
    tensorfile.write(path, layouts.TRANSFORMER.to_diffusers(tensors, config), {})
    size = path.stat().st_size
    del tensors
    command = [sys.executable, "-c", LOAD, str(ROOT), str(path), str(size)]
    ratio, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(ratio), float(seconds)


@torch.inference_mode()
def main() -> None:
    result = {"transformer_0.6B_1024px": compare_transformer()}
    gc.collect()
    result["controlnet_0.6B_1024px"] = compare_control()
    gc.collect()
    result["autoencoder_encode_512px"], result["autoencoder_decode_512px"] = compare_autoencoder()
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        result["load_1.6B_memory_over_file"], result["load_1.6B_seconds"] = measure_loading(Path(folder))
    sys.stdout.write(json.dumps({name: float(f"{value:.3g}") for name, value in result.items()}) + "\n")


if __name__ == "__main__":
    main()
