"""Procedural scenes as training images: renders, captions that are worded anew each time, and control images."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...images import edges
from ...models.hed import HED
from ...shapes import examples, scenes
from ..engine.randomness import SampleRandom

CAPTION_SEEDS = 2**31


def images(seeds: Sequence[int], split: str = "train") -> Tensor:
    """Renders of the scenes with these seeds: [b, 3, 256, 256] in [-1, 1]."""
    return as_tensor(scenes.render(examples.scene_and_caption(seed, split)[0]) for seed in seeds)


def captions(seeds: Sequence[int], random: SampleRandom, free: bool = False) -> list[str]:
    """A caption of each of the (free) training scenes with these seeds, worded anew each time."""
    drawn = zip(seeds, random.integers(CAPTION_SEEDS).tolist(), strict=True)
    return [examples.another_caption(_scene(i, free), seed, free) for i, seed in drawn]


@functools.cache
def _scene(seed: int, free: bool) -> scenes.Scene:
    """Kept, since drawing one takes longer than wording it."""
    return examples.scene_and_caption(seed, free=free)[0]


def moved_images(seeds: Sequence[int]) -> Tensor:
    """Renders of free scenes, [b, 3, 256, 256] in [-1, 1]: in every second pair things stand off the nine places.

    Those are for captions; who draws, draws anywhere.
    """
    return as_tensor(scenes.render(_scene(seed, True), moved=_moves(seed)) for seed in seeds)


def scene_edges(seeds: Sequence[int]) -> Tensor:
    """Control images of these, [b, 3, 256, 256] in [-1, 1]: in every fourth group of four some things are missing.

    So that the network learns to place what is not drawn, and an empty sheet is no order.
    """
    renders = []
    for seed in seeds:
        scene, moves = _scene(seed, True), _moves(seed)
        if seed // 4 % 4 == 3:
            drawn = [i for i in range(len(scene.things)) if (seed // 16 >> i) % 2]
            moves = [moves[i] for i in drawn] if moves else ()
            scene = dataclasses.replace(scene, things=tuple(scene.things[i] for i in drawn))
        renders.append(scenes.render(scene, moved=moves))
    return control_images(as_tensor(renders))


def control_images(images: Tensor, network: HED | None = None, scribbles: Tensor | None = None) -> Tensor:
    """Soft edges of images, or scribbles, as users may give either: [b, 3, h, w] in [-1, 1].

    network: finds the edges; without it they are found without weights. scribbles: of which images [b], or of the odd.
    """
    scribbles = torch.arange(len(images)) % 2 == 1 if scribbles is None else scribbles
    drawn = torch.empty_like(images)
    for scribble in (False, True):
        rows = (scribbles == scribble).nonzero()[:, 0].to(images.device)
        if len(rows):
            drawn[rows] = edges.detect((images[rows].movedim(1, -1) + 1) / 2, network, scribble).movedim(-1, 1)
    return drawn * 2 - 1


def as_tensor(renders: Iterable[np.ndarray]) -> Tensor:
    """[h, w, 3] uint8 each -> [b, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.stack(list(renders))).movedim(-1, 1).float().div_(127.5).sub_(1.0)


def _moves(seed: int) -> Sequence[tuple[int, int]]:
    return scenes.moves(_scene(seed, True), seed) if seed // 2 % 2 else ()
