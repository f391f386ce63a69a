"""Captioned images as training reads them: shards of latents and caption embeddings, mapped instead of loaded.

shard_00000.safetensors, ...: latents (fp16), caption embeddings (bf16) in one row, their lengths; for a ControlNet
also hints, the latents of control images; of prompts without images no latents. encoding.py makes them.
"""

import bisect
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

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
        self._captions = file.get_slice("captions")
        others = {name: file.get_slice(name) for name in ("latents", "hints") if name in file.keys()}  # noqa: SIM118
        self._latents, self._hints = others.get("latents"), others.get("hints")
        self._starts = [0, *file.get_tensor("lengths").cumsum(0).tolist()]
        counts = {len(self)} if self._latents is None else {len(self), self._latents.get_shape()[0]}
        if counts != {len(self)} or self._captions.get_shape()[0] != self._starts[-1]:
            raise ValueError("its tensors do not belong together")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def latent(self, i: int) -> Tensor | None:
        """[32, h, w] in fp32; None of a prompt without an image."""
        return None if self._latents is None else self._latents[i].float()

    def caption(self, i: int) -> Tensor:
        """An embedding [n, c]."""
        return self._captions[self._starts[i] : self._starts[i + 1]]

    def hint(self, i: int) -> Tensor | None:
        """The latent of the control image, [32, h, w] in fp32."""
        return None if self._hints is None else self._hints[i].float()


class LatentCache:
    """Latents and caption embeddings of all shards. null: the embedding [n, c] of the empty caption.

    shape: of the latents of prompts without images, which are zero.
    """

    def __init__(self, shards: Sequence[Shard], null: Tensor, fingerprint: str, shape: tuple[int, ...] = ()):
        self.null, self.fingerprint, self.shape = null, fingerprint, shape
        self._ahead: ReadAhead | None = None
        self._shards = shards
        self._ends = list(itertools.accumulate(map(len, shards)))

    def __len__(self) -> int:
        return self._ends[-1]

    def batch(self, random: SampleRandom) -> Batch:
        """Latents in fp32, caption embeddings as they are stored; on the device, if read ahead for it."""
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
        rows = [self._row(i) for i in random.integers(len(self)).tolist()]
        hints = [hint for shard, i in rows if (hint := shard.hint(i)) is not None]
        latents = [latent for shard, i in rows if (latent := shard.latent(i)) is not None]
        stacked = torch.stack(latents) if latents else torch.zeros(len(rows), *self.shape)
        return Batch(stacked, [shard.caption(i) for shard, i in rows], torch.stack(hints) if hints else None)

    def _row(self, i: int) -> tuple[Shard, int]:
        """The shard of image i, and its place there."""
        number = bisect.bisect_right(self._ends, i)
        return self._shards[number], i - (self._ends[number - 1] if number else 0)
