"""One process or many: what a trainer must know of the others.

One process needs nothing. Several, on one machine or more, are launched by `accelerate launch` (or
torchrun) and share each batch: data parallel, gradients averaged in one message after the backward
pass. (DistributedDataParallel's wrapper averages in its forward hooks, which forward-mode
differentiation does not pass.)
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...devices import usable_device

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workers:
    """This process among `world` of them."""

    device: torch.device = CPU
    rank: int = 0
    world: int = 1
    state: Any = None  # accelerate.PartialState, where there are several

    def share(self, batch: int) -> range:
        """The samples of a batch that fall to this process. Raises ValueError."""
        if batch % self.world:
            raise ValueError(f"a batch of {batch} does not divide among {self.world} processes")
        size = batch // self.world
        return range(self.rank * size, (self.rank + 1) * size)

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.world == 1:
            return
        from accelerate.utils import reduce

        flat = reduce(torch.cat([p.grad.flatten() for p in parameters]), "mean")
        for p, mean in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(mean.view_as(p))

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """The first process goes ahead, alone; the others find what it wrote."""
        with self.state.main_process_first() if self.state else contextlib.nullcontext():
            yield


ALONE = Workers()  # on the CPU


def launched(device: str | None = None) -> Workers:
    """This process, as it was launched. Raises ValueError without such a device, or if several need accelerate."""
    fallback = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Workers(usable_device(fallback))
    try:
        from accelerate import PartialState
    except ImportError:
        raise ValueError("several processes need accelerate: pip install accelerate") from None
    state = PartialState(cpu=fallback == "cpu")
    return Workers(state.device, state.process_index, state.num_processes, state)
