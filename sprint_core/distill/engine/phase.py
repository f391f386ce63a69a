"""A phase of training: which module an update is of, in which steps it takes place, and how fast that one learns."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """An update of its own: of one module, by one optimizer.

    A phase takes part in a step once or not at all, since its random numbers belong to the step: a second time it would
    draw the same. What is to learn faster than others takes part in more steps of a period, or at a higher rate.
    """

    module: str  # its key in Stage.modules, which also names the phase in metrics and in the keys of its numbers
    period: int = 1  # steps
    turns: tuple[int, ...] = (0,)  # the steps of a period in which it takes part
    start: int = 0  # the step from which it has turns
    before: bool = False  # whether it takes part in all steps before that one, or in none
    rate: float = 1.0  # times the schedule's learning rate
    averaged: bool = True  # whether the moving average moves after its updates
    kinds: int = 1  # updates in a row that differ in what they cost

    def __contains__(self, step: int) -> bool:
        """Whether it takes part in a step."""
        return self.before if step < self.start else step % self.period in self.turns

    def count(self, step: int) -> int:
        """In how many steps before this one it takes part."""
        late = max(0, self._turns_before(step) - self._turns_before(self.start))
        return late + self.before * min(step, self.start)

    def steps_from(self, step: int) -> Iterator[int]:
        """The steps in which it takes part, from this one on."""
        return (number for number in itertools.count(step) if number in self)

    def _turns_before(self, step: int) -> int:
        """Of periods that begin with step 0."""
        periods, rest = divmod(step, self.period)
        return periods * len(self.turns) + sum(turn < rest for turn in self.turns)
