"""What 8 bits save and cost: bytes held, peak memory, error and time of the 0.6B and 1.6B transformers in ComfyUI.

    python run.py python tools/quantised_size.py [--models sprint-0.6B,sprint-1.6B] [--file fp32|bf16]

Not a test: needs 16 GB of memory (8 with --file bf16), 8 GB of disk, Linux and minutes. Weights are seeded and random:
one file of each model, loaded in each dtype by *Load SANA Model*'s own code in a ComfyUI on the CPU, each time in a
process of its own. Held: what ComfyUI counts for the model. Peak: the most that the process grew while loading, mapped
pages of the file included. Error: of one call at 512x512 against the first dtype's, root mean square over root mean
square; all of them compute in fp32. Seconds: of that call. The last line is one JSON document.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests" / "host"), str(ROOT / "tests")]

import standin  # noqa: E402
from conftest import start_comfyui  # noqa: E402

from launcher import setup  # noqa: E402
from sprint_core.models.transformer import SanaTransformer  # noqa: E402
from sprint_core.weights import checkpoint, layouts, presets  # noqa: E402
from sprint_core.weights.part import shapes_of  # noqa: E402

MODELS, DTYPES = "sprint-0.6B,sprint-1.6B", ("fp32", "bf16", "fp8_e4m3fn", "int8")
CELLS, TOKENS = 16, 40  # a side of the latent; of the caption
MIB = 2**20


def write_transformer(name: str, path: Path, kind: torch.dtype) -> None:
    preset = presets.PRESETS[name]
    shapes = shapes_of(SanaTransformer(preset.transformer, device="meta").state_dict())
    tensors = {}
    for seed, (key, shape) in enumerate(shapes.items()):  # each by itself, so that no more than one is in fp32
        tensors |= {key: standin.random_tensors({key: shape}, seed)[key].to(kind)}
    checkpoint.save(path, [checkpoint.Weights(layouts.TRANSFORMER, preset.transformer, tensors, path)], {})


def memory_mib(field: str) -> float:
    """VmRSS: resident now; VmHWM: the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(pack: SimpleNamespace, file: Path, dtype: str) -> tuple[dict[str, float], list]:
    """Held and peak MiB and seconds of a call, and the call's output."""
    import comfy.model_management as mm

    forget_peak()
    before = memory_mib("VmRSS")
    patcher = pack.model.load_model(file, pack.options.parse(dtype=dtype, eight_bits=True))
    mm.load_models_gpu([patcher])
    peak, held = memory_mib("VmHWM") - before, mm.module_size(patcher.model) / MIB
    generator, config = torch.Generator().manual_seed(1), patcher.model.diffusion_model.config
    x = torch.randn(1, 32, CELLS, CELLS, generator=generator)
    text = torch.randn(1, TOKENS, config.caption_width, generator=generator)
    started = time.perf_counter()
    out = patcher.model.apply_model(x, torch.tensor([0.9]), c_crossattn=text, guidance=4.5)
    return {"held_mib": held, "peak_mib": peak, "seconds": time.perf_counter() - started}, out.float().tolist()


def alone(run, *args):
    """run(*args) in a copy of this process, whose memory goes with it."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        with torch.inference_mode():
            sender.send(run(*args))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    result = receiver.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--file", choices=["fp32", "bf16"], default="fp32", help="the type of the weights in the file")
    args = parser.parse_args()
    rows, dtypes = [], DTYPES[DTYPES.index(args.file) :]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        started = start_comfyui(setup.set_up().comfyui, base)
        pack = SimpleNamespace(
            **{name: sys.modules[f"{started.name}.nodes.adapters.{name}"] for name in ("model", "options")}
        )
        for name in args.models.split(","):
            file, exact = base / f"{name}.safetensors", None
            alone(write_transformer, name, file, pack.options.DTYPES[args.file])
            for dtype in dtypes:
                measured, out = alone(measure, pack, file, dtype)
                out = torch.tensor(out)
                exact = out if exact is None else exact
                error = float((out - exact).square().mean().sqrt() / exact.square().mean().sqrt())
                rounded = {key: float(f"{value:.4g}") for key, value in (measured | {"error": error}).items()}
                rows.append({"model": name, "file": args.file, "dtype": dtype} | rounded)
                print(rows[-1], flush=True)
            file.unlink()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
