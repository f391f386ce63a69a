"""Randomness that belongs to a sample, not to a process: (run's seed, step, phase, sample) -> numbers.

So a resumed run repeats itself without saving generators, and N processes that share a batch draw
what one process would have drawn for the whole of it. On a device other than the CPU a generator for each
sample would take longer than the step: there one generator, with the same key, draws for all of them.
"""

import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SampleRandom:
    """One CPU generator for each sample of a batch; every draw returns one row per sample."""

    device = torch.device("cpu")

    def __init__(self, seed: int, step: int, phase: str, samples: Sequence[int]):
        self.key, self.samples, self._reads = (seed, step, phase), samples, 0
        self.generators = [torch.Generator().manual_seed(_key(*self.key, i)) for i in samples]

    def __len__(self) -> int:
        return len(self.generators)

    def of_data(self) -> "SampleRandom":
        """Others for the same samples, always on the CPU, which say what is read of a dataset; each time others.

        They depend on no draw from these, so that a batch can be read before its step begins.
        """
        self._reads += 1
        seed, step, phase = self.key
        return SampleRandom(seed, step, f"{phase}/data {self._reads}", self.samples)

    def shared(self, high: int) -> int:
        """An integer in [0, high) that the samples of all micro-batches and processes share."""
        return int(torch.randint(high, (), generator=torch.Generator().manual_seed(_key(*self.key, "all"))))

    def normal(self, *shape: int) -> Tensor:
        """Unit normal [b, *shape]."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def uniform(self) -> Tensor:
        """[b] in [0, 1)."""
        return torch.stack([torch.rand((), generator=g) for g in self.generators])

    def integers(self, high: int) -> Tensor:
        """[b] integers in [0, high)."""
        return torch.stack([torch.randint(high, (), generator=g) for g in self.generators])

    def choice(self, values: Sequence[float]) -> Tensor:
        """[b] of the values, each as likely."""
        return _constants(tuple(values), self.device)[self.integers(len(values))]


class DeviceRandom(SampleRandom):
    """The same from one generator on a device, without waiting for it: every draw is one kernel.

    Its key holds the first of the samples, so that processes and micro-batches draw other numbers, and another
    number of processes, or another size of micro-batches, makes other numbers.
    """

    def __init__(self, seed: int, step: int, phase: str, samples: Sequence[int], device: torch.device):
        super().__init__(seed, step, phase, ())
        self.samples, self.device = samples, device
        self.generator = torch.Generator(device).manual_seed(_key(*self.key, samples[0]))

    def __len__(self) -> int:
        return len(self.samples)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn((len(self), *shape), generator=self.generator, device=self.device)

    def uniform(self) -> Tensor:
        return torch.rand(len(self), generator=self.generator, device=self.device)

    def integers(self, high: int) -> Tensor:
        return torch.randint(high, (len(self),), generator=self.generator, device=self.device)


@functools.cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept, since sending them to a device anew would wait for it."""
    return torch.tensor(values, device=device)


def initialise(model: nn.Module, seed: int) -> None:
    """torch's own initialisation from a seed, and gains of 1, biases of 0 where a layer has no such method."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()


def _key(seed: int, step: int, phase: str, sample: int | str) -> int:
    text = f"{seed}/{step}/{phase}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
