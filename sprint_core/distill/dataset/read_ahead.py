"""Batches that are read from a disk by a thread, while the step before computes.

They are the same in the same order as without it: which samples a batch has follows from its numbers alone. For a GPU
the thread also copies them there, from pinned memory, on a stream of its own.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..engine.randomness import SampleRandom
from .batch import Batch, Dataset

AHEAD = 2  # batches: one that waits to be taken, and one that is being read


class Brought(NamedTuple):
    """A batch in memory. copied: when its tensors, sent, are on the GPU."""

    batch: Batch
    sent: list[Tensor]
    copied: torch.cuda.Event | None


class ReadAhead:
    """read: makes a batch of numbers. asked: those of all batches to come, in their order."""

    def __init__(self, read: Callable[[SampleRandom], Batch], asked: Iterator[SampleRandom], device: torch.device):
        self._read, self._asked = read, asked
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reading ahead")
        self._coming: deque[tuple[SampleRandom, Future[Brought]]] = deque()
        for _ in range(AHEAD):
            self._begin_next()

    def take(self, random: SampleRandom) -> Batch:
        """The next batch, which must be that of these numbers. Raises what reading it raised."""
        expected, future = self._coming.popleft()
        self._begin_next()
        assert (expected.key, expected.samples) == (random.key, random.samples), "batches are read in another order"
        batch, sent, copied = future.result()
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in sent:
                tensor.record_stream(stream)  # its memory was the other stream's
        return batch

    def close(self) -> None:
        """End the thread, once it has read what it is reading."""
        self._thread.shutdown(cancel_futures=True)

    def _begin_next(self) -> None:
        if (random := next(self._asked, None)) is not None:
            self._coming.append((random, self._thread.submit(self._bring, random)))

    def _bring(self, random: SampleRandom) -> Brought:
        with torch.cuda.stream(self._stream):  # without one it does nothing
            batch, sent = self._in_memory(self._read(random))
            copied = None if self._stream is None else torch.cuda.Event()
            if copied is not None:
                copied.record()
        return Brought(batch, sent, copied)

    def _in_memory(self, batch: Batch) -> tuple[Batch, list[Tensor]]:
        """Read what is a view of a file, and send it to the device; and what was sent."""
        sent: list[Tensor] = []

        def send(tensor: Tensor) -> Tensor:
            if self._stream is not None:
                tensor = tensor.pin_memory().to(self._device, non_blocking=True)
            sent.append(tensor)
            return tensor

        captions = batch.captions
        rows = [caption for caption in captions if isinstance(caption, Tensor)] if isinstance(captions, list) else []
        if rows:
            captions = send(torch.cat(rows)).split([len(row) for row in rows])
        hints = None if batch.hints is None else send(batch.hints)
        return replace(batch, latents=send(batch.latents), captions=captions, hints=hints), sent


@runtime_checkable
class ReadsAhead(Protocol):
    """A dataset that lies on a disk."""

    def reading_ahead(
        self, randoms: Iterator[SampleRandom], device: torch.device
    ) -> contextlib.AbstractContextManager: ...


def reading_ahead(
    dataset: Dataset, randoms: Iterator[SampleRandom], device: torch.device
) -> contextlib.AbstractContextManager:
    """While it is open, a dataset on a disk reads the batches of these numbers ahead; others are in memory."""
    return dataset.reading_ahead(randoms, device) if isinstance(dataset, ReadsAhead) else contextlib.nullcontext()
