"""Which rows lie in which shard, and which of them are made together: a function of the rows alone.

A shard has consecutive rows, so that a run can stop between any two. Images of one batch have one size and one
number of steps; and what is in a batch changes the last bits of its images, since kernels round by it.
"""

import hashlib
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from .rows import Row, Spool

SHARDS = 64  # as many as there should be at least, so that several workers share them
MOST_ROWS = 512  # of a shard, unless it is asked for: 100 to 200 MB of 1024 px JPEGs


def bucket(row: Row) -> Hashable:
    """What rows of one batch have in common."""
    present = (row.negative is not None, row.image is not None, row.control is not None)
    return row.width, row.height, row.steps, row.guidance, present


def batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """At most `size` rows each of one bucket, in the rows' order; buckets in that of their first rows."""
    buckets: dict[Hashable, list[Row]] = {}
    for row in rows:
        buckets.setdefault(bucket(row), []).append(row)
    return [of_one[i : i + size] for of_one in buckets.values() for i in range(0, len(of_one), size)]


def default_shard_rows(rows: int, buckets: int, batch: int) -> int:
    """Rows of a shard: whole batches, of each bucket one, `SHARDS` shards, and not above `MOST_ROWS`."""
    wanted = min(max(math.ceil(rows / SHARDS), batch * buckets), max(MOST_ROWS, batch))
    return math.ceil(wanted / batch) * batch


@dataclass
class Plan:
    """All rows, cut into shards of `shard_rows`. digest: of all that the rows say."""

    spool: Spool
    digest: str
    shard_rows: int
    batch: int
    numbers: range = field(init=False)

    def __post_init__(self) -> None:
        self.numbers = range(math.ceil(len(self.spool) / self.shard_rows))

    def rows(self, shard: int) -> list[Row]:
        """The rows of a shard."""
        return self.spool.rows(shard * self.shard_rows, (shard + 1) * self.shard_rows)

    def count(self, shards: Iterable[int]) -> int:
        """How many rows these shards have."""
        last = len(self.spool) - (len(self.numbers) - 1) * self.shard_rows
        return sum(last if shard == len(self.numbers) - 1 else self.shard_rows for shard in shards)


def make(rows: Iterable[Row], batch: int, shard_rows: int | None) -> Plan:
    """Read all rows, which raises what is wrong with any. Raises ValueError, OSError."""
    spool, digest, buckets = Spool(), hashlib.sha256(), set()
    for row in rows:
        digest.update(spool.append(row) + b"\n")
        buckets.add(bucket(row))
    return Plan(spool, digest.hexdigest(), shard_rows or default_shard_rows(len(spool), len(buckets), batch), batch)
