"""Seconds from a queued prompt to its image in a real ComfyUI on this machine.

    python run.py python benchmarks/comfyui.py               # the bundled model in 1, 2 and 4 steps
    python run.py python benchmarks/comfyui.py --model 0.6B  # what ComfyUI adds to the core, in one step at 1024x1024

Not a test. Each run has its own prompt and seed, so that nothing of it is cached; loading is not counted. The 0.6B has
random weights in bf16 and needs 8 GB of disk, 12 GB of memory; there ComfyUI's nodes and the core (comfyui_node.py)
take turns on the same loaded networks. The last line is one JSON document: medians and spread.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from launcher import setup  # noqa: E402
from launcher.client import Client, Server  # noqa: E402
from launcher.prompt import edit  # noqa: E402
from sprint_core.emoji import captions  # noqa: E402
from sprint_core.emoji.concepts import common  # noqa: E402

STEPS = (1, 2, 4)
RUNS = 10
WARM_UP = 2
WORKFLOW = ROOT / "workflows" / "SANA-Sprint 01 Text to Image.json"
MODEL_FOLDER = "full"
CLOSE = 1e-4  # the means of both sides' images


def seconds(server: Client, prompt: dict) -> tuple[float, float, dict]:
    """Of one run, as its user waits for it and as ComfyUI's own clock has it; and its outputs."""
    started = time.perf_counter()
    history = server.run(prompt, timeout=3600)
    waited = time.perf_counter() - started
    times = {event: data["timestamp"] for event, data in history["status"]["messages"]}
    return waited, (times["execution_success"] - times["execution_start"]) / 1000, history["outputs"]


def bundled(runs: int) -> dict:
    texts = iter(captions.prompts(len(STEPS) * (runs + WARM_UP), among=common()))
    result = {}
    with setup.comfyui_server() as server:
        for steps in STEPS:
            taken = []
            for i in range(runs + WARM_UP):
                prompt = server.prompt_of(WORKFLOW)
                edit(prompt, next(texts).text, steps=steps, seed=i)
                taken.append(seconds(server, prompt)[:2])
            waited, executed = zip(*taken[WARM_UP:], strict=True)
            result[str(steps)] = {
                "median_sec": round(statistics.median(waited), 3),
                "executed_median_sec": round(statistics.median(executed), 3),
                "min_sec": round(min(waited), 3),
                "max_sec": round(max(waited), 3),
            }
            print(f"{steps} steps: {result[str(steps)]}")
    return {"text_to_image_sec": result, "runs": runs}


def prompts(text: str, seed: int, size_px: int) -> dict[str, dict]:
    """The same image by the ordinary nodes and by the core."""

    def node(kind: str, **inputs) -> dict:
        return {"class_type": kind, "inputs": inputs}

    size = {"size": "custom", "size.width": size_px, "size.height": size_px}
    load = {"1": node("SanaSprintLoader", model=MODEL_FOLDER, dtype="bf16")}
    networks = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    ordinary = {
        "2": node("CLIPTextEncode", clip=["1", 1], text=text),
        "3": node("SanaSprintEmptyLatent", batch_size=1, **size),
        "4": node(
            "SanaSprintSampler", model=["1", 0], positive=["2", 0], latent_image=["3", 0], seed=seed, guidance=4.5,
            steps=1, schedule="auto", denoise=1.0,
        ),
        "5": node("VAEDecode", vae=["1", 2], samples=["4", 0]),
        "6": node("BenchDrop", image=["5", 0]),
    }  # fmt: skip
    core = {
        "5": node("BenchCoreTextToImage", **networks, prompt=text, seed=seed, size_px=size_px),
        "6": node("BenchDrop", image=["5", 0]),
    }
    return {"comfyui": load | ordinary, "core": load | core}


def full(model: str, size_px: int, runs: int) -> dict:
    import torch

    from benchmarks import alone, networks

    host, taken = setup.set_up(), {"comfyui": [], "core": []}
    with tempfile.TemporaryDirectory(prefix="sana_sprint_bench.") as folder:
        base = Path(folder)
        setup.prepare_base(base, host.comfyui, ROOT)
        nodes = base / "custom_nodes" / "comfyui_node.py"
        shutil.copyfile(ROOT / "benchmarks" / "comfyui_node.py", nodes)
        made = networks.Ours(model, size_px, torch.device("cpu"), torch.bfloat16)
        pipeline = base / "models" / "diffusers" / MODEL_FOLDER
        alone.write(made, pipeline)
        del made
        arguments = tuple(setup.device_arguments(host.python))
        with Server(host.python, host.comfyui, base, setup.HOME / "bench.log", arguments) as server:
            for i in range(runs + 1):
                means = {}
                for side, prompt in list(prompts(f"a cat, take {i}", i, size_px).items())[:: -1 if i % 2 else 1]:
                    _, executed, outputs = seconds(server, prompt)
                    means[side] = float(outputs["6"]["text"][0])
                    if i:  # the first loads
                        taken[side].append(executed)
                print({side: round(values[-1], 2) for side, values in taken.items() if values}, means, flush=True)
                if abs(means["comfyui"] - means["core"]) > CLOSE:
                    raise SystemExit(f"the two sides painted different images: {means}")
    overhead = statistics.median(a / b for a, b in zip(taken["comfyui"], taken["core"], strict=True)) - 1
    sides = {
        side: {
            "median_sec": round(statistics.median(values), 3),
            "min_sec": round(min(values), 3),
            "max_sec": round(max(values), 3),
        }
        for side, values in taken.items()
    }
    return {"model": model, "size_px": size_px, "runs": runs, **sides, "overhead": round(overhead, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["demo", "0.6B", "1.6B"], default="demo")
    parser.add_argument("--size", type=int, help="pixels of a side (default: 1024; the bundled model has its own)")
    parser.add_argument("--runs", type=int, default=RUNS)
    args = parser.parse_args()
    if args.model == "demo" and args.size:
        parser.error("--size is for --model 0.6B or 1.6B")
    print(json.dumps(bundled(args.runs) if args.model == "demo" else full(args.model, args.size or 1024, args.runs)))


if __name__ == "__main__":
    main()
