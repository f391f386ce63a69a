"""Phases: their turns, and what belongs to each: rate, average, and what was left out."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from toy_stage import SCHEDULE, Toy, weights

from sprint_core.distill.engine.guard import TrainingFailed
from sprint_core.distill.engine.phase import Phase
from sprint_core.distill.engine.trainer import Trainer

PLANS = [
    Phase("a"),
    Phase("a", period=2, turns=(1,)),
    Phase("a", period=6, turns=(1, 2, 3, 4, 5), start=7),
    Phase("a", period=5, turns=(0,), start=8, before=True),
]


@pytest.mark.parametrize("phase", PLANS)
def test_counts_are_those_of_the_steps(phase):
    taken = [step for step in range(40) if step in phase]
    assert [phase.count(step) for step in range(41)] == [sum(one < step for one in taken) for step in range(41)]
    late = phase.steps_from(11)
    assert [next(late) for _ in range(3)] == [step for step in taken if step >= 11][:3]


def test_a_phase_waits_for_its_start():
    late = Phase("a", period=3, turns=(1, 2), start=4)
    assert [step for step in range(10) if step in late] == [4, 5, 7, 8]
    alone = dataclasses.replace(late, turns=(0,), before=True)
    assert [step for step in range(10) if step in alone] == [0, 1, 2, 3, 6, 9]


class Rivals(Toy):
    """A student in every third step, and a critic that learns at a fifth of its rate in the others."""

    def __init__(self, bad=()):
        super().__init__()
        self.plan = Phase("student", period=3), Phase("critic", period=3, turns=(1, 2), rate=0.2, averaged=False)
        self.bad = bad

    def loss(self, phase, step, random):
        loss, metrics = super().loss(phase, step, random)
        return (loss * float("nan") if (phase, step) in self.bad else loss), metrics


def test_each_phase_learns_at_its_rate(tmp_path):
    """Adam's first step moves every weight by the rate: of steps 0 and 1, of 3 that warm up."""
    trainer = Trainer(Rivals(), SCHEDULE, tmp_path)
    before = weights(trainer)
    trainer.train(until=2)
    moved = {name: (before[name] - value).abs() for name, value in weights(trainer).items()}
    for name, rate in (("student.weight", 0.05 / 3), ("critic.weight", 0.2 * 0.05 * 2 / 3)):
        torch.testing.assert_close(moved[name], torch.full_like(moved[name], rate), rtol=1e-3, atol=0)


def test_the_average_moves_with_the_student_alone(tmp_path):
    """The closed form over its updates, of which step 9 sees the fourth."""
    trainer = Trainer(Rivals(), SCHEDULE, tmp_path)
    expected = trainer.average.weight.clone()
    for step in range(10):
        trainer.train(until=step + 1)
        if step % 3 == 0:
            decay = min(0.9, (1 + step // 3) / (10 + step // 3))
            expected = decay * expected + (1 - decay) * trainer.stage.modules["student"].weight.detach()
        torch.testing.assert_close(trainer.average.weight, expected)


def test_what_is_left_out_is_counted_for_each_phase(tmp_path):
    """Only that phase's module stays what it was; a resumed run goes on counting."""
    bad = {("critic", 4), ("critic", 5), ("student", 6)}
    whole = Trainer(Rivals(bad), SCHEDULE, tmp_path / "whole")
    whole.train()
    trainer = Trainer(Rivals(bad), SCHEDULE, tmp_path / "parts")
    trainer.train(until=4)
    before = weights(trainer)
    trainer.train(until=6)
    critic = {name: value for name, value in weights(trainer).items() if name.startswith("critic")}
    assert trainer.skipped == 2 and all(torch.equal(value, before[name]) for name, value in critic.items())
    again = Trainer(Rivals(bad), SCHEDULE, tmp_path / "parts")
    assert again.skipped == 2
    again.train()
    line = json.loads((tmp_path / "parts" / "toy" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["skipped"], line["critic/skipped"], line["student/skipped"]) == (3, 2, 1)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())


def test_a_state_of_one_count_is_resumed(tmp_path):
    """As written before phases had counts of their own."""
    trainer = Trainer(Rivals({("student", 0)}), SCHEDULE, tmp_path)
    trainer.train(until=3)
    state = torch.load(trainer.state_file, weights_only=True)
    del state["left_out"]
    torch.save(state, trainer.state_file)
    assert Trainer(Rivals(), SCHEDULE, tmp_path).skipped == 1


def test_ten_in_a_row_of_one_phase_end_the_training(tmp_path):
    """Though the other phase goes on in between, and though the run was interrupted; nine do not."""
    schedule = dataclasses.replace(SCHEDULE, steps=60)
    steps = [("student", step) for step in range(12, 42, 3)]
    Trainer(Rivals(steps[1:]), schedule, tmp_path / "nine").train()
    Trainer(Rivals(steps), schedule, tmp_path / "ten").train(until=25)
    with pytest.raises(TrainingFailed, match="the last 10 gradients of the student were not finite"):
        Trainer(Rivals(steps), schedule, tmp_path / "ten").train(until=40)


def test_a_stage_of_one_module_trains_it_always():
    class Plain(Toy):
        def __init__(self):
            super(Toy, self).__init__({"toy": nn.Linear(1, 1)}, {})

    assert Plain().plan == (Phase("toy"),)
