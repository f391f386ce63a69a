"""Kills a process at random moments while it writes, and looks at what it leaves.

    python tests/core/crashes.py KIND FOLDER COUNT SEED

The script prepares two contents of a file or folder, A and B. Then, COUNT times, a copy of the process writes them in
turn until SIGKILL ends it, and what lies there must be A or B to the byte. Every second moment is one at which a
temporary file is there. It ends with one JSON line: how many of the kills found one.
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


@contextlib.contextmanager
def writing(write: Write) -> Iterator[int]:
    """A copy of this process that writes A and B in turn; killed at the end."""
    pid = os.fork()
    if not pid:
        while True:
            for i in (1, 0):
                write(i)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def temporaries(place: Path) -> list[Path]:
    return [file for file in place.rglob(".*") if ".tmp-" in file.name]


def wait_for_a_temporary(place: Path) -> None:
    """Until the copy is about to write, so that half of the moments are among those that matter most."""
    before, deadline = temporaries(place), time.monotonic() + 60
    while temporaries(place) == before and time.monotonic() < deadline:
        time.sleep(0.0005)


def clear_temporaries(place: Path) -> list[Path]:
    """Remove what a killed process left; returns it."""
    found = temporaries(place)
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return found


def main(kind: str, folder: str, count: str, seed: str) -> None:
    torch.set_num_threads(1)  # the pool of threads does not live on in a copy of the process
    place, moments = Path(folder) / "place", random.Random(int(seed))
    place.mkdir(parents=True)
    write = KINDS[kind](place)
    contents, started = [], time.monotonic()
    for i in (1, 0):
        write(i)
        contents.append(visible(place))
    both_sec = time.monotonic() - started
    assert contents[0] != contents[1]
    ended, in_writing = [], 0
    for _ in range(int(count)):
        with writing(write):
            if len(ended) % 2:
                time.sleep(moments.uniform(0, 2 * both_sec))
            else:
                wait_for_a_temporary(place)
                time.sleep(moments.uniform(0, 0.01))
        ended.append(visible(place))
        assert ended[-1] in contents, f"neither the old nor the new: {sorted(ended[-1])}"
        in_writing += bool(clear_temporaries(place))
    print(json.dumps({"kind": kind, "kills": len(ended), "in_writing": in_writing}))


if __name__ == "__main__":
    main(*sys.argv[1:])
