"""Images of many prompts: exactly one for each, whatever interrupts the run. The same command goes on.

    python -m sprint_core.batch PROMPTS --out DIR

PROMPTS is .txt (one a line), .jsonl, .csv or .parquet, with the columns prompt, and if wanted id, seed, steps,
guidance, width, height, negative, image and control. DIR gets shards of images, captions and what each was made with.
The last line of output is one JSON document, most of which is in DIR/manifest.json, too.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from .. import cli, messages, trigflow
from ..devices import DTYPES, usable_device
from ..images import sizes
from ..models import controlnet
from ..models.nag import NAG
from ..pipeline import MULTISTEP
from . import cluster, folder, generate, local, plan, rows, writing
from .generate import IMAGE_FORMATS, Settings
from .work import Report

ENGINES = {"local": local.run, "ray": cluster.run}

log = messages.logger(__name__)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    usual = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m sprint_core.batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prompts", type=Path, metavar="PROMPTS")
    add("--out", type=Path, required=True, metavar="DIR", help="the same again goes on with it")
    add("--model", help="pipeline folder, file, or preset (default: the bundled tiny one)")
    add("--average", action="store_true", help="of a training save, the moving average of its weights (state_dict_ema)")
    add("--vae", help="DC-AE, when --model holds none")
    add("--text-encoder", help="Gemma-2, when --model holds none")
    add("--dtype", choices=DTYPES, help="default: each file's")
    add(
        "--steps",
        type=int,
        help=f"of rows that do not say (default: {generate.STEPS}, of a multi-step model {MULTISTEP})",
    )
    add("--schedule", default=usual.schedule, help="paper (1-4 steps), app (1-40), auto, or angles: 1.5,1")
    add("--guidance", type=float, help="of rows that do not say; of a multi-step model its cfg")
    add("--seed", type=int, default=0, help="of the first row; the next has one more")
    add("--size", help="WxH in pixels, of rows that do not say (default: the model's own)")
    add("--negative", help="what to avoid in the images, as a prompt, of rows that do not say")
    add("--negative-scale", type=float, default=usual.negative_scale, help="how strongly (default: %(default)g)")
    add("--strength", type=float, default=usual.strength, help="of rows with an image (default: %(default)g)")
    add("--control-model", help="ControlNet file or folder (default: the bundled model's own)")
    add("--control-strength", type=float, default=usual.control_strength)
    add("--edges", choices=("soft", "scribble", "none"), default=usual.edges, help="of control images")
    add("--format", choices=writing.WRITERS, default="tar", help="of the shards (default: tar, webdataset)")
    add("--image-format", choices=IMAGE_FORMATS, default=usual.image_format)
    add("--quality", type=int, default=usual.quality, help="of jpg and webp, 1 to 100 (default: %(default)d)")
    add("--batch", type=int, default=usual.batch, help="images made at once (default: %(default)d)")
    add("--shard-rows", type=int, help=f"rows of a shard (default: {plan.MOST_ROWS}, fewer for {plan.SHARDS} shards)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, or several: cuda:0,cuda:1")
    add("--workers", type=int, help="processes, spread over the devices (default: one for each)")
    add("--threads", type=int, help="of each worker on a CPU (default: DIR's own, at first its share of the cores)")
    add("--shard", default="0/1", metavar="K/N", help="of N commands on one DIR, this is number K, from 0")
    add("--engine", choices=ENGINES, default="local", help="ray: on a cluster (RAY_ADDRESS) or here (default: local)")
    add("--one-after-another", action="store_true", help="without overlap of text, steps and image files; to measure")
    return parser.parse_args(argv)


def _settings(args: argparse.Namespace) -> Settings:
    """Raises ValueError for what no row could be made with."""
    named = {field.name: getattr(args, field.name) for field in fields(Settings) if field.name != "folder"}
    settings = Settings(**named, folder=str(args.prompts.parent))
    trigflow.sigmas(settings.schedule, generate.STEPS, settings.strength)
    controlnet.check_strength_and_range(settings.control_strength, 0.0, 1.0)
    NAG(scale=settings.negative_scale)
    for name, least, most in (("batch", 1, 4096), ("quality", 1, 100)):
        if not least <= getattr(args, name) <= most:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must lie in {least} to {most}")
    for name in ("shard_rows", "workers", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if not 0 <= args.seed < rows.MOST:
        raise ValueError(f"--seed is {args.seed}; it must be a whole number from 0")
    settings.check_steps(generate.STEPS if args.steps is None else args.steps, settings.is_multistep())
    if args.engine == "ray":
        cluster.check()
    if args.format == "parquet":
        writing.pyarrow()
    return settings


def _defaults(args: argparse.Namespace) -> rows.Defaults:
    """Raises ValueError."""
    width = height = None
    if args.size:
        try:
            width, height = (int(n) for n in args.size.lower().split("x"))
        except ValueError:
            raise ValueError(f"--size {args.size}: write it as 1024x1024") from None
        if sizes.round_size(width, height) != (width, height):
            raise ValueError(f"--size {args.size}: both must be multiples of 32")
    return rows.Defaults(args.seed, args.steps, args.guidance, width, height, args.negative)


def _part(text: str) -> tuple[int, int]:
    """(K, N). Raises ValueError."""
    number, _, count = text.partition("/")
    if not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit() and int(number) < int(count)):
        raise ValueError(f"--shard {text}: write K/N, with K from 0 to N - 1, as in 0/8")
    return int(number), int(count)


def _devices(args: argparse.Namespace) -> list[str]:
    """One for each worker, in turn. Raises ValueError."""
    names = [name.strip() for name in args.device.split(",")]
    if args.engine == "ray" and names not in (["cpu"], ["cuda"]):
        raise ValueError(f"--device {args.device}: Ray chooses the devices; say cpu or cuda, and how many by --workers")
    if not (args.engine == "ray" and os.environ.get("RAY_ADDRESS")):  # a cluster may have what this machine has not
        for name in names:
            usable_device(name)
    workers = args.workers or len(names)
    if workers < len(names):
        raise ValueError(f"--workers {workers}: fewer than the {len(names)} devices; name fewer, or take more")
    return [names[i % len(names)] for i in range(workers)]


def run(args: argparse.Namespace) -> dict:
    """Do what one command line says, and return the JSON document that it ends with. Raises ValueError, OSError."""
    started = time.perf_counter()
    settings, defaults, (part, parts), devices = _settings(args), _defaults(args), _part(args.shard), _devices(args)
    whole = plan.make(rows.read(args.prompts, defaults), args.batch, args.shard_rows)
    weights_hash = settings.weights_hash()
    job = _job(args, settings, whole, weights_hash, devices[0])
    job = folder.begin(args.out, job, args.threads, max(1, (os.cpu_count() or 1) // len(devices)))
    where = folder.Folder(args.out, len(whole.numbers), args.format)
    mine = whole.numbers[part::parts]
    progress = _Progress(whole, mine, where)
    with progress.bar:
        while shards := where.missing(mine):
            ENGINES[args.engine](
                settings,
                where,
                whole,
                shards,
                devices,
                job["threads"],
                weights_hash,
                progress.count,
                not args.one_after_another,
            )
            _wait_for_others(where, shards)
    seconds = time.perf_counter() - started
    done = not where.missing(whole.numbers)
    of_job = folder.write_manifest(where, job) if done else {"unfinished": "other parts of the job are not done"}
    speed = {"images": progress.images, "seconds": round(seconds, 3)}
    speed["images_per_second"] = round(progress.images / seconds, 3)
    return {**of_job, "out": str(args.out.resolve()), "run": speed}


def _job(args: argparse.Namespace, settings: Settings, whole: plan.Plan, weights_hash: str, device: str) -> dict:
    """All that decides the bytes of the files; what was chosen on the command line comes first."""
    named = {field.name: getattr(settings, field.name) for field in fields(Settings)}
    unnamed = ("model", "vae", "text_encoder", "control_model", "folder")
    return {
        **{name: getattr(args, name) for name in ("steps", "guidance", "seed", "size", "negative", "format")},
        **{name: value for name, value in named.items() if name not in unnamed},
        "shard_rows": whole.shard_rows,
        "device": torch.device(device).type,
        "rows": len(whole.spool),
        "model": weights_hash,
        "prompts": whole.digest,
        "version": generate.pack_version(),
    }


class _Progress:
    """A bar over the rows of this command, with images a second and the time that is left."""

    def __init__(self, whole: plan.Plan, mine: Sequence[int], where: folder.Folder):
        rows_in_all = whole.count(mine)
        there = rows_in_all - whole.count(where.missing(mine))
        self.whole, self.images = whole, 0
        self.bar = tqdm(total=rows_in_all, initial=there, unit="image", desc="images", smoothing=0.05)

    def count(self, report: Report) -> None:
        self.images += report.images
        self.bar.update(report.images + report.failed)


def _wait_for_others(where: folder.Folder, shards: Sequence[int]) -> None:
    """Until one of the shards that others were making is there or given up."""
    others = where.missing(shards)
    if others:
        log.info("%d shards are being made by another process on this folder; waiting for it", len(others))
    while others and where.missing(others) == others:
        claims = folder.Claims(where)
        free = any(claims.take(shard) for shard in others)
        claims.close()
        if free:
            return
        time.sleep(folder.PAUSE_SEC)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        return cli.run(lambda: run(args))
    except KeyboardInterrupt:
        log.warning("stopped; the same command goes on")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
