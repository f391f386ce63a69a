"""What is recorded on a GPU, of which there is none here: when a trainer asks for it, and by which key."""

import dataclasses

import pytest
import torch
from resident_stages import WARM, stages
from small_stages import SCHEDULE

from sprint_core.distill.engine.processes import ProcessGroup
from sprint_core.distill.engine.trainer import Trainer

CPU = torch.device("cpu")
STEPS = WARM + 6


class Launched:
    """In the place of graphs: computes as ever, and remembers what for."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 0

    def run(self, key, compute, random):
        self.asked.append((key, random.key[1]))
        return compute(random)


def trained(folder, graphs, name="scm", **changed):
    schedule = dataclasses.replace(SCHEDULE, steps=STEPS, **changed)
    trainer = Trainer(stages(name, CPU), schedule, folder, processes=ProcessGroup(draws_on_device=True))
    assert trainer.graphs is None  # of a CPU
    trainer.graphs = graphs
    return [p.detach().clone() for p in trainer.train().parameters()]


def test_what_has_a_constant_is_recorded(tmp_path):
    graphs = Launched()
    ends = trained(tmp_path / "with", graphs)
    stage = stages("scm", CPU)
    phases = [(phase.module, step) for step in range(STEPS) for phase in stage.phases(step)]
    assert graphs.asked == [((name, stage.constant(name, n)), n) for name, n in phases if n >= WARM]
    assert all(map(torch.equal, ends, trained(tmp_path / "without", None)))


@pytest.mark.parametrize(("micro_batch", "recorded"), [(2, 0), (4, STEPS)])
def test_micro_batches_are_not(tmp_path, micro_batch, recorded):
    graphs = Launched()
    trained(tmp_path, graphs, "teacher", micro_batch=micro_batch)
    assert len(graphs.asked) == recorded
