"""Does a model paint what prompts say, and how close do its pictures come to true ones?

    python -m sprint_core.evaluate [--model demo|PATH] [--steps 1,2,4] [--prompts N] [--seed N] [--grid FILE]
        the bundled model, or another of the same world: judged per category, with the Frechet distance
    python -m sprint_core.evaluate --control FILE|demo [--prompts N] [--grid FILE]
        a ControlNet: do pictures keep to the edges of scenes, and colours to the prompt, with control and without
    python -m sprint_core.evaluate --model PATH --geneval evaluation_metadata.jsonl --out DIR
    python -m sprint_core.evaluate --model PATH --mjhq meta_data.json --out DIR
        a real model: pictures in DIR/steps1, ... as the official scorers read them; only missing ones are made

The last line is one JSON document.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .. import cli as command
from .. import sampler, trigflow
from ..config import usable_device
from ..images.files import check_picture_name
from ..models.autoencoder_config import DOWNSCALE
from ..models.transformer import LATENT_CHANNELS
from ..pipeline import DTYPES, Pipeline
from ..shapes import captions, examples, judge
from ..weights import checkpoint, presets, tensorfile
from ..weights.checkpoint import CheckpointError
from . import control as evaluate_control
from . import frechet as features

BATCH = 25
TEACHER_STEPS = 20
DIFFERENT = 200  # prompts of a category, of which there are a few hundred
SEED_STRIDE = 10**6
GRID_ROWS = 12  # prompts in the picture grid

Painter = Callable[[Sequence[str], Sequence[int]], Tensor]  # prompts, seeds -> images [b, h, w, 3] in [0, 1]


def student(pipeline: Pipeline, steps: int, guidance: float) -> Painter:
    """The model itself at a step count."""
    return lambda texts, seeds: pipeline.generate(texts, seeds=seeds, steps=steps, guidance=guidance).cpu()


def teacher(path: str | Path, pipeline: Pipeline, steps: int, cfg: float) -> Painter:
    """The multi-step model at `path` with the pipeline's encoder and DC-AE: guided Euler. Raises CheckpointError."""
    network = next(pipeline.transformer.parameters())
    weights = checkpoint.load(path, "transformer")
    if weights.config.guidance_embed:
        raise CheckpointError(f"{path}: a SANA-Sprint, not its teacher; --teacher takes the multi-step model")
    model = checkpoint.build(weights, dtype=network.dtype, device=network.device)
    sigmas = torch.tensor(trigflow.shifted_sigmas(steps, weights.settings["flow_shift"]), device=network.device)
    size = pipeline.size_px // DOWNSCALE

    @torch.inference_mode()
    def paint(texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        conditions = pipeline.encode_text(texts), pipeline.encode_text([""] * len(texts))

        def denoise(x_s: Tensor, s: Tensor) -> Tensor:
            x, times = x_s.to(network.dtype), s.expand(len(x_s))
            v = sampler.guided(*(model(x, times, c, mask=mask) for c, mask in conditions), cfg)
            return trigflow.flow_predict_x0(v.float(), x_s, s)

        noise = sampler.initial_noise(seeds, (LATENT_CHANNELS, size, size)).to(network.device)
        return pipeline.decode(sampler.euler(denoise, noise, sigmas)).cpu()

    return paint


@dataclass(frozen=True)
class Score:
    """How one way to paint did: images [n, h, w, 3] in [0, 1], and for each whether it shows its prompt."""

    images: Tensor
    right: tuple[bool, ...]
    seconds: float

    @property
    def share(self) -> float:
        return sum(self.right) / len(self.right)


def balanced_prompts(n: int, seed: int, free: bool = False) -> list[examples.Prompt]:
    """n held-out prompts, in turn of each category; beyond some thousand the same texts return, of other scenes.

    free: of scenes whose things stand anywhere.
    """
    found: list[examples.Prompt] = []
    for again in itertools.count():
        each = min(DIFFERENT, -(-(n - len(found)) // len(captions.CATEGORIES)))
        drawn = {"seed": seed + SEED_STRIDE * again, "free": free}
        rows = zip(*(examples.prompts(name, each, **drawn) for name in captions.CATEGORIES))
        found += [prompt for row in rows for prompt in row]
        if len(found) >= n:
            return found[:n]


def score(paint: Painter, prompts: Sequence[examples.Prompt], seed: int, label: str) -> Score:
    """Paint and judge; image i has seed `seed` + i."""
    images, started = [], time.perf_counter()
    for start in tqdm(range(0, len(prompts), BATCH), desc=label, unit=f"x{BATCH} images", leave=False):
        texts = [prompt.text for prompt in prompts[start : start + BATCH]]
        images.append(paint(texts, [seed + start + i for i in range(len(texts))]))
    painted, seconds = torch.cat(images), time.perf_counter() - started
    right = tuple(judge.judge(image.numpy(), p.requirement) for image, p in zip(painted, prompts))
    return Score(painted, right, seconds)


def summary(
    scores: dict[str, Score], prompts: Sequence[examples.Prompt], extractor: features.Extractor, true: Tensor
) -> dict:
    """The JSON document: shares right, per category, and Frechet distances to true pictures' features [n, d]."""
    categories = {name: {} for name in captions.CATEGORIES}
    for label, one in scores.items():
        for name, row in categories.items():
            chosen = [right for right, prompt in zip(one.right, prompts) if prompt.category == name]
            row[label] = round(sum(chosen) / len(chosen), 4)
    distances = {
        label: features.frechet(features.extract(extractor, one.images), true) for label, one in scores.items()
    }
    return {
        "judge": {label: round(one.share, 4) for label, one in scores.items()},
        "categories": categories,
        "frechet": {label: round(distance, 4) for label, distance in distances.items()},
        "prompts": len(prompts),
    }


def table(result: dict) -> str:
    """The summary for people."""
    labels = list(result["judge"])
    rows = [("", *labels), *((name, *row.values()) for name, row in result["categories"].items())]
    rows += [("all", *result["judge"].values()), ("Frechet", *result["frechet"].values())]
    return "\n".join(f"{row[0]:14}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows)


def grid(scores: dict[str, Score], prompts: Sequence[examples.Prompt]) -> Image.Image:
    """One row per prompt: the true picture and each way's; a red frame where the judge disagrees."""
    shown = prompts[:GRID_ROWS]
    columns = {"true": (evaluate_control.true_images(shown), (True,) * len(shown))}
    for label, one in scores.items():
        title = f"{label} step{'s' * (label != '1')}" if label.isdigit() else label
        columns[title] = (one.images, one.right)
    return evaluate_control.sheet(columns, [prompt.text for prompt in shown])


# --- pictures for the official scorers ----------------------------------------------------------------


def geneval_jobs(path: Path, out: Path, samples: int = 4) -> Iterator[tuple[str, int, Path]]:
    """(prompt, seed, file) for GenEval: 00000/samples/0000.png and so on, beside each prompt's metadata.jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for i, (number, line) in enumerate(rows):
        text = _prompt_of(line, f"{path}, line {number}")
        folder = out / f"{i:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(line, encoding="utf-8")
        for j in range(samples):
            yield text, j, folder / "samples" / f"{j:04d}.png"


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f"{where}: no prompt, as GenEval's evaluation_metadata.jsonl has on every line")
    return row["prompt"]


def mjhq_jobs(path: Path, out: Path) -> Iterator[tuple[str, int, Path]]:
    """(prompt, seed, file) for MJHQ-30K: category/id.png, the folders whose FID is taken."""
    for i, (name, entry) in enumerate(tensorfile.read_json(path).items()):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("prompt", "category")):
            raise ValueError(f"{path}: {name} has no prompt and category, as MJHQ-30K's meta_data.json has")
        folder = out / entry["category"]
        folder.mkdir(parents=True, exist_ok=True)
        yield entry["prompt"], i, folder / f"{name}.png"


def paint_files(paint: Painter, jobs: Sequence[tuple[str, int, Path]], seed: int) -> int:
    """Paint what is missing, one picture at a time; returns how many."""
    missing = [job for job in jobs if not job[2].is_file()]
    for text, offset, path in tqdm(missing, unit="images"):
        pixels = paint([text], [seed + offset])[0].mul(255).round().byte().numpy()
        with tensorfile.replacing(path) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")
    return len(missing)


# --- command line -----------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sprint_core.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="demo (the bundled one), a file, a folder or a preset")
    add("--vae", help="DC-AE, when --model holds none")
    add("--text-encoder", help="Gemma-2, when --model holds none")
    add("--teacher", help="its teacher's file, to judge with it")
    add("--steps", default="1,2,4")
    add(
        "--prompts",
        type=int,
        default=600,
        help="how many held-out prompts; the Frechet distance by the bundled network needs 320",
    )
    add("--seed", type=int, default=0)
    add("--guidance", type=float, default=presets.GUIDANCE)
    add("--control", metavar="FILE", help="a ControlNet of the model; demo: the bundled one")
    add("--grid", type=Path, metavar="FILE", help="write a grid of pictures")
    add("--inception", help="TorchScript InceptionV3 for the Frechet distance, instead of the bundled network")
    add("--geneval", type=Path, metavar="FILE", help="GenEval's evaluation_metadata.jsonl")
    add("--mjhq", type=Path, metavar="FILE", help="MJHQ-30K's meta_data.json")
    add("--out", type=Path, help="folder for the pictures of --geneval and --mjhq")
    add("--dtype", choices=DTYPES, help="default: the file's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def _checked(args: argparse.Namespace) -> list[int]:
    """The step counts, after all that can be known to fail before an hour of painting. Raises ValueError."""
    try:
        steps = [int(n) for n in args.steps.split(",")]
    except ValueError:
        raise ValueError(f"--steps {args.steps}: write it as 1,2,4") from None
    for n in steps:
        trigflow.schedule("paper", n)
    if args.prompts < 1:
        raise ValueError(f"--prompts is {args.prompts}; it must be at least 1")
    if args.control is not None:
        unread = [
            name for name in ("teacher", "inception", "geneval", "mjhq", "out") if getattr(args, name) is not None
        ]
        if unread:
            raise ValueError(f"--{unread[0]} is of no use with --control")
    if (args.geneval or args.mjhq) and args.out is None:
        raise ValueError("--geneval and --mjhq need --out, the folder for the pictures")
    if args.grid:
        check_picture_name(args.grid, "--grid")
        args.grid.parent.mkdir(parents=True, exist_ok=True)
    return steps


def run(args: argparse.Namespace) -> dict:
    """One command line, done: the JSON document that it ends with."""
    steps, device = _checked(args), usable_device(args.device)
    path = presets.BUNDLED if args.model == "demo" else presets.find_model(args.model)
    dtype = DTYPES[args.dtype] if args.dtype else None
    pipeline = Pipeline.load(path, autoencoder=args.vae, text_encoder=args.text_encoder, dtype=dtype, device=device)
    if args.geneval or args.mjhq:
        folders = {str(n): args.out / f"steps{n}" for n in steps}
        painted = {}
        for label, folder in folders.items():
            jobs = geneval_jobs(args.geneval, folder) if args.geneval else mjhq_jobs(args.mjhq, folder)
            painted[label] = paint_files(student(pipeline, int(label), args.guidance), list(jobs), args.seed)
        return {"painted": painted, "folders": {label: str(folder) for label, folder in folders.items()}}
    if args.control is not None:
        return _run_control(args, pipeline, steps)
    extractor = features.inception(args.inception, device) if args.inception else features.bundled()
    prompts = balanced_prompts(args.prompts, args.seed)
    true = features.extract(extractor, evaluate_control.true_images(prompts))
    features.check_count(*true.shape)  # before anything is painted
    painters = {str(n): student(pipeline, n, args.guidance) for n in steps}
    if args.teacher:
        painters[f"teacher{TEACHER_STEPS}"] = teacher(args.teacher, pipeline, TEACHER_STEPS, args.guidance)
    scores = {label: score(paint, prompts, args.seed, label) for label, paint in painters.items()}
    result = summary(scores, prompts, extractor, true)
    tqdm.write(table(result))
    if args.grid:
        grid(scores, prompts).save(args.grid)
    return result


def _run_control(args: argparse.Namespace, pipeline: Pipeline, steps: Sequence[int]) -> dict:
    first = next(pipeline.transformer.parameters())
    path = presets.BUNDLED_CONTROL if args.control == "demo" else Path(args.control)
    net = checkpoint.build(checkpoint.load(path, "controlnet"), dtype=first.dtype, device=first.device)
    prompts = balanced_prompts(args.prompts, args.seed, free=True)
    painted = evaluate_control.paint(pipeline, net, prompts, steps, args.seed, args.guidance)
    result = evaluate_control.summary(painted, prompts)
    tqdm.write(evaluate_control.table(result))
    if args.grid:
        evaluate_control.grid(painted, prompts).save(args.grid)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    return command.run(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
