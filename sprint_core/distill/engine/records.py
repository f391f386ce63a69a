"""What a training tells people while it runs: a progress bar, numbers, images.

metrics.jsonl holds one line per LOG_EVERY steps, samples/ one sample grid per Stage.sample_every; trackers.py draws
both elsewhere, too.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ... import disk
from ...images import files as image_files
from ..recipes import Schedule
from . import trackers


class Record(contextlib.AbstractContextManager):
    """The record of one stage in its folder; one of several processes writes. tracker: see trackers.opened."""

    def __init__(self, folder: Path, schedule: Schedule, step: int, writes: bool, tracker: str = ""):
        self.folder = folder
        self.batch = schedule.batch
        self.writes = writes
        quiet = not writes or not sys.stderr.isatty()
        self.bar = tqdm(total=schedule.steps, initial=step, desc=folder.name, unit=" steps", disable=quiet)
        self.trackers = trackers.opened(tracker, folder, schedule.chosen) if writes else []
        self.since = (step, time.monotonic())
        if writes:
            self._forget_after(step)

    def __exit__(self, *_) -> None:
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()

    def step(self) -> None:
        self.bar.update()

    def metrics(self, step: int, skipped: int, values: Mapping[str, Tensor]) -> None:
        """One line; the speed is that since the last one."""
        if not self.writes:
            return
        numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()  # waits once
        scalars = {name: round(number, 6) for name, number in zip(values, numbers, strict=True)}
        scalars = {name: number if math.isfinite(number) else None for name, number in scalars.items()}
        (before, then), now = self.since, time.monotonic()
        scalars["images_per_sec"] = round((step - before) * self.batch / max(now - then, 1e-9), 2)
        self.since = (step, now)
        self.bar.set_postfix(
            loss=next(iter(scalars.values())), images_s=f"{scalars['images_per_sec']:.1f}", skipped=skipped
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        with disk.naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "skipped": skipped, "time": round(time.time(), 1), **scalars}) + "\n")
        for tracker in self.trackers:
            tracker.numbers(step, {name: number for name, number in scalars.items() if number is not None})

    def _forget_after(self, step: int) -> None:
        """Drop lines of steps that an interruption undid, so that no step is there twice."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
        kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
        if len(kept) < len(lines):
            with disk.replacing(path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8", errors="surrogateescape")

    def samples(self, step: int, images: Tensor) -> None:
        """images: [b, h, w, 3] in [0, 1], as one grid."""
        sheet = tile(images)
        image_files.write(Image.fromarray(sheet.numpy()), self.folder / "samples" / f"{step:06d}.png")
        for tracker in self.trackers:
            tracker.images(step, sheet)


def _step_of(line: str) -> int | None:
    """The step of a line of numbers; None for half a line, or another's."""
    try:
        step = json.loads(line)["step"] if line.endswith("}\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def tile(images: Tensor) -> Tensor:
    """[b, h, w, 3] in [0, 1] -> [rows * h, columns * w, 3] in bytes, about square; missing ones are black."""
    columns = math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    padded = images.new_zeros(rows * columns, *images.shape[1:])
    padded[: len(images)] = images
    sheet = rearrange(padded, "(r c) h w rgb -> (r h) (c w) rgb", r=rows)
    return sheet.clamp(0, 1).mul(255.0).round().to("cpu", torch.uint8)
