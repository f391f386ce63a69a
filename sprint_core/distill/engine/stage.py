"""What a stage of training is to the trainer: its networks, its loss, and what tells its runs apart."""

import abc
import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from .phase import Phase
from .randomness import SampleRandom

LOG_EVERY = 20  # steps
Averaged = TypeVar("Averaged", bound=nn.Module)  # the network whose moving average is the stage's result


def is_logged_next(step: int, period: int) -> bool:
    """Whether metrics of a phase with one turn in each period are written, if it takes part in this step."""
    return step % LOG_EVERY >= LOG_EVERY - period


class Stage(abc.ABC, Generic[Averaged]):
    """One stage: subclasses name it, say which of their networks is averaged, and give the loss.

    modules: the networks that are trained and saved, one optimizer each. settings: what, with the schedule, makes a
    run of this stage another run. plan: what trains them, in the order of a step; none: the stage's one module, always.
    """

    name: str
    sample_every = 500  # steps between sample grids, where there are any; 0: none
    averaged: str  # the key in `modules` of the network whose moving average is the result

    def __init__(self, modules: dict[str, nn.Module], settings: dict[str, str], plan: Sequence[Phase] = ()):
        self.modules, self.settings = modules, settings
        self.plan = tuple(plan) or (Phase(self.name),)

    @abc.abstractmethod
    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that module `phase` is to lower, a mean over the samples, and metrics."""

    def phases(self, step: int) -> tuple[Phase, ...]:
        """Those that take part in this step, in order."""
        return tuple(phase for phase in self.plan if step in phase)

    def constant(self, phase: str, step: int) -> Hashable | None:
        """Losses for which it is equal differ by random numbers alone, and read what lies on the device; None: none do.

        A GPU records those: see graphs.py.
        """
        return None

    def reading_ahead(self, asked: Iterator[tuple[str, SampleRandom]]) -> contextlib.AbstractContextManager:
        """While it is open, `loss` may read before it is asked what it will be asked for: phases and their numbers.

        They are in the order of the losses. A stage whose samples lie in memory reads nothing ahead.
        """
        return contextlib.nullcontext()

    def clipped_apart(self, phase: str) -> Sequence[nn.Module]:
        """The parts of the module that this phase trains, each of which has its gradient clipped by itself."""
        return (self.modules[phase],)

    def check(self, average: Averaged) -> dict[str, float]:
        """What tells how the average does, at least "error", which is to fall; nothing: this stage has no guard."""
        return {}

    def samples(self, average: Averaged) -> Tensor | None:
        """Images [b, h, w, 3] in [0, 1] that show what the average can do by now, or None."""
        return None

    @property
    def compilable(self) -> tuple[nn.Module, ...]:
        """The networks that torch.compile may take in hand, block by block: see compiling.py."""
        return ()

    @property
    def average_source(self) -> Averaged:
        """The network whose moving average is the result."""
        return cast(Averaged, self.modules[self.averaged])

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.modules[self.averaged].parameters()).device
