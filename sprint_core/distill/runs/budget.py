"""What a method of distillation takes: evaluations of a network, seconds, and memory."""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ... import disk
from ...weights import tensorfile
from ..engine.randomness import SampleRandom
from ..engine.trainer import Trainer
from ..stages.student import DistillStage

ADAM_BYTES = 4 * 4  # of a trained parameter: itself, its gradient, two moments


@dataclass
class Evaluations:
    count: int = 0


@contextmanager
def counted(stage: DistillStage) -> Iterator[Evaluations]:
    """Counts evaluations of every transformer that the stage asks, by their first blocks."""
    total = Evaluations()

    def record(block: nn.Module, _inputs: Any, output: Tensor) -> None:
        learns = any(parameter.requires_grad for parameter in block.parameters())
        total.count += len(output) * (1 + output.requires_grad * (1 + learns))

    networks = [stage.teacher.transformer, stage.student.transformer, *filter(None, [stage.modules.get("fake")])]
    handles = [network.transformer_blocks[0].register_forward_hook(record) for network in networks]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


def cost_of(stage: DistillStage, step: int) -> int:
    """Evaluations of one sample in one step, all phases together."""
    with counted(stage) as evaluations:
        for phase in stage.phases(step):
            stage.loss(phase.module, step, SampleRandom(0, step, phase.module, range(1)))
    return evaluations.count


def within(stage: DistillStage, budget: int, batch: int) -> tuple[int, int]:
    """How many steps a budget of evaluations allows, at least 1, and how many evaluations those take.

    Each kind of step is tried once, with one sample.
    """
    costs: dict[tuple, int] = {}
    taken = 0
    for step in itertools.count():
        kind = tuple((one.module, step >= one.start, one.count(step) % one.kinds) for one in stage.phases(step))
        if kind not in costs:
            costs[kind] = cost_of(stage, step)
        if step and taken + batch * costs[kind] > budget:
            return step, taken
        taken += batch * costs[kind]
    raise AssertionError


def trained_bytes(stage: DistillStage) -> int:
    """Memory of what trains, with its moments, of the average and of the teacher; in fp32."""
    learning = [stage.modules[name] for name in {phase.module for phase in stage.plan}]
    trained = sum(p.numel() for module in learning for p in module.parameters())
    kept = sum(p.numel() for module in (stage.student, stage.teacher) for p in module.parameters())
    return trained * ADAM_BYTES + kept * 4


class Timed(Trainer):
    """A trainer that keeps the seconds of each step, so that those of a process that was killed count too."""

    def __init__(self, *args):
        super().__init__(*args)
        self._file = self.folder / "seconds.json"
        self._taken = tensorfile.read_json(self._file).get("steps", [])[: self.step] if self.step else []

    @property
    def seconds(self) -> float:
        return round(sum(self._taken), 1)

    def _one_step(self) -> dict[str, Tensor]:
        started = time.perf_counter()
        metrics = super()._one_step()
        float(next(iter(metrics.values()), 0.0))  # waits for the device, which the step itself does not
        self._taken.append(time.perf_counter() - started)
        return metrics

    def save(self) -> float:
        with disk.replacing(self._file) as temporary:  # before the state, so that it is never behind it
            temporary.write_text(json.dumps({"steps": self._taken}), encoding="utf-8")
        return super().save()
