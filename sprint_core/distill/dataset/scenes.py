"""What the stages are trained on: procedural scenes as images, and as latents that are encoded once."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...images import edges
from ...latent import SCALE
from ...models import hed
from ...models.autoencoder import Autoencoder
from ...shapes import examples, scenes
from ...weights import tensorfile
from ..engine.randomness import SampleRandom
from .batch import Batch

SHARD = 1000  # scenes
BATCH = 50
CAPTION_SEEDS = 2**31
SAMPLED = 16  # scenes that stand for all of them


def images(seeds: Sequence[int], split: str = "train") -> Tensor:
    """Renders of the scenes with these seeds: [b, 3, 256, 256] in [-1, 1]."""
    return pixels_of([scenes.render(examples.scene_and_caption(seed, split)[0]) for seed in seeds])


def captions(seeds: Sequence[int], random: SampleRandom, free: bool = False) -> list[str]:
    """A caption of each of the (free) training scenes with these seeds, worded anew each time."""
    drawn = zip(seeds, random.integers(CAPTION_SEEDS))
    return [examples.another_caption(_scene(i, free), seed, free) for i, seed in drawn]


@functools.cache
def _scene(seed: int, free: bool) -> scenes.Scene:
    """Kept, since drawing one takes longer than wording it."""
    return examples.scene_and_caption(seed, free=free)[0]


def weights_fingerprint(model: nn.Module) -> str:
    """Identifies a model by its weights."""
    return tensorfile.hash_of(model.state_dict())


def scenes_fingerprint(draw: Callable[..., Tensor] = images) -> str:
    """Identifies how scenes are drawn, by some of them; of control images more, as there are more kinds."""
    pixels = (
        draw(range(SAMPLED) if draw is images else range(0, 20 * SAMPLED, 3))
        .add(1)
        .mul(127.5)
        .round()
        .byte()
        .movedim(1, -1)
    )
    return hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def control_images(pictures: Tensor, hed: hed.HED | None = None) -> Tensor:
    """Soft edges of the even ones, scribbles of the odd: [b, 3, h, w] in [-1, 1], as users will give either."""
    images = (pictures.movedim(1, -1) + 1) / 2
    drawn = torch.empty_like(images)
    for first, scribble in ((0, False), (1, True)):
        if first < len(images):
            drawn[first::2] = edges.detect(images[first::2], hed, scribble)
    return drawn.movedim(-1, 1) * 2 - 1


def drawn_anywhere(seeds: Sequence[int]) -> Tensor:
    """Renders of free scenes, [b, 3, 256, 256] in [-1, 1]: in every second pair things stand off the nine places.

    Those are for captions; who draws, draws anywhere.
    """
    return pixels_of([scenes.render(_scene(seed, True), moved=_moved(seed)) for seed in seeds])


def scene_edges(seeds: Sequence[int]) -> Tensor:
    """Control images of these, [b, 3, 256, 256] in [-1, 1]: in every fourth group of four some things are missing.

    So that the network learns to place what is not drawn, and an empty sheet is no order.
    """
    pictures = []
    for seed in seeds:
        scene, moved = _scene(seed, True), _moved(seed)
        if seed // 4 % 4 == 3:
            kept = [i for i in range(len(scene.things)) if (seed // 16 >> i) % 2]
            moved = [moved[i] for i in kept] if moved else ()
            scene = dataclasses.replace(scene, things=tuple(scene.things[i] for i in kept))
        pictures.append(scenes.render(scene, moved=moved))
    return control_images(pixels_of(pictures))


def _moved(seed: int) -> Sequence[tuple[int, int]]:
    return scenes.moves(_scene(seed, True), seed) if seed // 2 % 2 else ()


def pixels_of(pictures: Iterable[np.ndarray]) -> Tensor:
    """[h, w, 3] uint8 each -> [b, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.stack(list(pictures))).movedim(-1, 1).float().div_(127.5).sub_(1.0)


class SceneLatents:
    """Scaled latents of scenes 0 to count - 1, encoded once into shards of `folder`.

    Shards of another auto-encoder, or damaged ones, are made anew; whole ones are kept, so that an
    interrupted encoding goes on where it stopped. draw: what is encoded of the scenes with some seeds.
    """

    def __init__(self, model: Autoencoder, folder: Path, count: int, draw: Callable[..., Tensor] = images):
        self.folder, self.count, self.draw = Path(folder), count, draw
        self.shard_of = {"autoencoder": weights_fingerprint(model), "scenes": scenes_fingerprint(draw)}
        self.fingerprint = " ".join([*self.shard_of.values(), str(count)])
        name = self.folder.name
        shards = [self._shard(model, start) for start in tqdm(range(0, count, SHARD), desc=name, leave=False)]
        self.latents = torch.cat(shards)

    def batch(self, random: SampleRandom) -> Batch:
        """Latents [b, 32, 8, 8] and captions, each time worded anew."""
        chosen = random.integers(self.count)
        return Batch(self.latents[chosen].float(), captions(chosen, random))

    def _shard(self, model: Autoencoder, start: int) -> Tensor:
        path = self.folder / f"latents_{start // SHARD:05d}.safetensors"
        if path.is_file():
            try:
                file = tensorfile.read(path)
                latents = file.tensors.get("latents", ())
                same = all(file.metadata.get(name) == value for name, value in self.shard_of.items())
                if same and len(latents) == min(SHARD, self.count - start):
                    return latents
            except tensorfile.CheckpointError as error:
                tqdm.write(f"{error}: encoding it again")
        latents = encode_scenes(model, range(start, min(start + SHARD, self.count)), self.draw)
        tensorfile.write(path, {"latents": latents}, self.shard_of)
        return latents


class ControlledScenes:
    """Scenes with the control images that were made of them."""

    def __init__(self, model: Autoencoder, folder: Path, count: int):
        self.scenes = SceneLatents(model, folder / "latents", count, drawn_anywhere)
        self.hints = SceneLatents(model, folder / "edges", count, scene_edges).latents
        self.fingerprint = f"{self.scenes.fingerprint} edges {scenes_fingerprint(scene_edges)}"

    def batch(self, random: SampleRandom) -> Batch:
        """Latents [b, 32, 8, 8], captions, and the control images' latents."""
        chosen = random.integers(self.scenes.count)
        texts = captions(chosen, random, free=True)
        return Batch(self.scenes.latents[chosen].float(), texts, self.hints[chosen].float())


@torch.inference_mode()
def encode_scenes(model: Autoencoder, seeds: Sequence[int], draw: Callable[..., Tensor] = images) -> Tensor:
    """Scaled latents [n, 32, 8, 8] in fp16."""
    device = next(model.parameters()).device
    parts = [model.encode(draw(seeds[i : i + BATCH]).to(device)) * SCALE for i in range(0, len(seeds), BATCH)]
    return torch.cat(parts).half().cpu().contiguous()  # as from a file: kernels for another layout round differently
