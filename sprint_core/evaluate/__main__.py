"""Does a model paint what prompts say, and how close do its images come to true ones?

    python -m sprint_core.evaluate [--model demo|PATH] [--steps 1,2,4] [--prompts N] [--seed N] [--grid FILE]
        the bundled model, or another of emoji or of plain shapes: judged row by row, with the Frechet distance
        of emoji: [--sprites FILE] true scenes from sprites.zip, not from thumbnails; [--teacher FILE]; [--record]
    python -m sprint_core.evaluate --control FILE|demo [--prompts N] [--grid FILE]
        a ControlNet: do images keep to drawings of scenes, and to the prompt, with control and without
    python -m sprint_core.evaluate --model PATH --geneval evaluation_metadata.jsonl --out DIR
    python -m sprint_core.evaluate --model PATH --mjhq meta_data.json --out DIR
        a real model: images in DIR/steps1, ... as the official scorers read them; only missing ones are made

The last line is one JSON document.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .. import cli, disk, trigflow
from ..devices import DTYPES, usable_device
from ..emoji import art, templates
from ..emoji.concepts import learnt
from ..images.files import check_image_name, write
from ..models.controlnet import SanaControlNet
from ..pipeline import Pipeline
from ..weights import checkpoint, layouts, presets
from . import control as evaluate_control
from . import emoji, emoji_control, emoji_run, frechet, sheet
from .official import geneval_jobs, mjhq_jobs, paint_files
from .scoring import TEACHER_STEPS, Painter, balanced_prompts, grid, score, student, summary, table, teacher


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
    add("--grid", type=Path, metavar="FILE", help="write a grid of images")
    add("--inception", help="TorchScript InceptionV3 for the Frechet distance, instead of the bundled network")
    add("--sprites", type=Path, metavar="FILE", help="sprites.zip, for true scenes of emoji")
    add("--record", action="store_true", help="keep what an evaluation without --sprites and --teacher needs of them")
    add("--geneval", type=Path, metavar="FILE", help="GenEval's evaluation_metadata.jsonl")
    add("--mjhq", type=Path, metavar="FILE", help="MJHQ-30K's meta_data.json")
    add("--out", type=Path, help="folder for the images of --geneval and --mjhq")
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
    if args.record and not (args.sprites and args.teacher):
        raise ValueError("--record needs --sprites and --teacher, of which it keeps what others lack")
    if (args.geneval or args.mjhq) and args.out is None:
        raise ValueError("--geneval and --mjhq need --out, the folder for the images")
    if args.grid:
        check_image_name(args.grid, "--grid")
    if args.out:
        disk.check_writable(args.out)
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
    if emoji.is_known_to(pipeline):
        drawings = art.load(args.sprites) if args.sprites else None
        among = learnt(checkpoint.load(path, layouts.TRANSFORMER).settings)
        if args.control is not None:
            return _run_emoji_control(args, pipeline, steps, drawings, among)
        return _run_emoji(args, pipeline, steps, drawings, among)
    if args.sprites:
        raise ValueError(f"--sprites is of no use with {path}, which does not know emoji by their names")
    if args.control is not None:
        return _run_control(args, pipeline, steps)
    extractor = frechet.inception(args.inception, device) if args.inception else frechet.bundled()
    prompts = balanced_prompts(args.prompts, args.seed)
    true = frechet.extract(extractor, sheet.true_images(prompts))
    frechet.check_count(*true.shape)  # before anything is painted
    painters = _painters(args, pipeline, steps)
    scores = {label: score(paint, prompts, args.seed, label) for label, paint in painters.items()}
    result = summary(scores, prompts, extractor, true)
    tqdm.write(table(result))
    if args.grid:
        write(grid(scores, prompts), args.grid)
    return result


def _painters(args: argparse.Namespace, pipeline: Pipeline, steps: Sequence[int]) -> dict[str, Painter]:
    """By step count, and the teacher."""
    painters = {str(n): student(pipeline, n, args.guidance) for n in steps}
    if args.teacher:
        painters[emoji_run.TEACHER] = teacher(args.teacher, pipeline, TEACHER_STEPS, args.guidance)
    return painters


def _run_emoji(
    args: argparse.Namespace, pipeline: Pipeline, steps: Sequence[int], drawings: art.Art | None, among: Sequence[int]
) -> dict:
    extractor = frechet.inception(args.inception, args.device) if args.inception else None
    painters = _painters(args, pipeline, steps)
    evaluation = emoji_run.Evaluation(pipeline, painters, args.prompts, args.seed, extractor, drawings, among=among)
    result, scores, prompts = evaluation.run(args.record)
    tqdm.write(emoji.table(result))
    if args.grid:
        write(emoji.grid(scores, prompts), args.grid)
    return result


def _control_of(args: argparse.Namespace, pipeline: Pipeline) -> SanaControlNet:
    first = next(pipeline.transformer.parameters())
    path = presets.BUNDLED_CONTROL if args.control == "demo" else Path(args.control)
    return checkpoint.build(checkpoint.load(path, layouts.CONTROLNET), dtype=first.dtype, device=first.device)


def _run_emoji_control(
    args: argparse.Namespace, pipeline: Pipeline, steps: Sequence[int], drawings: art.Art | None, among: Sequence[int]
) -> dict:
    drawn = emoji_control.draw(args.prompts, args.seed, drawings or templates.load().art(), among)
    painted = emoji_control.paint(pipeline, _control_of(args, pipeline), drawn, steps, args.seed, args.guidance)
    result = emoji_control.summary(painted, drawn) | {"art": "sprites" if drawings else "thumbnails"}
    tqdm.write(emoji_control.table(result))
    if args.grid:
        write(emoji_control.grid(painted, drawn), args.grid)
    return result


def _run_control(args: argparse.Namespace, pipeline: Pipeline, steps: Sequence[int]) -> dict:
    net = _control_of(args, pipeline)
    prompts = balanced_prompts(args.prompts, args.seed, free=True)
    painted = evaluate_control.paint(pipeline, net, prompts, steps, args.seed, args.guidance)
    result = evaluate_control.summary(painted, prompts)
    tqdm.write(evaluate_control.table(result))
    if args.grid:
        write(evaluate_control.grid(painted, prompts), args.grid)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    return cli.run(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
