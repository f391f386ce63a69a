"""One worker: shard after shard, whose text, steps and files are made at the same time.

a thread encodes the text of the next batch
this thread runs steps and decoding of this one       and writes what the third has made
threads make JPEGs of the last one
"""

import collections
import concurrent.futures
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from . import plan
from .folder import Claims, Folder, Shard
from .generate import Generate, Painted, Prepared
from .rows import Row

PACKERS = 4  # threads that make image files
WAITING = 2  # batches that may wait for their files


class Pool(Protocol):
    """Where work goes, now or later."""

    def submit(self, function: Callable, /, *args: Any) -> concurrent.futures.Future: ...
    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None: ...


class Inline:
    """Does all work at once: one after another."""

    def submit(self, function: Callable, /, *args: Any) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


@dataclass
class _Batch:
    shard: Shard
    rows: list[Row]
    last: bool  # of its shard


@dataclass(frozen=True)
class Report:
    """Of one batch."""

    images: int
    failed: int


def work(
    generate: Generate,
    folder: Folder,
    shards: Iterator[tuple[int, list[Row]]],
    report: Callable[[Report], None],
    overlap: bool = True,
) -> None:
    """Make all shards that nobody else makes. report: called after each batch; may raise to stop.

    overlap: False does one after another. Raises ValueError, OSError.
    """
    claims, text, packers = Claims(folder), _pool(1, overlap), _pool(PACKERS, overlap)
    waiting: collections.deque[tuple[_Batch, Painted, list[concurrent.futures.Future]]] = collections.deque()
    limit = WAITING if overlap else 0
    stops = [time.monotonic()]  # when a shard was published, for its seconds

    def finish() -> None:
        batch, painted, files = waiting.popleft()
        batch.shard.failures += painted.failures
        for row, image, made in zip(painted.rows, painted.images, files, strict=True):
            batch.shard.add(row.id, made.result(), image.tobytes())
        if batch.last:
            stops.append(time.monotonic())
            batch.shard.publish(stops[-1] - stops[-2])

    try:
        batches = _batches(generate, folder, claims, shards)
        for batch, prepared in _one_ahead(text, generate, batches):
            painted = generate.paint(prepared)
            files = [packers.submit(generate.pack, *pair) for pair in zip(painted.rows, painted.images, strict=True)]
            waiting.append((batch, painted, files))
            report(Report(len(painted.rows), len(painted.failures)))
            while len(waiting) > limit:
                finish()
        while waiting:
            finish()
    finally:
        for pool in (text, packers):
            pool.shutdown(cancel_futures=True)
        claims.close()


def _batches(
    generate: Generate, folder: Folder, claims: Claims, shards: Iterator[tuple[int, list[Row]]]
) -> Iterator[_Batch]:
    for number, rows in shards:
        if claims.take(number) and not folder.is_done(number):  # another process may have made it since we looked
            shard = Shard(folder, number, generate.settings.image_format)
            cut = plan.batches(rows, generate.settings.batch)
            for i, of_one in enumerate(cut):
                yield _Batch(shard, of_one, last=i == len(cut) - 1)


def _one_ahead(pool: Pool, generate: Generate, batches: Iterator[_Batch]) -> Iterator[tuple[_Batch, Prepared]]:
    """Batches and their texts; those of the next one are encoded meanwhile."""
    before = None
    for batch in batches:
        ahead = batch, pool.submit(generate.prepare, batch.rows)
        if before:
            yield before[0], before[1].result()
        before = ahead
    if before:
        yield before[0], before[1].result()


def _pool(threads: int, overlap: bool) -> Pool:
    return concurrent.futures.ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) if overlap else Inline()
