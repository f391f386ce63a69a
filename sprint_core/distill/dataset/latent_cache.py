"""Captioned pictures as training reads them: encoded once into shards, which are mapped instead of loaded.

Items -> shard_00000.safetensors, ...: latents (fp16), caption embeddings (bf16) in one row, their lengths;
for a ControlNet also the latents of control images
"""

import bisect
import hashlib
import itertools
import json
import logging
import operator
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ...weights import tensorfile
from ..engine.randomness import SampleRandom
from .batch import Batch
from .captioned import Item, listed, square

log = logging.getLogger(__name__)

SHARD = 256  # items
BATCH = 8  # pictures that are encoded at once
MIB = 2**20


class _Shard:
    """One whole file, mapped: rows are read when they are asked for. Raises SafetensorError, ValueError."""

    def __init__(self, path: Path):
        file = safe_open(path, framework="pt")
        self.metadata = file.metadata() or {}
        self.latents, self.captions = file.get_slice("latents"), file.get_slice("captions")
        self.hints = file.get_slice("hints") if "hints" in file.keys() else None  # noqa: SIM118
        self.starts = [0, *file.get_tensor("lengths").cumsum(0).tolist()]
        if (self.latents.get_shape()[0], self.captions.get_shape()[0]) != (len(self), self.starts[-1]):
            raise ValueError("its tensors do not belong together")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, i: int) -> tuple[Tensor, Tensor]:
        """A latent [32, h, w] in fp32 and a caption's embedding [n, c]."""
        return self.latents[i].float(), self.captions[self.starts[i] : self.starts[i + 1]]

    def hint(self, i: int) -> Tensor:
        """The latent of its control image [32, h, w] in fp32."""
        return self.hints[i].float()


class EncodedPictures:
    """Latents and caption embeddings of pictures, in a folder that belongs to one `fingerprint`.

    fingerprint: names the encoders and the size. Shards of SHARD items are written one by one; on resuming, whole
    ones are kept and their pictures are not read, damaged ones and those of other items are made anew. The
    encoders are not kept. Damaged pictures are left out and counted in the log. Raises ValueError if the folder
    holds another fingerprint's shards or no picture is whole, OSError once the first shard shows that the disk has
    too little space.
    """

    def __init__(
        self,
        items: Iterable[Item],
        folder: Path,
        encode_image: Callable[[Tensor], Tensor],  # [b, 3, px, px] in [-1, 1] -> scaled latents [b, 32, h, w]
        encode_text: Callable[[list[str]], list[Tensor]],  # captions -> embeddings [n_i, c]
        px: int,
        fingerprint: str,
        control: Callable[[Tensor], Tensor] | None = None,  # pictures -> control images, both [b, 3, px, px]
    ):
        self.folder, self.fingerprint = Path(folder), fingerprint
        self._refuse_others()
        encoders = _Encoders(encode_image, encode_text, px, control)
        self.controlled = control is not None
        self.null = self._null(encoders)  # [n, c], of the empty caption
        self._shards: list[_Shard] = []
        self._fill(items, encoders)
        self._ends = list(itertools.accumulate(map(len, self._shards)))
        self.count = self._ends[-1]

    def batch(self, random: SampleRandom) -> Batch:
        """Latents [b, 32, h, w] in fp32, b caption embeddings [n_i, c], and of control images the latents."""
        places = [self._place(i) for i in random.integers(self.count)]
        latents, captions = zip(*(shard.row(i) for shard, i in places))
        hints = torch.stack([shard.hint(i) for shard, i in places]) if self.controlled else None
        return Batch(torch.stack(latents), captions, hints)

    def _place(self, i: int) -> tuple[_Shard, int]:
        shard = bisect.bisect_right(self._ends, i)
        return self._shards[shard], i - (self._ends[shard - 1] if shard else 0)

    def _refuse_others(self) -> None:
        for path in (*self._paths(), self.folder / "null.safetensors"):
            try:
                with safe_open(path, framework="pt") as file:
                    found = (file.metadata() or {}).get("fingerprint")
            except (FileNotFoundError, SafetensorError):  # missing or damaged: to be encoded
                continue
            if found != self.fingerprint:
                raise ValueError(
                    f"{path}: made by another auto-encoder, text encoder or kind of edges ({found}, not "
                    f"{self.fingerprint}); choose another --out or delete {self.folder}"
                )

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("shard_*.safetensors"))

    def _null(self, encoders: "_Encoders") -> Tensor:
        path = self.folder / "null.safetensors"
        try:
            caption = tensorfile.read(path).tensors["caption"]
        except (tensorfile.CheckpointError, KeyError):
            caption = encoders.embed([""])[0]
            tensorfile.write(path, {"caption": caption}, {"fingerprint": self.fingerprint})
        return caption.clone()  # training needs it at any time, and cannot use inference mode's tensors

    def _fill(self, items: Iterable[Item], encoders: "_Encoders") -> None:
        """Find or make all shards."""
        expected, count, skipped = operator.length_hint(items), 0, []  # 0: not known
        bar = tqdm(total=expected or None, desc="encoding", unit=" images", disable=None)
        with bar, ThreadPoolExecutor() as threads:
            for index, group in enumerate(_in_groups(items, SHARD)):
                path = self.folder / f"shard_{index:05d}.safetensors"
                shard, bad = self._shard(path, group, encoders, threads, bar)
                count, skipped = count + len(group), skipped + bad
                if shard is not None:
                    self._shards.append(shard)
                    if len(self._shards) == 1:
                        self._require_space(path.stat().st_size, -(-expected // SHARD))
        if not self._shards:
            raise ValueError(f"none of {count} images can be used: {listed(skipped)}")
        if skipped:
            log.warning("%d of %d images are damaged and left out: %s", len(skipped), count, listed(skipped))

    def _shard(
        self, path: Path, group: Sequence[Item], encoders: "_Encoders", threads: ThreadPoolExecutor, bar: tqdm
    ) -> tuple[_Shard | None, list[str]]:
        """The shard of these items, found or made, None if all are damaged; and the damaged ones: "name (why)"."""
        sources = _hash(group)
        if (shard := _stored(path, sources)) is not None:
            bar.update(len(group))
            return shard, json.loads(shard.metadata["skipped"])
        tensors, skipped = encoders.encode(group, threads, bar)
        if not tensors:
            return None, skipped
        about = {"fingerprint": self.fingerprint, "sources": sources, "skipped": json.dumps(skipped)}
        tensorfile.write(path, tensors, about)
        return _Shard(path), skipped

    def _require_space(self, shard_bytes: int, shards: int) -> None:
        needed = shard_bytes * (shards - len(self._paths()))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder}: the other shards need about {needed / MIB:.0f} MiB and {free / MIB:.0f} MiB are "
                "free; make room, or choose another --out"
            )


# --- making a shard ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoders:
    image: Callable[[Tensor], Tensor]
    text: Callable[[list[str]], list[Tensor]]
    px: int
    control: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def encode(
        self, group: Sequence[Item], threads: ThreadPoolExecutor, bar: tqdm
    ) -> tuple[dict[str, Tensor], list[str]]:
        """A shard's tensors, none if all its pictures are damaged; and the damaged ones: "name (why)"."""
        latents, hints, captions, skipped = [], [], [], []
        for batch in _loaded(group, self.px, threads):
            whole = [(item, picture) for item, picture in batch if isinstance(picture, Tensor)]
            skipped += [f"{item.name} ({why})" for item, why in batch if isinstance(why, str)]
            for (item, _), latent, hint in zip(whole, *self._latents([picture for _, picture in whole])):
                if latent.isfinite().all() and hint.isfinite().all():
                    latents.append(latent)
                    hints.append(hint)
                    captions.append(item.caption)
                else:
                    skipped.append(f"{item.name} (the auto-encoder made it NaN or infinite)")
            bar.update(len(batch))
        if not latents:
            return {}, skipped
        rows = [row for some in _in_groups(captions, BATCH) for row in self.embed(some)]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        tensors = {"latents": torch.stack(latents), "captions": torch.cat(rows), "lengths": lengths}
        return tensors | ({"hints": torch.stack(hints)} if self.control else {}), skipped

    def _latents(self, pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Of pictures and of their control images, if there are any; else of the pictures twice."""
        if not pictures:
            return torch.empty(0), torch.empty(0)
        pixels = torch.stack(pictures)
        latents = self.image(pixels).to("cpu", torch.float16)
        return latents, self.image(self.control(pixels)).to("cpu", torch.float16) if self.control else latents

    @torch.no_grad()
    def embed(self, captions: list[str]) -> list[Tensor]:
        return [row.to("cpu", torch.bfloat16) for row in self.text(captions)]


def _stored(path: Path, sources: str) -> _Shard | None:
    """A shard of these items from an earlier run, if it is whole."""
    if not path.is_file():
        return None
    try:
        shard = _Shard(path)
    except (SafetensorError, ValueError) as error:
        log.warning("%s: truncated or damaged (%s): encoding it again", path, error)
        return None
    if shard.metadata.get("sources") != sources:
        log.warning("%s: of other pictures or captions: encoding it again", path)
        return None
    return shard


def _hash(group: Sequence[Item]) -> str:
    text = json.dumps([(item.name, item.caption) for item in group])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _in_groups(things: Iterable, size: int) -> Iterator[list]:
    rest = iter(things)
    while group := list(itertools.islice(rest, size)):
        yield group


def _loaded(group: Sequence[Item], px: int, threads: ThreadPoolExecutor) -> Iterator[list[tuple[Item, Tensor | str]]]:
    """Batches of items with their pictures, or why there is none; while one is in use the next is being read."""
    batches = list(_in_groups(group, BATCH))
    load = partial(_load, px=px)
    following = threads.map(load, batches[0])
    for batch, after in zip(batches, [*batches[1:], []]):
        pictures, following = following, threads.map(load, after)
        yield list(zip(batch, pictures))


def _load(item: Item, px: int) -> Tensor | str:
    """[3, px, px], or what is wrong with the picture."""
    try:
        with item.load() as image:
            return square(image, px)
    except UnidentifiedImageError:  # its text has an address in memory
        return "not an image"
    except Exception as error:  # on damaged input Pillow's decoders raise anything, SyntaxError included
        return str(error).partition("\n")[0] or type(error).__name__
