"""Encoding captioned images, or prompts alone, once, into the shards of a latent cache.

Shards of SHARD items are written one by one. On resuming, whole ones are kept and their images are not read; damaged
ones, and those of other items, are encoded again.
"""

import hashlib
import itertools
import json
import operator
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ... import messages
from ...latent import DOWNSCALE, LATENT_CHANNELS
from ...weights import tensorfile
from ..engine.processes import SINGLE_PROCESS, ProcessGroup
from .captioned import cropped, name_left_out
from .latent_cache import LatentCache, Shard
from .pairing import Item

log = messages.logger(__name__)

SHARD = 256  # items
BATCH = 8  # images that are encoded at once
MIB = 2**20


@dataclass(frozen=True)
class Encoders:
    """What makes latents and embeddings.

    image: images [b, 3, h, w] in [-1, 1] -> scaled latents [b, 32, h/32, w/32]. text: captions -> embeddings [n, c].
    sizes: (w, h) to which images are cropped, each to the nearest. control: images, and which of them become scribbles,
    -> control images, both as for `image`, of a ControlNet's dataset. keeps_texts: captions are stored as they are, for
    a text encoder that stays in memory. Without `image` captions alone are encoded, and no image is read.
    """

    image: Callable[[Tensor], Tensor] | None
    text: Callable[[list[str]], list[Tensor]]
    sizes: Sequence[tuple[int, int]]
    control: Callable[[Tensor, Tensor], Tensor] | None = None
    keeps_texts: bool = False


def encode_images(
    items: Iterable[Item],
    folder: Path,
    encoders: Encoders,
    fingerprint: str,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> LatentCache:
    """The cache of these items in a folder, which belongs to one fingerprint: of the encoders and the size.

    Of several processes each makes its share of the shards, in turn, and all wait for the last one. Damaged images are
    left out and counted in the log. Raises ValueError if the folder holds shards of another fingerprint or no image can
    be used, OSError once the first shard shows that the disk has too little space.
    """
    return _Encoding(folder, encoders, fingerprint, processes).run(items)


class _Encoding:
    def __init__(self, folder: Path, encoders: Encoders, fingerprint: str, processes: ProcessGroup):
        self.folder, self.processes = folder, processes
        self.encoders = encoders
        self.fingerprint = fingerprint

    def run(self, items: Iterable[Item]) -> LatentCache:
        self._refuse_others()
        null = self._null()
        expected = operator.length_hint(items)  # 0: not known
        made: list[tuple[Shard | None, list[str]]] = []
        others: dict[int, str] = {}  # shards of other processes, and of which items they are
        count, rank = 0, self.processes.rank
        quiet = True if rank else None
        bar = tqdm(total=expected or None, desc="encoding", unit=" images", disable=quiet)
        with bar, ThreadPoolExecutor() as threads:
            for index, group in enumerate(_in_groups(items, SHARD)):
                count += len(group)
                if index % self.processes.world_size != rank:
                    others[index] = _fingerprint(group)
                    made.append((None, []))
                    bar.update(len(group))
                    continue
                is_first = not any(shard for shard, _ in made)
                made.append(self._shard(self._path(index), group, threads, bar))
                if is_first and made[-1][0]:
                    self._require_space(self._path(index).stat().st_size, -(-expected // SHARD))
        self.processes.wait()
        for index, sources in others.items():
            if (shard := _stored(self._path(index), sources)) is not None:
                made[index] = shard, json.loads(shard.metadata["skipped"])
        shards = [shard for shard, _ in made if shard is not None]
        skipped = [name for _, damaged in made for name in damaged]
        if not shards:
            raise ValueError(f"none of {count} images can be used: {messages.listed(skipped)}")
        name_left_out(f"{len(skipped)} of {count} images are damaged and left out", skipped)
        width, height = self.encoders.sizes[0]
        shape = (LATENT_CHANNELS, height // DOWNSCALE, width // DOWNSCALE)
        return LatentCache(shards, null, self.fingerprint, shape)

    def _refuse_others(self) -> None:
        for path in (*self._paths(), self.folder / "null.safetensors"):
            try:
                with safe_open(path, framework="pt") as file:
                    stored = (file.metadata() or {}).get("fingerprint")
            except (FileNotFoundError, SafetensorError):  # missing or damaged: to be encoded
                continue
            if stored != self.fingerprint:
                raise ValueError(
                    f"{path}: made by another auto-encoder, text encoder or kind of edges, or with other options of "
                    f"images and captions ({stored}, not {self.fingerprint}); choose another --out or delete "
                    f"{self.folder}"
                )

    def _path(self, index: int) -> Path:
        return self.folder / f"shard_{index:05d}.safetensors"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("shard_*.safetensors"))

    def _null(self) -> Tensor:
        path = self.folder / "null.safetensors"
        try:
            caption = tensorfile.read(path).tensors["caption"]
        except (tensorfile.CheckpointError, KeyError):
            caption = self._embed([""])[0]
            tensorfile.write(path, {"caption": caption}, {"fingerprint": self.fingerprint})
        return caption.clone()  # training needs it at any time, and cannot use inference mode's tensors

    def _shard(
        self, path: Path, group: Sequence[Item], threads: ThreadPoolExecutor, bar: tqdm
    ) -> tuple[Shard | None, list[str]]:
        """The shard of these items, found or made, None if all are damaged; and the damaged ones: "name (why)"."""
        sources = _fingerprint(group)
        if (shard := _stored(path, sources)) is not None:
            bar.update(len(group))
            return shard, json.loads(shard.metadata["skipped"])
        tensors, skipped = self._encode(group, threads, bar)
        if not tensors:
            return None, skipped
        metadata = {"fingerprint": self.fingerprint, "sources": sources, "skipped": json.dumps(skipped)}
        tensorfile.write(path, tensors, metadata)
        return Shard(path), skipped

    def _require_space(self, shard_bytes: int, shards: int) -> None:
        needed = shard_bytes * (shards - len(self._paths()))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder}: the other shards need about {needed / MIB:.0f} MiB and {free / MIB:.0f} MiB are "
                "free; make room, or choose another --out"
            )

    # --- making a shard -------------------------------------------------------------------------------

    def _encode(
        self, group: Sequence[Item], threads: ThreadPoolExecutor, bar: tqdm
    ) -> tuple[dict[str, Tensor], list[str]]:
        """A shard's tensors, none if all its images are damaged; and the damaged ones: "name (why)"."""
        if self.encoders.image is None:
            bar.update(len(group))
            return self._captions([item.caption for item in group]), []
        encoded, skipped = [], []
        for batch in _loaded(group, self.encoders.sizes, threads):
            images = [(item, image) for item, image in batch if isinstance(image, Tensor)]
            skipped += [f"{item.name} ({why})" for item, why in batch if isinstance(why, str)]
            for one in self._latents(images):
                if one.latent.isfinite().all() and one.hint.isfinite().all():
                    encoded.append(one)
                else:
                    skipped.append(f"{one.item.name} (the auto-encoder made it NaN or infinite)")
            bar.update(len(batch))
        if not encoded:
            return {}, skipped
        encoded.sort(key=_size)
        return self._stacked(encoded) | self._captions([one.item.caption for one in encoded]), skipped

    def _stacked(self, encoded: Sequence["_Encoded"]) -> dict[str, Tensor]:
        """Latents, and hints if there are any, of each size: see latent_cache.py."""
        tensors = {}
        for (height, width), group in itertools.groupby(encoded, _size):
            of_size = f" {height}x{width}" if len(self.encoders.sizes) > 1 else ""
            latents, hints = zip(*((one.latent, one.hint) for one in group), strict=True)
            tensors[f"latents{of_size}"] = torch.stack(latents)
            if self.encoders.control:
                tensors[f"hints{of_size}"] = torch.stack(hints)
        return tensors

    def _captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        if self.encoders.keeps_texts:
            texts = [torch.frombuffer(bytearray(caption.encode()), dtype=torch.uint8) for caption in captions]
            return {"texts": torch.cat(texts), "lengths": torch.tensor(list(map(len, texts)), dtype=torch.int32)}
        rows = [row for part in _in_groups(captions, BATCH) for row in self._embed(part)]
        return {"captions": torch.cat(rows), "lengths": torch.tensor([len(row) for row in rows], dtype=torch.int32)}

    @torch.no_grad()
    def _latents(self, images: Sequence[tuple[Item, Tensor]]) -> Iterator["_Encoded"]:
        """Those of a batch, size by size. Every second image becomes a scribble, if control images are asked for."""
        encode, control = self.encoders.image, self.encoders.control
        assert encode is not None
        numbered = sorted(enumerate(images), key=lambda pair: pair[1][1].shape)
        for _, group in itertools.groupby(numbered, key=lambda pair: pair[1][1].shape):
            numbers, of_size = zip(*group, strict=True)
            items, pixels = zip(*of_size, strict=True)
            pixels, scribbles = torch.stack(pixels), torch.tensor(numbers) % 2 == 1
            latents = encode(pixels).to("cpu", torch.float16)
            hints = encode(control(pixels, scribbles)).to("cpu", torch.float16) if control else latents
            yield from map(_Encoded, items, latents, hints)

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> list[Tensor]:
        return [row.to("cpu", torch.bfloat16) for row in self.encoders.text(captions)]


class _Encoded(NamedTuple):
    item: Item
    latent: Tensor
    hint: Tensor  # the latent itself, where there are none


def _size(encoded: _Encoded) -> tuple[int, int]:
    """(h, w) of the latent."""
    height, width = encoded.latent.shape[1:]
    return height, width


def _stored(path: Path, sources: str) -> Shard | None:
    """A shard of these items from an earlier run, if it is whole."""
    if not path.is_file():
        return None
    try:
        shard = Shard(path)
    except (SafetensorError, ValueError) as error:
        log.warning("%s: truncated or damaged (%s): encoding it again", path, error)
        return None
    if shard.metadata.get("sources") != sources:
        log.warning("%s: of other images or captions: encoding it again", path)
        return None
    return shard


def _fingerprint(group: Sequence[Item]) -> str:
    text = json.dumps([(item.name, item.caption) for item in group])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _in_groups(things: Iterable, size: int) -> Iterator[list]:
    rest = iter(things)
    while group := list(itertools.islice(rest, size)):
        yield group


def _loaded(
    group: Sequence[Item], sizes: Sequence[tuple[int, int]], threads: ThreadPoolExecutor
) -> Iterator[list[tuple[Item, Tensor | str]]]:
    """Batches of items with their images, or why there is none; while one is in use the next is being read."""
    batches = list(_in_groups(group, BATCH))
    load = partial(_load, sizes=sizes)
    following = threads.map(load, batches[0])
    for batch, after in zip(batches, [*batches[1:], []], strict=True):
        images, following = following, threads.map(load, after)
        yield list(zip(batch, images, strict=True))


def _load(item: Item, sizes: Sequence[tuple[int, int]]) -> Tensor | str:
    """[3, h, w], or what is wrong with the image."""
    try:
        with item.load() as image:
            return cropped(image, sizes)
    except UnidentifiedImageError:  # its text has an address in memory
        return "not an image"
    except Exception as error:  # on damaged input Pillow's decoders raise anything, SyntaxError included
        return str(error).partition("\n")[0] or type(error).__name__
