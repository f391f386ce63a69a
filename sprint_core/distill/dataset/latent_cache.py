"""Captioned images as training reads them: shards of latents and caption embeddings, mapped instead of loaded.

shard_00000.safetensors, ...: latents (fp16), caption embeddings (bf16) in one row, their lengths; or of captions that
are encoded batch by batch their texts (UTF-8) in one row, and lengths; for a ControlNet also hints, the latents of
control images; of prompts without images no latents. Images of several sizes are sorted by size, and the latents of
each are a tensor, such as "latents 22x42". A batch holds images of one size. encoding.py makes the shards.
"""

import bisect
import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..engine.randomness import SampleRandom
from .batch import Batch
from .read_ahead import ReadAhead


class Shard:
    """One whole file, mapped: rows are read when they are asked for. Raises SafetensorError, ValueError."""

    def __init__(self, path: Path):
        file = safe_open(path, framework="pt")
        self.metadata = file.metadata() or {}
        self._has_texts = "texts" in file.keys()  # noqa: SIM118
        self._captions = file.get_slice("texts" if self._has_texts else "captions")
        self._latents, self._hints = _of_sizes(file, "latents"), _of_sizes(file, "hints")
        self._starts = [0, *file.get_tensor("lengths").cumsum(0).tolist()]
        counts = [part.get_shape()[0] for part in self._latents]
        self._ends = list(itertools.accumulate(counts)) or [len(self)]
        if self._ends[-1] != len(self) or self._captions.get_shape()[0] != self._starts[-1]:
            raise ValueError("its tensors do not belong together")

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def sizes(self) -> dict[tuple[int, ...], range]:
        """(h, w) of latents, and the rows that are of this size; () for prompts without images."""
        shapes = [tuple(part.get_shape()[2:]) for part in self._latents] or [()]
        starts = [0, *self._ends]
        return {shape: range(*rows) for shape, rows in zip(shapes, itertools.pairwise(starts), strict=True)}

    def latent(self, i: int) -> Tensor | None:
        """[32, h, w] in fp32; None of a prompt without an image."""
        return self._row(self._latents, i)

    def caption(self, i: int) -> Tensor | str:
        """An embedding [n, c], or the text."""
        row = self._captions[self._starts[i] : self._starts[i + 1]]
        return row.numpy().tobytes().decode() if self._has_texts else row

    def hint(self, i: int) -> Tensor | None:
        """The latent of the control image, [32, h, w] in fp32."""
        return self._row(self._hints, i)

    def _row(self, of_sizes: Sequence[Any], i: int) -> Tensor | None:
        if not of_sizes:
            return None
        number, row = _place(self._ends, i)
        return of_sizes[number][row].float()


def _of_sizes(file: Any, name: str) -> list[Any]:
    """The tensors of that name in an open file, one for each size, by size."""
    parts = [file.get_slice(key) for key in file.keys() if key.partition(" ")[0] == name]  # noqa: SIM118
    return sorted(parts, key=lambda part: part.get_shape()[2:])


def _place(ends: Sequence[int], i: int) -> tuple[int, int]:
    """Which part holds i, and its place there, of parts in a row that end before these."""
    number = bisect.bisect_right(ends, i)
    return number, i - (ends[number - 1] if number else 0)


class _OneSize:
    """Rows of shards whose latents are of one size."""

    def __init__(self, parts: Sequence[tuple[Shard, range]]):
        self._parts = parts
        self._ends = list(itertools.accumulate(len(rows) for _, rows in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> tuple[Shard, int]:
        """A shard, and a row in it."""
        number, place = _place(self._ends, i)
        shard, rows = self._parts[number]
        return shard, rows[place]


class LatentCache:
    """Latents and caption embeddings of all shards. null: the embedding [n, c] of the empty caption.

    shape: of the latents of prompts without images, which are zero.
    """

    def __init__(self, shards: Sequence[Shard], null: Tensor, fingerprint: str, shape: tuple[int, ...] = ()):
        self.null, self.fingerprint, self.shape = null, fingerprint, shape
        self._ahead: ReadAhead | None = None
        parts: dict[tuple[int, ...], list[tuple[Shard, range]]] = {}
        for shard in shards:
            for size, rows in shard.sizes.items():
                parts.setdefault(size, []).append((shard, rows))
        self._sizes = [_OneSize(parts[size]) for size in sorted(parts)]
        self._ends = list(itertools.accumulate(map(len, self._sizes)))

    def __len__(self) -> int:
        return self._ends[-1]

    def of_one_size(self) -> "LatentCache":
        """Only those of the size that most images have."""
        twin = copy.copy(self)
        twin._sizes = [max(self._sizes, key=len)]
        twin._ends = [len(twin._sizes[0])]
        return twin

    def batch(self, random: SampleRandom) -> Batch:
        """Latents in fp32, caption embeddings or texts as they are stored; on the device, if read ahead for it.

        All are of one size, the same in all processes, of which each image is as likely.
        """
        chosen = random.of_data()
        return self._read(chosen) if self._ahead is None else self._ahead.take(chosen)

    @contextlib.contextmanager
    def reading_ahead(self, randoms: Iterator[SampleRandom], device: torch.device) -> Iterator[None]:
        """While it is open, a thread reads the batches of these numbers, which must be asked for in their order."""
        self._ahead = ReadAhead(self._read, (random.of_data() for random in randoms), device)
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = None

    def _read(self, random: SampleRandom) -> Batch:
        number, _ = _place(self._ends, random.shared(len(self)))
        images = self._sizes[number]
        rows = [images[i] for i in random.integers(len(images)).tolist()]
        hints = [hint for shard, i in rows if (hint := shard.hint(i)) is not None]
        latents = [latent for shard, i in rows if (latent := shard.latent(i)) is not None]
        stacked = torch.stack(latents) if latents else torch.zeros(len(rows), *self.shape)
        captions: Any = [shard.caption(i) for shard, i in rows]  # texts of all, or of none
        return Batch(stacked, captions, torch.stack(hints) if hints else None)
