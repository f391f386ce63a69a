"""Train and distil: the bundled model from nothing, or a SANA-Sprint from a published SANA and your images.

    python -m sprint_core.distill --data sprites.zip --out DIR [--concepts common]
                                                        of emoji, with their names; the recipe demo
    python -m sprint_core.distill --recipe sprint-1.6B --teacher FILE --vae FILE --text-encoder FILE
                                  --data DIR --out DIR
    python -m sprint_core.distill --recipe demo-control --data sprites.zip --out DIR
                                                        a ControlNet of the bundled model
    python -m sprint_core.distill --recipe control --student FILE --vae FILE --text-encoder FILE --data DIR --out DIR
    accelerate launch -m sprint_core.distill ...        on several GPUs or machines
    python -m sprint_core.distill --recipe shapes --out DIR             a smaller model, of plain shapes
    python -m sprint_core.distill --compare --data sprites.zip --out DIR
                                                        methods of distillation from one teacher of emoji, and
                                                        by --methods all the paper's tables

The same command again continues where it stopped. The last line is one JSON document; the exit code is 75 for a
training that SIGTERM, Ctrl+C or --max-hours stopped after it had saved.
"""

import argparse
import dataclasses
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .. import cli, messages
from ..emoji.captions import ALL, PAIRS
from ..emoji.concepts import common
from ..models.gemma import GemmaConfig
from ..weights import checkpoint, layouts, presets
from . import recipes
from .engine import compiling, trackers
from .engine.processes import ProcessGroup, launched_processes
from .engine.stop import Stop, Stopped
from .methods import METHODS, WEIGHTS
from .runs import compare, control, emoji, emoji_control, encoded_size, estimate, gpus, shapes
from .runs.encoders import DataOptions, dtype_on
from .runs.published import PROMPTS, PublishedRun, Sources
from .runs.run import Run

log = messages.logger(__name__)

SCENES = "scenes"
DEFAULT, SHAPES = "demo", "shapes"  # recipes that learn from nothing
DEMO_CONTROL = "demo-control"
EMOJI_RECIPES = (DEFAULT, DEMO_CONTROL)
GOES_ON = 75  # exit code of a training that was stopped: sysexits.h's "try again later"
DATA_HELP = (
    "sprites.zip (demo...), nothing (shapes...), or images with captions: folder, .parquet, webdataset .tar; for "
    "methods that look at no image prompts: .txt, .jsonl, .csv"
)
CONCEPTS = {"all": lambda: ALL, "common": common}
FORWARD_MODE = (
    "--compile: what %s trains is differentiated in forward mode, which cannot be compiled, and stays as it is; "
    "--set %s.tangent=difference needs none"
)
NEEDED = {"teacher": "--teacher", "autoencoder": "--vae", "text_encoder": "--text-encoder"}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sprint_core.distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", help=f"one of {', '.join(recipes.RECIPES)} (default: {DEFAULT})", default=DEFAULT)
    stages = [*recipes.EMOJI, "control", "all"]
    add("--stage", choices=stages, default="all", help="one, after those that it needs; all: the model")
    add("--out", type=Path, required=True, help="folder of this run; the same again resumes it")
    add("--data", default=SCENES, help=DATA_HELP)
    add("--teacher", type=Path, help="the multi-step SANA, any layout; demo: start from this one")
    add("--student", type=Path, help="distil on from this SANA-Sprint, rather than from its teacher")
    add("--vae", "--autoencoder", type=Path, dest="autoencoder", help="its DC-AE; demo, shapes: start from this one")
    add("--text-encoder", type=Path, help="full size: Gemma-2; demo: start from this one")
    add("--time-scale", type=float, choices=(1.0, 1000.0), help="full size: where the teacher's file does not say")
    add(
        "--hed", type=Path, help="control: take edges with this ControlNetHED.pth (default: soft edges without weights)"
    )
    add("--control", type=Path, help="control recipes: train on from this ControlNet")
    add(
        "--buckets",
        action=argparse.BooleanOptionalAction,
        help="of images: crop each to the model's bin of the nearest aspect ratio (default), or all to a square",
    )
    add(
        "--text-cache",
        action=argparse.BooleanOptionalAction,
        help="encode captions once, and keep the embeddings (default); or batch by batch, for little disk",
    )
    add(
        "--resume-best",
        action="store_true",
        help="go back to the best average that the distillation has kept; --set may say otherwise than before",
    )
    add("--export", default="ema", help="of the last stage: ema (default), raw, best, or a step of --keep-every")
    add("--keep-every", type=int, default=0, metavar="N", help="keep the last stage's average every N steps")
    add(
        "--compile",
        action="store_true",
        help="compile transformers by torch.compile: faster, after some minutes",
    )
    add(
        "--shard",
        action="store_true",
        help="of several processes: each holds a part of what trains (FSDP2), rather than all of it",
    )
    add("--tracker", default="", help="draw curves by one of Accelerate's trackers, too: wandb, mlflow, ...")
    add("--max-hours", type=float, default=math.inf, help="save and stop after so long, as at SIGTERM or Ctrl+C")
    pools = f"{emoji.POOL}, of shapes {shapes.POOL}, of a ControlNet {control.POOL}, of emoji {emoji_control.POOL}"
    add("--pool", type=int, help=f"demo, shapes: training scenes (default: {pools})")
    add("--concepts", choices=CONCEPTS, help="demo: what the model learns to paint (default: all)")
    worlds = ", ".join(EMOJI_RECIPES)
    add("--pairs", type=float, help=f"{worlds}: how often a training caption names two things (default: {PAIRS})")
    add(
        "--seed",
        type=int,
        help="of draws, and of first weights from nothing; another makes another run (default: the recipe's)",
    )
    add("--set", action="append", default=[], metavar="STAGE.KEY=VALUE", dest="settings")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--compare", action="store_true", help="methods of distillation side by side, in the world of emoji")
    methods, usual = (", ".join(names) for names in (compare.CHOICES, compare.METHODS))
    add("--methods", help=f"of --compare, with commas: {methods}, or {compare.ALL} (default: {usual})")
    add("--seeds", type=int, help=f"of --compare: runs of each method (default: {compare.SEEDS})")
    add("--evaluations", type=int, help=f"of --compare: the budget of a run (default: {compare.EVALUATIONS})")
    add(
        "--gpu",
        metavar="[N x]NAME",
        help=f"of --dry-run: also the hours on so many, as 8xh100: {', '.join(gpus.TFLOPS)}",
    )
    add("--dry-run", action="store_true", help="print what each stage would take, and train nothing")
    return parser.parse_args(argv)


def _recipe(args: argparse.Namespace) -> recipes.Recipe:
    if args.recipe not in recipes.RECIPES:
        raise ValueError(f"no recipe {args.recipe}; there are {', '.join(recipes.RECIPES)}")
    if args.compare and (args.recipe != DEFAULT or args.stage != "all" or args.student):
        raise ValueError(f"--compare is of the recipe {DEFAULT}: without --stage and --student")
    if args.export not in ("ema", "raw", "best") and not args.export.isdecimal():
        raise ValueError(f"--export {args.export}: it is ema, raw, best, or a step that was kept")
    if args.keep_every < 0:
        raise ValueError(f"--keep-every {args.keep_every}: a number of steps, or 0 for never")
    Stop(args.max_hours)
    compare.methods(args.methods)
    if not args.compare and (args.methods or args.evaluations is not None or args.seeds is not None):
        raise ValueError("--methods, --seeds and --evaluations are of --compare")
    if args.seed is not None and (args.compare or args.seed < 0):
        raise ValueError(f"--seed {args.seed}: 0 or more, of one model; --compare takes --seeds")
    if args.seeds is not None and args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: at least one is needed")
    if args.evaluations is not None and args.evaluations < 1:
        raise ValueError(f"--evaluations {args.evaluations}: at least one is needed")
    if args.concepts and args.recipe != DEFAULT:
        raise ValueError(f"--concepts: of --recipe {DEFAULT}")
    if args.pairs is not None and (args.recipe not in EMOJI_RECIPES or not 0 <= args.pairs <= 1):
        raise ValueError(f"--pairs {args.pairs:g}: of --recipe {' and '.join(EMOJI_RECIPES)}, from 0 to 1")
    learns_from_images = bool(recipes.RECIPES[args.recipe].preset) and Path(args.data).suffix.lower() not in PROMPTS
    if args.buckets is not None and not learns_from_images:
        raise ValueError("--buckets, --no-buckets: of recipes that learn from your images")
    if args.text_cache is not None and not recipes.RECIPES[args.recipe].preset:
        raise ValueError("--text-cache, --no-text-cache: of recipes that learn from your captions")
    of_teacher = {"--teacher": args.teacher, "--time-scale": args.time_scale}
    unread = [option for option, value in of_teacher.items() if value is not None]
    if recipes.RECIPES[args.recipe].is_control:
        if unread:
            raise ValueError(f"{', '.join(unread)}: a ControlNet has no teacher; --student takes its SANA-Sprint")
        if args.stage not in ("control", "all"):
            raise ValueError(f"--stage {args.stage}: {args.recipe} has the stage control")
        scenes = args.recipe != "control"
        if args.hed and scenes:
            raise ValueError("--hed: the edges of scenes are made without weights; --recipe control takes it")
        if args.pool is not None and not scenes:
            raise ValueError("--pool: of scenes; --recipe control learns from all images of --data")
    elif args.hed or args.control:
        only = "--hed is of the recipe control" if args.hed else "--control is of the recipes of a ControlNet"
        raise ValueError(only)
    elif not recipes.RECIPES[args.recipe].preset:
        if args.recipe == DEFAULT:
            unread = [option for option in unread if option != "--teacher"]
        unread += ["--text-encoder"] * (args.text_encoder is not None and args.recipe == SHAPES)
        if unread:
            raise ValueError(
                f"{', '.join(unread)}: {args.recipe} learns from nothing; is --recipe sprint-0.6B missing?"
            )
    if args.pool is not None and args.pool < 1:
        raise ValueError(f"--pool {args.pool}: at least one scene is needed")
    if args.compare and (args.export != "ema" or args.keep_every):
        raise ValueError("--export and --keep-every are of one model; --compare trains many")
    if args.gpu:
        gpus.parse(args.gpu)
        if not args.dry_run:
            raise ValueError("--gpu is of --dry-run; --device says where a training runs")
    if args.tracker:
        trackers.check(args.tracker)
    if (args.compile or args.shard or args.tracker) and args.compare:
        raise ValueError("--compile, --shard and --tracker are of one model; --compare trains many")
    if args.compile and args.shard:
        raise ValueError("--shard: its parts and --compile's blocks were not tried together; leave one of them out")
    if args.resume_best and (args.compare or recipes.RECIPES[args.recipe].is_control):
        raise ValueError("--resume-best: only distillations of a teacher keep their best average")
    recipe = recipes.RECIPES[args.recipe]
    return _checked(recipe, recipes.override(recipe, args.settings), args.compare)


def _checked(recipe: recipes.Recipe, chosen: recipes.Recipe, compares: bool) -> recipes.Recipe:
    """The chosen one, if all that differs from the recipe counts. Raises ValueError."""
    own, aim, stage = recipe.objective, chosen.objective, chosen.last
    if compares and (set_by_rows := [n for n in ("method", *WEIGHTS) if getattr(own, n) != getattr(aim, n)]):
        raise ValueError(f"--set {stage}.{set_by_rows[0]}: each row of --compare has its own; leave it out")
    if not compares and aim.unread:
        raise ValueError(f"--set {stage}.{aim.unread[0]}: method {aim.method} does not read it; leave it out")
    learns = {"critic": aim.ladd_weight, "fake": METHODS[aim.method].score}
    idle = [name for module, name in recipes.OWN_BETAS.items() if not learns[module] and not compares]
    for name in idle:
        if getattr(chosen.stages[stage], name):
            raise ValueError(f"--set {stage}.{name}: method {aim.method} trains none with these weights; leave it out")
    return chosen


def _configure(run: Run, args: argparse.Namespace) -> None:
    """Its seed; and what ends a run, and what it keeps: another choice of these makes no other run of it."""
    run.seed = run.seed if args.seed is None else args.seed
    run.resume_best, run.exported = args.resume_best, args.export
    run.stop, run.keep_every = Stop(args.max_hours), args.keep_every
    run.compiles, run.tracker = args.compile, args.tracker
    if args.compile:
        compiling.check(run.device)
        if run.recipe.objective.is_forward_mode:
            log.warning(FORWARD_MODE, *[run.recipe.last] * 2)


def _run_shapes(args: argparse.Namespace, recipe: recipes.Recipe, processes: ProcessGroup, command: str) -> list[Path]:
    if args.data != SCENES:
        raise ValueError(f"--data {args.data}: {SHAPES} draws its own scenes; --recipe sprint-0.6B takes images")
    run = shapes.ShapesRun(args.out, recipe, args.pool or shapes.POOL, args.autoencoder, processes, args.student)
    _configure(run, args)
    if args.stage == "features":
        return run.export_features(run.train_features(), args.out, command)
    if args.stage == "captioning":
        run.train_text_encoder()
        return []
    autoencoder = run.train_autoencoder()
    if args.stage in ("autoencoder", "decoder"):  # a DC-AE is of use only after both
        return run.export_autoencoder(autoencoder, args.out, command)
    latents = run.encode_dataset(autoencoder)
    teacher = run.train_teacher(run.train_text_encoder(), autoencoder, latents)
    if args.stage == "teacher":
        return []
    student = run.train_student(teacher, autoencoder, latents)
    return run.export(student, teacher, autoencoder, args.out, command) if processes.rank == 0 else []


def _emoji_run(args: argparse.Namespace, recipe: recipes.Recipe, processes: ProcessGroup) -> emoji.EmojiRun:
    if args.data == SCENES:
        what = "--compare" if args.compare else f"--recipe {DEFAULT}"
        raise ValueError(f"{what} needs --data sprites.zip; python -m sprint_core.distill.prepare makes it")
    parts = {name: getattr(args, name) for name in ("autoencoder", "student", "text_encoder", "teacher")}
    among = CONCEPTS[args.concepts or "all"]()
    pool, pairs = args.pool or emoji.POOL, PAIRS if args.pairs is None else args.pairs
    return emoji.EmojiRun(
        args.out, recipe, Path(args.data), pool, processes=processes, among=among, pairs=pairs, **parts
    )


def _run_emoji(args: argparse.Namespace, recipe: recipes.Recipe, processes: ProcessGroup, command: str) -> list[Path]:
    run = _emoji_run(args, recipe, processes)
    _configure(run, args)
    if args.stage in ("autoencoder", "decoder"):  # a DC-AE is of use only after both
        return run.export_autoencoder(run.train_autoencoder(), command)
    drawn = run.draw_scenes()
    if args.stage == "features":
        return run.export_features(run.train_features(drawn), command)
    gemma = run.train_text_encoder(drawn)
    if args.stage == "captioning":
        return []
    autoencoder = run.train_autoencoder()
    dataset = run.dataset(run.encode_dataset(autoencoder, drawn), drawn)
    teacher = run.train_teacher(gemma, dataset)
    if args.stage == "teacher":
        return []
    student = run.train_student(teacher, autoencoder, dataset)
    return run.export(student, teacher, autoencoder, command) if processes.rank == 0 else []


def _run_control(args: argparse.Namespace, recipe: recipes.Recipe, processes: ProcessGroup, command: str) -> list[Path]:
    parts = {"--student": args.student, "--vae": args.autoencoder, "--text-encoder": args.text_encoder}
    emoji_scenes, of_shapes = args.recipe == DEMO_CONTROL, args.recipe == "shapes-control"
    if of_shapes and args.data != SCENES:
        raise ValueError(f"--data {args.data}: {args.recipe} draws its own scenes; --recipe control takes images")
    if emoji_scenes:
        parts = {option: path or presets.BUNDLED for option, path in parts.items()}
    missing = [*(option for option, path in parts.items() if path is None)]
    missing += ["--data"] * (not of_shapes and args.data == SCENES)
    if missing:
        raise ValueError(f"--recipe {args.recipe} needs {', '.join(missing)}")
    data = {} if args.data == SCENES else {"sprites" if emoji_scenes else "images": Path(args.data)}
    options = _data_options(args)
    sources = control.ControlSources(*parts.values(), **data, hed=args.hed, branch=args.control, data=options)
    if emoji_scenes:
        run = emoji_control.EmojiControlRun(args.out, recipe, sources, args.pool or emoji_control.POOL, processes)
        run.pairs = run.pairs if args.pairs is None else args.pairs
    else:
        run = control.ControlRun(args.out, recipe, sources, args.pool or control.POOL, processes)
    _configure(run, args)
    estimate.check_memory(_estimates(args, recipe, processes, run.trunk), processes)
    branch = run.train_branch(run.encode_dataset())
    return run.export(branch, command) if processes.rank == 0 else []


def _run_published(
    args: argparse.Namespace, recipe: recipes.Recipe, processes: ProcessGroup, command: str
) -> list[Path]:
    unneeded = ("autoencoder",) if Path(args.data).suffix.lower() in PROMPTS else ()
    missing = [option for name, option in NEEDED.items() if getattr(args, name) is None and name not in unneeded]
    if missing or args.data == SCENES:
        raise ValueError(f"--recipe {args.recipe} needs {', '.join([*missing, *['--data'] * (args.data == SCENES)])}")
    if args.stage not in (*recipe.stages, "all"):
        raise ValueError(f"--stage {args.stage}: {args.recipe} has the stages {', '.join(recipe.stages)}")
    parts = (args.teacher, args.autoencoder, args.text_encoder)
    sources = Sources(*parts, Path(args.data), args.time_scale, args.student, _data_options(args))
    run = PublishedRun(args.out, recipe, sources, processes)  # before the estimate, which takes a while
    planned = [one for one in _estimates(args, recipe, processes) if args.stage in (one.stage, "all")]
    estimate.check_memory(planned, processes)
    _configure(run, args)
    cache = run.encode_dataset()
    model = run.train_teacher(cache).transformer if args.stage == "teacher" else run.train_student(cache)
    return run.export(model, command) if processes.rank == 0 else []


def _data_options(args: argparse.Namespace) -> DataOptions:
    return DataOptions(args.buckets is not False, args.text_cache is not False)


def _estimates(
    args: argparse.Namespace, recipe: recipes.Recipe, processes: ProcessGroup, trunk: checkpoint.Weights | None = None
) -> list[estimate.Estimate]:
    """Of every stage, with the text encoder where each batch's captions are encoded."""
    estimates = estimate.of_recipe(recipe, processes, trunk)
    if args.text_cache is not False:
        return estimates
    path = args.text_encoder
    config = checkpoint.load(path, layouts.TEXT_ENCODER).config if path else GemmaConfig()
    dtype = torch.bfloat16 if args.gpu else dtype_on(processes.device)
    return estimate.with_text_encoder(estimates, config, dtype)


def _dry_run(args: argparse.Namespace, recipe: recipes.Recipe, processes: ProcessGroup) -> dict:
    """What each stage would take on this process, or on one of the cards that are named."""
    result = {}
    cards = args.gpu and gpus.parse(args.gpu)
    if cards:
        processes = dataclasses.replace(processes, world_size=cards.count)
    processes = dataclasses.replace(processes, shards=args.shard and processes.world_size > 1)
    trunk = checkpoint.load(args.student, layouts.TRANSFORMER) if recipe.is_control and args.student else None
    for one in _estimates(args, recipe, processes, trunk):
        speed = estimate.matmul_speed(processes.device, recipe.stages[one.stage].precision)
        tqdm.write(one.text(speed))
        result[one.stage] = {
            "parameters": one.trained,
            "memory_bytes": one.memory_bytes,
            "disk_bytes": one.disk_bytes,
            "sec_per_step_at_least": float(f"{one.per_step / speed:.3g}"),
            "steps": one.steps,
        }
        if cards and recipe.stages[one.stage].precision == "bf16":
            result[one.stage]["hours"] = hours = cards.hours(one.per_step, one.steps)
            tqdm.write(cards.text(one.stage, hours))
    disk = {}
    if recipe.preset:
        data = None if args.data == SCENES else Path(args.data)
        size = encoded_size.of_recipe(recipe, data, args.text_cache is not False, trunk)
        tqdm.write(size.text())
        disk = {"disk": {"bytes_per_image": size.parts, "images": size.count}}
    return {"dry_run": result, "device": str(processes.device), **disk}


def command_of(argv: Sequence[str]) -> str:
    """The command as the files of a run say it: those are published, and the folders of a machine are its user's."""
    options = (word.rpartition("=") for word in argv)
    words = [front + sign + (Path(end).name if Path(end).is_absolute() else end) for front, sign, end in options]
    return " ".join(["python", "-m", "sprint_core.distill", *words])


def main(argv: Sequence[str] | None = None) -> int:
    messages.carry_any_text()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # gains stay fp32 under autocast
    args = _arguments(argv)
    command = command_of(argv if argv is not None else sys.argv[1:])
    started, status = time.perf_counter(), 0
    try:
        recipe = _recipe(args)
        processes = launched_processes(args.device, args.shard and not args.dry_run)
        if processes.rank:
            logging.getLogger().setLevel(logging.ERROR)  # process 0 says it for all
        if args.dry_run:
            result = _dry_run(args, recipe, processes)
        elif args.compare:
            run, evaluations = _emoji_run(args, recipe, processes), args.evaluations or compare.EVALUATIONS
            run.stop = Stop(args.max_hours)
            chosen, seeds = compare.methods(args.methods), args.seeds or compare.SEEDS
            result = compare.run(run, chosen, seeds, evaluations, compare.PROMPTS)
        else:
            run = _run_control if recipe.is_control else _run_published if recipe.preset else _run_shapes
            run = _run_emoji if args.recipe == DEFAULT else run
            files = run(args, recipe, processes, command)
            result = {"files": [str(path) for path in files]}
    except (ValueError, OSError) as error:
        log.error("error: %s", cli.sentence(error))
        return 1
    except Stopped as stopped:
        log.warning("%s", stopped)
        status, result = GOES_ON, {"stopped": {"stage": stopped.stage, "step": stopped.step}}
    if processes.rank == 0:
        tqdm.write(json.dumps(result | {"seconds": round(time.perf_counter() - started, 1)}))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
