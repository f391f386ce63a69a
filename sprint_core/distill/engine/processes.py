"""The process group: one process, or several that share each batch (data parallel).

One process needs nothing. Several, on one machine or more, are launched by `accelerate launch` (or
torchrun); their gradients are averaged where they lie, all at once, after the backward pass. (DistributedDataParallel's
wrapper averages in its forward hooks, which forward-mode differentiation does not pass.)
"""

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from ...devices import usable_device
from .randomness import DeviceRandom, SampleRandom

CPU = torch.device("cpu")
TIMEOUT = datetime.timedelta(hours=2)  # of waiting for another process: one that encodes slower ones


@dataclass(frozen=True)
class ProcessGroup:
    """This process in its group: number `rank` of `world_size`."""

    device: torch.device = CPU
    rank: int = 0
    world_size: int = 1
    state: Any = None  # accelerate.PartialState, where there are several
    draws_on_device: bool = False  # as every device but the CPU does anyway
    shards: bool = False  # whether each keeps a part of every transformer that trains, or all of it: see sharding.py

    def random(self, seed: int, step: int, phase: str, samples: Sequence[int]) -> SampleRandom:
        """The numbers of these samples in a phase of a step."""
        if self.draws_on_device or self.device.type != "cpu":
            return DeviceRandom(seed, step, phase, samples, self.device)
        return SampleRandom(seed, step, phase, samples)

    def share(self, batch: int) -> range:
        """The samples of a batch that fall to this process. Raises ValueError."""
        if batch % self.world_size:
            raise ValueError(f"a batch of {batch} does not divide among {self.world_size} processes")
        size = batch // self.world_size
        return range(self.rank * size, (self.rank + 1) * size)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.world_size == 1 or not gradients:
            return
        for sending in [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
            assert sending is not None
            sending.wait()
        torch._foreach_div_(gradients, self.world_size)  # pyright: ignore[reportPrivateImportUsage]

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process. All must ask."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return bool(flags)

    def of_first(self, numbers: Sequence[float]) -> list[float]:
        """Those of process 0, so that all decide alike. All must ask."""
        if self.world_size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float32, device=self.device)
        distributed.broadcast(tensor, 0)
        return tensor.tolist()

    def wait(self) -> None:
        """For all processes, which are about as far."""
        if self.state:
            self.state.wait_for_everyone()

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Process 0 goes ahead alone; the others follow and find what it wrote."""
        with self.state.main_process_first() if self.state else contextlib.nullcontext():
            yield


SINGLE_PROCESS = ProcessGroup()  # alone, on the CPU


def launched_processes(device: str | None = None, shards: bool = False) -> ProcessGroup:
    """This process in the group that the launcher's environment describes.

    Raises ValueError without such a device, without accelerate for several processes, or for parts of a single one.
    """
    fallback = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if shards:
            raise ValueError("--shard: one process has no others to share with; start it by accelerate launch")
        return ProcessGroup(usable_device(fallback))
    try:
        from accelerate import PartialState
    except ImportError:
        raise ValueError("several processes need accelerate: pip install accelerate") from None
    state = PartialState(cpu=fallback == "cpu", timeout=TIMEOUT)
    place = torch.device(state.device or fallback)
    return ProcessGroup(place, state.process_index, state.num_processes, state, shards=shards)
