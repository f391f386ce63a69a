"""Latents of procedural scenes: encoded once into shards, then read from memory."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...latent import SCALE
from ...models.autoencoder import Autoencoder
from ...weights import tensorfile
from ..engine.randomness import SampleRandom
from . import scenes
from .batch import Batch, weights_fingerprint

SHARD = 1000  # scenes
BATCH = 50
SAMPLED = 16  # scenes that stand for all of them in a fingerprint

Draw = Callable[[Sequence[int]], Tensor]  # seeds of scenes -> images [b, 3, px, px] in [-1, 1]


@dataclass(frozen=True)
class SceneLatents:
    """Scaled latents [n, 32, 8, 8] in fp16 of scenes 0 to n - 1, and of their control images if there are any."""

    latents: Tensor
    fingerprint: str
    hints: Tensor | None = None

    def batch(self, random: SampleRandom) -> Batch:
        """Captions are worded anew each time."""
        chosen = random.integers(len(self.latents)).tolist()
        if self.hints is None:
            return Batch(self.latents[chosen].float(), scenes.captions(chosen, random))
        texts = scenes.captions(chosen, random, free=True)
        return Batch(self.latents[chosen].float(), texts, self.hints[chosen].float())


def encode_scenes(model: Autoencoder, folder: Path, count: int, draw: Draw = scenes.images) -> SceneLatents:
    """Latents of what `draw` makes of scenes 0 to count - 1, in shards of `folder`.

    Whole shards are kept, so that an interrupted encoding continues where it stopped; damaged ones, and those of
    another auto-encoder or other images, are encoded again.
    """
    source = {"autoencoder": weights_fingerprint(model), "scenes": scenes_fingerprint(draw)}
    starts = tqdm(range(0, count, SHARD), desc=folder.name, leave=False)
    shards = [_shard(model, folder, range(start, min(start + SHARD, count)), draw, source) for start in starts]
    return SceneLatents(torch.cat(shards), " ".join([*source.values(), str(count)]))


def encode_controlled_scenes(model: Autoencoder, folder: Path, count: int) -> SceneLatents:
    """Scenes whose things may stand anywhere, with the control images that were made of them."""
    images = encode_scenes(model, folder / "latents", count, scenes.moved_images)
    hints = encode_scenes(model, folder / "edges", count, scenes.scene_edges)
    fingerprint = f"{images.fingerprint} edges {scenes_fingerprint(scenes.scene_edges)}"
    return SceneLatents(images.latents, fingerprint, hints.latents)


@functools.cache
def scenes_fingerprint(draw: Draw = scenes.images) -> str:
    """Tells apart ways to draw scenes, by some of them; of control images more, as there are more kinds."""
    seeds = range(SAMPLED) if draw is scenes.images else range(0, 20 * SAMPLED, 3)
    pixels = draw(seeds).add(1).mul(127.5).round().byte().movedim(1, -1)
    return hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


@torch.inference_mode()
def latents_of(model: Autoencoder, seeds: Sequence[int], draw: Draw = scenes.images) -> Tensor:
    """Scaled latents [n, 32, 8, 8] in fp16."""
    device = next(model.parameters()).device
    parts = [model.encode(draw(seeds[i : i + BATCH]).to(device)) * SCALE for i in range(0, len(seeds), BATCH)]
    return torch.cat(parts).half().cpu().contiguous()  # as from a file: kernels for another layout round differently


def _shard(model: Autoencoder, folder: Path, seeds: range, draw: Draw, source: Mapping[str, str]) -> Tensor:
    """The latents of these scenes, from their file if that is whole and of the same source."""
    path = folder / f"latents_{seeds.start // SHARD:05d}.safetensors"
    if (latents := stored_latents(path, source, len(seeds))) is not None:
        return latents
    latents = latents_of(model, seeds, draw)
    tensorfile.write(path, {"latents": latents}, source)
    return latents


def stored_latents(path: Path, source: Mapping[str, str], count: int) -> Tensor | None:
    """Those of a file, if it is whole, of this source and as many."""
    if not path.is_file():
        return None
    try:
        file = tensorfile.read(path)
    except tensorfile.CheckpointError as error:
        tqdm.write(f"{error}: encoding it again")
        return None
    latents = file.tensors.get("latents")
    is_same = all(file.metadata.get(name) == value for name, value in source.items())
    return latents if is_same and latents is not None and len(latents) == count else None
