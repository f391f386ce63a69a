"""Which of several ways to paint a frame is the fastest: that is for the machine to say.

With one thread or with all: a small network's parallel regions end sooner than threads wake, above all on a busy
machine, and a large one needs them all. In fp32 or, in part, in bf16. All ways are tried on frames of a kind, and the
fastest one stays.
"""

from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

Way = TypeVar("Way", bound=Hashable)

TRIES = 2  # of each way, before one is chosen
REMEMBERED = 5  # timings of a way; its best is compared
AGAIN = 40  # frames, after which one of the slower ways, each in its turn, is tried: a machine does not stay busy


class Fastest(Generic[Way]):
    """Ways by their timings, for each kind of frame apart."""

    def __init__(self, ways: Sequence[Way]):
        self.ways = ways
        self._timings: dict[Hashable, dict[Way, deque[float]]] = defaultdict(
            lambda: {way: deque(maxlen=REMEMBERED) for way in self.ways}
        )
        self._begun: dict[Hashable, dict[Way, int]] = defaultdict(lambda: dict.fromkeys(self.ways, 0))
        self._frames: dict[Hashable, int] = defaultdict(int)

    def choice(self, kind: Hashable) -> Way:
        """How to paint the next frame of a kind."""
        timings, begun = self._timings[kind], self._begun[kind]
        untried = [way for way in self.ways if begun[way] < TRIES or not timings[way]]
        if untried:  # in turn: a way whose frames are all given up must not keep its turn
            choice = min(untried, key=lambda way: begun[way])
        else:
            fastest, *slower = sorted(self.ways, key=lambda way: min(timings[way]))
            turn, rest = divmod(self._frames[kind], AGAIN)
            choice = slower[turn % len(slower)] if slower and rest == 0 else fastest
        begun[choice] += 1
        return choice

    def note(self, kind: Hashable, way: Way, ms: float) -> None:
        """A frame of that kind took so many milliseconds in that way."""
        self._timings[kind][way].append(ms)
        self._frames[kind] += 1

    def note_given_up(self, kind: Hashable, way: Way, ms: float) -> None:
        """One was given up after so many milliseconds: enough to know where another way would have ended by then."""
        self._frames[kind] += 1
        others = (min(timings) for other, timings in self._timings[kind].items() if other != way and timings)
        if any(best < ms for best in others):
            self._timings[kind][way].append(ms)
