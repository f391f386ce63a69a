"""CUDA graphs of losses: a small network's step is bound by launching its kernels, and a graph is one launch.

Recorded are a loss and its backward pass, once for each value of `Stage.constant`. The numbers of a step are drawn as
ever: a graph draws from a generator that is given the step's own seed before each replay.
"""

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor, nn

from .randomness import DeviceRandom, SampleRandom

WARM_UPS = 3  # runs before one is recorded, in which libraries choose their kernels

Compute = Callable[[SampleRandom], dict[str, Tensor]]  # draws, leaves gradients in parameters, returns metrics


class LossGraphs:
    """Those of one trainer, whose parameters keep their places in memory."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._parameters = list(parameters)
        self._graphs: dict[Hashable, _Graph] = {}

    def __len__(self) -> int:
        """How many were recorded."""
        return len(self._graphs)

    def run(self, key: Hashable, compute: Compute, random: DeviceRandom) -> dict[str, Tensor]:
        """What `compute` does and returns; of equal keys it must be the same operations. Gradients are none before.

        Results are overwritten when the same key is run again.
        """
        if key not in self._graphs:
            self._graphs[key] = _Graph(compute, random, self._parameters)
        return self._graphs[key].replay(random)


class _Graph:
    def __init__(self, compute: Compute, random: DeviceRandom, parameters: list[nn.Parameter]):
        self.generator = random.generator
        before, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(before)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                compute(random)
                _forget(parameters)
        before.wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)
        with torch.cuda.graph(self.graph):
            self.metrics = compute(random)
        self.gradients = [(p, p.grad) for p in parameters if p.grad is not None]

    def replay(self, random: DeviceRandom) -> dict[str, Tensor]:
        self.generator.manual_seed(random.generator.initial_seed())
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.metrics


def _forget(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
