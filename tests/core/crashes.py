"""Kills a process at random moments while it writes, and looks at what it leaves.

    python tests/core/crashes.py KIND FOLDER COUNT SEED

The script prepares two contents of a file or folder, A and B. Then, COUNT times, a copy of the process writes them in
turn until SIGKILL ends it, and what lies there must be A or B to the byte. The moments are of three kinds in turn:
"held", where the process stays at a random step of the writing until it is killed, with a temporary file there;
"begun", a random time after a writing began, and within what one takes; and "any". The last line is JSON: how many of
each kind found a temporary file.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import nn

from sprint_core import convert
from sprint_core.distill.engine.stage import Stage
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.recipes import Schedule
from sprint_core.images import files, preview
from sprint_core.weights import presets

Write = Callable[[int], object]  # 0 writes A, 1 writes B
Content = dict[str, bytes]
WAYS = ("held", "begun", "any")


def visible(place: Path) -> Content:
    """What lies in a folder by name; hidden names are what a killed process leaves."""
    files = {file.relative_to(place): file for file in sorted(place.rglob("*")) if file.is_file()}
    shown = {name: file for name, file in files.items() if not any(part.startswith(".") for part in name.parts)}
    return {name.as_posix(): file.read_bytes() for name, file in shown.items()}


def converting_a_file(place: Path) -> Write:
    target, forms = place / "out.safetensors", (None, "int8")
    return lambda i: convert.convert(presets.BUNDLED, target, "native", None, forms[i], True, "")


def converting_the_authors_file(place: Path) -> Write:
    target, parts = place / "out.pth", ("transformer", "autoencoder")
    return lambda i: convert.convert(presets.BUNDLED, target, "nvlabs", parts[i], None, True, "")


def converting_a_folder(place: Path) -> Write:
    target, parts = place / "out", ("transformer", "text_encoder")
    return lambda i: convert.convert(presets.BUNDLED, target, "diffusers", parts[i], None, True, "")


class Constant(Stage):
    """Networks of one number throughout, whose states differ in every byte that counts."""

    name, averaged = "constant", "student"

    def loss(self, phase, step, random):
        raise NotImplementedError("this stage is only saved")


def saving_a_training(place: Path) -> Write:
    trainer = Trainer(Constant({"student": nn.Linear(512, 512)}, {}), Schedule(1, 1, 0.1), place)

    def write(i: int) -> None:
        trainer.step = i
        for module in (trainer.average, *trainer.stage.modules.values()):
            nn.init.constant_(module.weight, i + 1)
        trainer.save()

    return write


def fitting_previews(place: Path) -> Write:
    vae, folders = place.parent / "vae" / "vae.safetensors", [place.parent / name for name in "AB"]
    convert.convert(presets.BUNDLED, vae, "native", "autoencoder", None, True, "")
    for folder, (low, high) in zip(folders, ((0, 99), (100, 255)), strict=True):
        folder.mkdir()
        for i in range(6):
            noise = torch.randint(low, high, (8, 8, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).resize((256, 256)).save(folder / f"{i}.png")

    def write(i: int) -> None:
        preview.fit_file(place / "vae.safetensors", folders[i], True)

    os.link(vae, place / "vae.safetensors")
    return write


def saving_a_batch(place: Path) -> Write:
    noise = [torch.rand(1, 256, 256, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    return lambda i: files.save(noise[i], [place / "a.png"])


KINDS = {
    function.__name__: function
    for function in (
        converting_a_file, converting_the_authors_file, converting_a_folder, saving_a_training, fitting_previews,
        saving_a_batch,
    )
}  # fmt: skip


# --- when to kill -------------------------------------------------------------------------------------


class Watch:
    """Follows a process by Python's own audit events, which come just before a file is opened, renamed or removed.

    A step is such an event at which a temporary file is there. The folder is listed just before one is made.
    """

    def __init__(self, place: Path):
        self.place, self.began = str(place), 0.0
        self.steps: list[float] = []  # seconds since the writing began
        self.stop_at, self.pipe = -1, -1

    def __call__(self, event: str, args: tuple) -> None:
        path = os.fspath(args[0]) if args and isinstance(args[0], str | os.PathLike) else ""
        if not (isinstance(path, str) and path.startswith(self.place)):
            return
        if ".tmp-" in path and os.path.exists(path):
            self.steps.append(time.monotonic() - self.began)
            if len(self.steps) - 1 == self.stop_at:
                self._report("held")
                time.sleep(600)
        elif event in ("os.listdir", "os.scandir"):
            self.began = time.monotonic()
            self._report("begun")

    def _report(self, word: str) -> None:
        if self.pipe >= 0:
            os.write(self.pipe, f"{word}\n".encode())


@contextlib.contextmanager
def writing(write: Write, watch: Watch, stop_at: int = -1) -> Iterator[BinaryIO]:
    """A copy of this process that writes A and B in turn; killed at the end. Yields what it reports.

    stop_at: the number of the step, counted from 0, at which it stays.
    """
    reading, watch.pipe = os.pipe()
    watch.stop_at, watch.steps = stop_at, []
    pid = os.fork()
    if not pid:
        try:
            while True:
                for i in (1, 0):
                    write(i)
        finally:
            os._exit(1)
    os.close(watch.pipe)
    watch.stop_at = watch.pipe = -1
    with open(reading, "rb") as reports:
        try:
            yield reports
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def temporaries(place: Path) -> list[Path]:
    return [file for file in place.rglob(".*") if ".tmp-" in file.name]


def clear_temporaries(place: Path) -> list[Path]:
    """Remove what a killed process left; returns it."""
    left = temporaries(place)
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return left


def main(kind: str, folder: str, count: str, seed: str) -> None:
    torch.set_num_threads(1)  # the pool of threads does not live on in a copy of the process
    place, moments = Path(folder) / "place", random.Random(int(seed))
    place.mkdir(parents=True)
    write, watch = KINDS[kind](place), Watch(place)
    sys.addaudithook(watch)
    contents, started = [], time.monotonic()
    for i in (1, 0):
        write(i)
        contents.append(visible(place))
    both_sec, steps, window_sec = time.monotonic() - started, len(watch.steps), max(watch.steps)
    assert contents[0] != contents[1]
    hits = dict.fromkeys(WAYS, 0)
    for number in range(int(count)):
        way = WAYS[number % len(WAYS)]
        with writing(write, watch, moments.randrange(steps) if way == "held" else -1) as reports:
            if way == "held":
                assert any(line == b"held\n" for line in reports)
            elif way == "begun":
                reports.readline()
                time.sleep(moments.uniform(0, window_sec))
            else:
                time.sleep(moments.uniform(0, 2 * both_sec))
        left = visible(place)
        assert left in contents, f"neither the old nor the new: {sorted(left)}"
        had_temporary = bool(clear_temporaries(place))
        assert had_temporary or way != "held", "the writing was held, and no temporary file is there"
        hits[way] += had_temporary
    print(json.dumps({"kind": kind, "kills": int(count), "steps": steps, "in_writing": hits}))


if __name__ == "__main__":
    main(*sys.argv[1:])
