"""Scenes of the emoji world with their captions as tokens, and what each caption says as labels.

Every SHAPE_SHARE-th scene is one of plain shapes, with several captions each. Drawn by several processes, the same
for any number of them.
"""

import dataclasses
import functools
import hashlib
import multiprocessing
import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...emoji import captions, scenes
from ...emoji.concepts import concepts
from ...shapes import captions as shape_captions
from ...shapes import examples
from ...shapes import scenes as shapes
from ...text.tokenizers import PAD
from .emoji_text import prompts

CHUNK = 2000  # scenes that a process draws at a time
SHAPE_SHARE = 10  # captions, of which one is of shapes
CAPTIONS_PER_SHAPE = 5

# A question about a caption is the list of its possible labels; None: the caption does not say.
_CONCEPTS = [None, *range(len(concepts()))]
EMOJI_QUESTIONS: tuple[list[Any], ...] = (
    _CONCEPTS,
    _CONCEPTS,
    [None, *captions.PLACES],
    [None, *captions.SIZES],
    [None, *captions.STYLE_WORDS],
    [None, *captions.GROUNDS],
    [1, *captions.NUMBERS],
    [None, "left", "above"],
)
_THING = (
    [None, *shapes.SHAPES],
    [None, *shapes.COLOURS],
    [None, *shape_captions.SIZE_WORDS],
    [None, *shape_captions.PLACES],
)
SHAPE_QUESTIONS = (*_THING, *_THING, list(shape_captions.NUMBERS), [None, "left", "above"], [None, *shapes.BACKGROUNDS])
QUESTIONS = (*EMOJI_QUESTIONS, *SHAPE_QUESTIONS)
_SWAPPED = {"right": "left", "below": "above"}


def labels(requirement: captions.Requirement) -> list[int]:
    """What a caption of the emoji world says: for each of QUESTIONS the index of its label."""
    first, second = [*requirement.concepts, None][:2]
    relation = requirement.relation
    if relation in _SWAPPED:
        first, second, relation = second, first, _SWAPPED[relation]
    attributes = (requirement.place, requirement.size, requirement.style, requirement.ground, requirement.count)
    answers = (first, second, *attributes, relation)
    own = [question.index(answer) for question, answer in zip(EMOJI_QUESTIONS, answers, strict=True)]
    return own + [0] * len(SHAPE_QUESTIONS)


def shape_labels(caption: str) -> list[int]:
    """The same of a caption of plain shapes."""
    meaning = shape_captions.parse(caption)
    values = [getattr(thing, name) for thing in meaning.things for name in ("shape", "colour", "size", "place")]
    values += [None] * (2 * len(_THING) - len(values))
    values += [meaning.things[0].count, meaning.relation, meaning.background]
    own = [question.index(value) for question, value in zip(SHAPE_QUESTIONS, values, strict=True)]
    return [0] * len(EMOJI_QUESTIONS) + own


@dataclass(frozen=True)
class CaptionedScenes:
    """Packed scenes (scenes.py), images of shapes [m, 3, 256, 256] uint8, and captions of both.

    tokens [n, max_tokens], int16, padded with PAD; labels [n, questions], int16; image [n]: which image a caption
    is of: a packed scene, and from len(packed) on one of the shapes.
    """

    packed: Tensor
    shapes: Tensor
    tokens: Tensor
    labels: Tensor
    image: Tensor

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells datasets apart."""
        numbers = hashlib.sha256()
        for tensor in (self.packed, self.tokens, self.labels, self.image):
            numbers.update(tensor.numpy().tobytes())
        return numbers.hexdigest()[:32]


def draw_free(
    count: int, processes: int = 0, among: Sequence[int] = captions.ALL, pairs: float = captions.PAIRS
) -> CaptionedScenes:
    """`count` scenes whose things stand anywhere, with captions that say neither places nor sizes."""
    starts = range(0, count, CHUNK)
    parts = _run_all([(_free_chunk, start, min(start + CHUNK, count), among, pairs) for start in starts], processes)
    packed, tokens, answers = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
    return CaptionedScenes(packed, torch.zeros(0, 3, 256, 256, dtype=torch.uint8), tokens, answers, torch.arange(count))


def draw(
    count: int, processes: int = 0, among: Sequence[int] = captions.ALL, pairs: float = captions.PAIRS
) -> CaptionedScenes:
    """About `count` captions and their scenes, scenes 0 to ... of the training split.

    among: concepts, by number; pairs: how often a caption names two.
    """
    shape_count = count // SHAPE_SHARE // CAPTIONS_PER_SHAPE
    emoji_count = count - shape_count * CAPTIONS_PER_SHAPE
    jobs: list[tuple] = [
        (_emoji_chunk, start, min(start + CHUNK, emoji_count), among, pairs) for start in range(0, emoji_count, CHUNK)
    ]
    jobs += [
        (_shape_chunk, start, min(start + CHUNK // 10, shape_count)) for start in range(0, shape_count, CHUNK // 10)
    ]
    parts = _run_all(jobs, processes)
    emoji = [part for part, job in zip(parts, jobs, strict=True) if job[0] is _emoji_chunk]
    plain = [part for part, job in zip(parts, jobs, strict=True) if job[0] is _shape_chunk]
    packed = torch.from_numpy(np.concatenate([part[0] for part in emoji]))
    images = np.concatenate([part[0] for part in plain]) if plain else np.zeros((0, 3, 256, 256), np.uint8)
    tokens = np.concatenate([part[1] for part in emoji + plain])
    answers = np.concatenate([part[2] for part in emoji + plain])
    image = torch.cat(
        [torch.arange(len(packed)), len(packed) + torch.arange(len(images)).repeat_interleave(CAPTIONS_PER_SHAPE)]
    )
    return CaptionedScenes(packed, torch.from_numpy(images), torch.from_numpy(tokens), torch.from_numpy(answers), image)


def tokens(texts: Sequence[str]) -> np.ndarray:
    """[n, max_tokens], int16, padded with PAD."""
    rows = np.full((len(texts), prompts().preset.max_tokens), PAD, np.int16)
    for row, text in zip(rows, texts, strict=True):
        ids = prompts().tokens(text).ids
        row[: len(ids)] = ids
    return rows


def _run_all(jobs: list, processes: int) -> list:
    processes = processes or os.cpu_count() or 1
    if processes == 1 or len(jobs) < 4:
        return [_run(job) for job in jobs]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_run, jobs))


def _run(job):
    chunk, *arguments = job
    return chunk(*arguments)


def _emoji_chunk(
    start: int, stop: int, among: Sequence[int], pairs: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    drawn, texts, answers = [], [], []
    for seed in range(start, stop):
        rng = random.Random(f"train {seed}")
        requirement = captions.draw(rng, among=among, pairs=pairs)
        texts.append(captions.write(requirement, rng))
        drawn.append(scenes.compose(requirement, rng))
        answers.append(labels(requirement))
    return scenes.pack(drawn).numpy(), tokens(texts), np.array(answers, np.int16)


def _free_chunk(start: int, stop: int, among: Sequence[int], pairs: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    drawn, texts = [], []
    for seed in range(start, stop):
        rng = random.Random(f"free {seed}")
        requirement = dataclasses.replace(captions.draw(rng, among=among, pairs=pairs), place=None, size=None)
        texts.append(captions.write(requirement, rng))
        drawn.append(scenes.compose_free(requirement, rng))
    return scenes.pack(drawn).numpy(), tokens(texts), np.zeros((len(texts), 0), np.int16)


def _shape_chunk(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images, texts = [], []
    for seed in range(start, stop):
        scene, caption = examples.scene_and_caption(seed)
        images.append(np.moveaxis(shapes.render(scene), -1, 0))
        others = (examples.another_caption(scene, 10 * seed + i) for i in range(CAPTIONS_PER_SHAPE - 1))
        texts += [caption, *others]
    return np.stack(images), tokens(texts), np.array([shape_labels(text) for text in texts], np.int16)
