"""With activation checkpointing, in micro-batches or by two processes: the real stages learn the same."""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import standin
import torch
from processes import run_two

from sprint_core.distill.dataset.batch import Batch
from sprint_core.distill.engine.processes import SINGLE_PROCESS, ProcessGroup, launched_processes
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.engine.stage import Stage
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.recipes import Objective, Schedule, with_method
from sprint_core.distill.stages.base import Embedded
from sprint_core.distill.stages.rivals import distill_stage
from sprint_core.distill.stages.teacher import TeacherStage
from sprint_core.models.transformer import SanaTransformer

CONFIG = dataclasses.replace(standin.TEACHER, depth=3)
SHARED = ("distill", "dmd2")  # of those by two processes
SCHEDULE = Schedule(steps=4, batch=4, lr=1e-4, warmup_steps=1)
STAGES = {"teacher": ["teacher"], "distill": ["student", "critic"], "dmd2": ["student", "fake", "critic"]}  # and phases


class Noise:
    """Latents and captions of 3 to 9 tokens, so that micro-batches are padded differently."""

    fingerprint = "noise"

    def batch(self, random: SampleRandom) -> Batch:
        captions = [
            row[: 3 + n] for row, n in zip(random.normal(9, CONFIG.caption_width), random.integers(7), strict=True)
        ]
        return Batch(random.normal(32, 2, 3), captions)


def stage(name: str, activation_checkpointing: bool = False) -> Stage:
    transformer = SanaTransformer(CONFIG)
    transformer.load_state_dict(standin.random_model(transformer))
    model = Embedded(transformer, torch.zeros(1, CONFIG.caption_width))
    if name == "teacher":
        return TeacherStage(model, Noise(), activation_checkpointing=activation_checkpointing)
    objective = Objective(**with_method({"method": "scm" if name == "distill" else name, "tangent_warmup_steps": 1}))
    return distill_stage(model, Noise(), objective, activation_checkpointing=activation_checkpointing)


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def trained(
    name: str, out: Path, processes: ProcessGroup = SINGLE_PROCESS, micro_batch: int = 0
) -> dict[str, torch.Tensor]:
    """What each network became, and the running mean of its gradients, which no step size hides."""
    trainer = Trainer(stage(name), dataclasses.replace(SCHEDULE, micro_batch=micro_batch), out, processes=processes)
    trainer.train()
    found = {"average": flat(trainer.average.parameters())}
    for phase, optimizer in trainer.optimizers.items():
        found[phase] = flat(trainer.stage.modules[phase].parameters())
        found[f"{phase} gradients"] = flat(state["exp_avg"] for state in optimizer.state.values())
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of the gradients' norm, and every weight to 1e-5."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if name.endswith("gradients"):
            assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
        else:
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "phase"), [(name, phase) for name, phases in STAGES.items() for phase in phases])
def test_activation_checkpointing_changes_no_gradient(name, phase):
    """Nor the loss; a block is computed again as it was, bit for bit."""
    results = []
    for activation_checkpointing in (False, True):
        one = stage(name, activation_checkpointing)
        loss, _ = one.loss(phase, 3, SampleRandom(0, 3, phase, range(4)))
        loss.backward()
        gradients = [p.grad for p in one.modules[phase].parameters() if p.grad is not None]
        results.append(flat([loss, *gradients]))
    assert len(gradients) > 20 and torch.equal(*results)


@pytest.mark.parametrize("name", STAGES)
def test_micro_batches_equal_the_whole_batch(name, tmp_path):
    whole = trained(name, tmp_path / "whole")
    for micro_batch in (1, 3):
        assert_equal(trained(name, tmp_path / f"{micro_batch}", micro_batch=micro_batch), whole)


def test_two_processes_equal_one(tmp_path):
    run_two(__file__, tmp_path)
    for name in SHARED:
        single = trained(name, tmp_path / "single" / name)
        for rank in range(2):
            assert_equal(torch.load(tmp_path / f"{name}{rank}.pt"), single)


if __name__ == "__main__":
    processes = launched_processes("cpu")
    out = Path(sys.argv[1])
    for name in SHARED:
        torch.save(trained(name, out / "shared" / name, processes), out / f"{name}{processes.rank}.pt")
