"""With activation checkpointing, in micro-batches or by two processes: the real stages learn the same."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from processes import run_two
from small_stages import SCHEDULE, assert_equal, flat, stage

from sprint_core.distill.engine.processes import SINGLE_PROCESS, ProcessGroup, launched_processes
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.engine.trainer import Trainer

BY_TWO = {"copies": ("distill", "dmd2"), "parts": ("teacher", "distill", "dmd2")}  # which of those are by two processes
STAGES = {"teacher": ["teacher"], "distill": ["student", "critic"], "dmd2": ["student", "fake", "critic"]}  # and phases


def trained(
    name: str, out: Path, processes: ProcessGroup = SINGLE_PROCESS, micro_batch: int = 0
) -> dict[str, torch.Tensor]:
    """What each network became, and the running mean of its gradients, which no step size hides."""
    trainer = Trainer(stage(name), dataclasses.replace(SCHEDULE, micro_batch=micro_batch), out, processes=processes)
    trainer.train()
    found = {"average": flat(trainer.result().parameters())}
    for phase, optimizer in trainer.optimizers.items():
        found[phase] = flat(trainer.stage.modules[phase].parameters())
        found[f"{phase} gradients"] = flat(state["exp_avg"] for state in optimizer.state.values())
    return found


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


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What two processes learnt, which run once: the folder of their results."""
    folder = tmp_path_factory.mktemp("two")
    run_two(__file__, folder)
    return folder


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in BY_TWO.items() for name in names])
def test_two_processes_equal_one(kind, name, by_two, tmp_path):
    single = trained(name, tmp_path)
    for rank in range(2):
        assert_equal(torch.load(by_two / f"{kind}-{name}-{rank}.pt"), single)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for kind, names in BY_TWO.items():
        processes = launched_processes("cpu", shards=kind == "parts")
        for name in names:
            torch.save(trained(name, out / kind / name, processes), out / f"{kind}-{name}-{processes.rank}.pt")
