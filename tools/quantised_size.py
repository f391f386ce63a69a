"""What 8 bits save and cost: size, peak memory and error of the 0.6B and 1.6B transformers in a real ComfyUI.

    python run.py python tools/quantised_size.py

Not a test: needs 10 GB of memory, 12 GB of disk and minutes. Weights are seeded and random. Each file is loaded and
sampled by a ComfyUI of its own, one step at 512x512; its error is that of the latent against the bf16 file, root
mean square over root mean square. The last line is one JSON document.
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

import standin  # noqa: E402

from launcher import setup  # noqa: E402
from launcher.client import Server  # noqa: E402
from sprint_core import convert  # noqa: E402
from sprint_core.models.gemma import Gemma, GemmaConfig  # noqa: E402
from sprint_core.models.transformer import SanaTransformer  # noqa: E402
from sprint_core.text.tokenizers import HFTokenizer, tokenizer_state  # noqa: E402
from sprint_core.weights import checkpoint, layouts, presets, tensorfile  # noqa: E402

MODELS, FORMS = ("sprint-0.6B", "sprint-1.6B"), ("bf16", "fp8_e4m3fn", "int8")
WIDE = GemmaConfig(vocab=320, width=2304, depth=1, heads=2, kv_heads=1, head_dim=32, ffn=64, query_scale=32)
MIB = 2**20


def encoder(path: Path) -> None:
    """A shallow text encoder as wide as Gemma-2-2B, which the transformers read."""
    tokenizer = HFTokenizer(json.dumps(standin.byte_tokenizer()).encode())
    tensors = standin.random_model(Gemma(WIDE, device="meta"))
    part = checkpoint.Weights(layouts.TEXT_ENCODER, WIDE, tensors, path, extras=tokenizer_state(tokenizer))
    checkpoint.save(path, [part], {})


def transformer(name: str, path: Path) -> None:
    preset = presets.PRESETS[name]
    tensors = standin.random_model(SanaTransformer(preset.transformer, device="meta"))
    tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    checkpoint.save(path, [checkpoint.Weights(layouts.TRANSFORMER, preset.transformer, tensors, path)], {})


def prompt(file: str) -> dict:
    def node(kind: str, **inputs) -> dict:
        return {"class_type": kind, "inputs": inputs}

    return {
        "1": node("SanaSprintModelLoader", model=file, dtype="auto", time_scale="auto"),
        "2": node("SanaSprintTextEncoderLoader", text_encoder="wide.safetensors", dtype="auto"),
        "3": node("CLIPTextEncode", clip=["2", 0], text="a cat"),
        "4": node("SanaSprintEmptyLatent", batch_size=1, **{"size": "custom", "size.width": 512, "size.height": 512}),
        "5": node(
            "SanaSprintSampler", model=["1", 0], positive=["3", 0], latent_image=["4", 0], seed=0, guidance=4.5,
            steps=1, schedule="auto", denoise=1.0,
        ),
        "6": node("SaveLatent", samples=["5", 0], filename_prefix="size"),
    }  # fmt: skip


def measure(file: str, host: setup.Host, base: Path) -> tuple[float, torch.Tensor]:
    """Growth of the server's peak resident memory in MiB, mapped files included, and the latent."""
    arguments = tuple(setup.device_arguments(host.python))
    with Server(host.python, host.comfyui, base, base / "comfyui.log", arguments) as server:
        process = psutil.Process(server.process and server.process.pid)
        before = peak = process.memory_info().rss
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.01):
                peak = max(peak, process.memory_info().rss)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            server.run(prompt(file), timeout=1800)
        finally:
            done.set()
            thread.join()
    saved = max((base / "output").glob("size*.latent"), key=lambda path: path.stat().st_mtime)
    link = saved.with_suffix(".safetensors")
    saved.rename(link)
    latent = tensorfile.read(link).tensors["latent_tensor"].float().clone()
    link.unlink()
    return (peak - before) / MIB, latent


def main() -> None:
    host, rows = setup.set_up(), []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        setup.prepare_base(base, host.comfyui, ROOT)
        models = base / "models" / "diffusion_models"
        encoder(base / "models" / "text_encoders" / "wide.safetensors")
        for name in MODELS:
            source, exact = models / f"{name}-bf16.safetensors", None
            transformer(name, source)
            for form in FORMS:
                path = models / f"{name}-{form}.safetensors"
                if form != "bf16" and convert.main([str(source), str(path), "--quantize", form]):
                    raise SystemExit(1)
                started = time.perf_counter()
                peak, latent = measure(path.name, host, base)
                exact = latent if exact is None else exact
                error = float((latent - exact).square().mean().sqrt() / exact.square().mean().sqrt())
                row = {
                    "model": name,
                    "form": form,
                    "file_mib": round(path.stat().st_size / MIB),
                    "peak_mib": round(peak),
                }
                rows.append(row | {"error": float(f"{error:.3g}"), "seconds": round(time.perf_counter() - started)})
                print(rows[-1], flush=True)
                if form != "bf16":
                    path.unlink()
            source.unlink()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
