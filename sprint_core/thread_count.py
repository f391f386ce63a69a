"""How many of torch's threads paint a frame soonest: all of them, or one.

A small network's parallel regions end sooner than threads wake, above all on a busy machine; a large one needs them
all. Which is which is for the machine to say: both are tried on frames of a kind, and the faster one stays.
"""

from collections import defaultdict, deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

TRIES = 2  # of each count, before one is chosen
REMEMBERED = 5  # timings of a count; its best is compared
AGAIN = 40  # frames, after which the slower count is tried once more: a machine does not stay busy


class FastestThreads:
    """Counts of threads by their timings, for each kind of frame apart."""

    def __init__(self) -> None:
        self.counts = sorted({1, torch.get_num_threads()})
        self._timings: dict[Hashable, dict[int, deque[float]]] = defaultdict(
            lambda: {count: deque(maxlen=REMEMBERED) for count in self.counts}
        )
        self._begun: dict[Hashable, dict[int, int]] = defaultdict(lambda: dict.fromkeys(self.counts, 0))
        self._frames: dict[Hashable, int] = defaultdict(int)

    def choice(self, kind: Hashable) -> int:
        """With how many threads to paint the next frame of a kind."""
        timings, begun = self._timings[kind], self._begun[kind]
        untried = [count for count in self.counts if begun[count] < TRIES or not timings[count]]
        if untried:  # in turn: a count whose frames are all given up must not keep its turn
            choice = min(untried, key=lambda count: begun[count])
        else:
            fastest, *slower = sorted(self.counts, key=lambda count: min(timings[count]))
            choice = slower[0] if slower and self._frames[kind] % AGAIN == 0 else fastest
        begun[choice] += 1
        return choice

    def note(self, kind: Hashable, count: int, ms: float) -> None:
        """A frame of that kind took so many milliseconds with so many threads."""
        self._timings[kind][count].append(ms)
        self._frames[kind] += 1

    def note_given_up(self, kind: Hashable, count: int, ms: float) -> None:
        """One was given up after so many milliseconds: enough to know where another count would have ended by then."""
        self._frames[kind] += 1
        others = (min(timings) for other, timings in self._timings[kind].items() if other != count and timings)
        if any(best < ms for best in others):
            self._timings[kind][count].append(ms)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run what follows with so many of torch's threads; other threads of the process keep theirs.

    torch sets OpenMP's count for the calling thread. Only a thread that asks torch for its first operation meanwhile
    would inherit it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
