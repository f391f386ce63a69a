"""The guard: what it keeps, when it ends a training, and how one goes on from the best average."""

import dataclasses
import json
import math

import pytest
import torch
from toy_stage import SCHEDULE, Toy, weights

from sprint_core.distill.engine.guard import Guard, TrainingFailed
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.weights import tensorfile

CHECKED = dataclasses.replace(SCHEDULE, steps=40, check_every=5)


class Checked(Toy):
    """Errors by a list, one a check, beginning with the untrained average's."""

    def __init__(self, errors=(), bad_steps=(), chosen="a"):
        super().__init__()
        self.errors, self.bad_steps = errors, bad_steps
        self.settings = {"form": chosen, "latents": "noise"}  # the first a field of Objective

    def check(self, average):
        self.step = 0 if not hasattr(self, "step") else self.step
        return {"error": self.errors[self.step // 5], "judge": 0.5}

    def loss(self, phase, step, random):
        self.step = step + 1
        loss, metrics = super().loss(phase, step, random)
        return (loss * float("nan") if step in self.bad_steps else loss), metrics


def seen(folder, errors, stop_factor=2.0) -> Guard:
    guard = Guard(folder, stop_factor, writes=True)
    for step, error in enumerate(errors):
        average = torch.nn.Linear(1, 1, bias=False)
        average.weight.data.fill_(step)
        guard.record(step, error, average)
    return guard


def test_the_best_average_is_kept(tmp_path):
    guard = seen(tmp_path, [0.9, 0.4, 0.3, 0.59, 0.31])
    assert (guard.step, guard.error) == (2, 0.3)
    file = tensorfile.read(guard.file)
    assert file.tensors["weight"].item() == 2.0 and json.loads(file.metadata["error"]) == 0.3


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ([0.9, 0.3, 0.61], r"error is 0.61 after step 2; it was 0.3 at step 1, whose average best.safetensors holds"),
        ([0.9, 0.04, 0.11], "by --resume-best, with a lower learning rate"),
        ([0.9, math.nan], "error is nan after step 1"),
        ([math.nan], "delete the folder, and train anew"),
    ],
)
def test_a_doubled_error_ends_the_training(tmp_path, errors, message):
    with pytest.raises(TrainingFailed, match=message):
        seen(tmp_path, errors)


def test_small_errors_may_double_and_the_guard_may_be_told_to_stay(tmp_path):
    seen(tmp_path, [0.9, 0.04, 0.099])
    seen(tmp_path, [0.9, 0.1, 0.95], stop_factor=0.0)
    seen(tmp_path, [0.9, 0.3, 0.85], stop_factor=3.0)


def test_what_has_ended_is_warned_of(tmp_path, caplog):
    guard = seen(tmp_path, [0.9, 0.3])
    guard.record(2, 0.7, torch.nn.Linear(1, 1), last=True)
    assert "the error is 0.7 after step 2; it was 0.3 at step 1" in caplog.text and guard.step == 1
    errors = [0.9, *[0.3] * 7, 0.8]
    assert Trainer(Checked(errors), CHECKED, tmp_path).train() is not None


ERRORS = (0.9, 0.5, 0.4, 0.5, 0.6, 0.7, 0.9, 0.9, 0.9)  # the best after step 10, too much after step 30


def test_a_training_ends_and_goes_on_from_the_best(tmp_path):
    best = Trainer(Checked(ERRORS), CHECKED, tmp_path / "a")
    best.train(until=10)
    Trainer(Checked(ERRORS), CHECKED, tmp_path / "a").train(until=25)  # what is saved is later than the best
    with pytest.raises(TrainingFailed, match=r"after step 30; it was 0\.4 at step 10"):
        Trainer(Checked(ERRORS), CHECKED, tmp_path / "a").train()  # the guard's memory is in the state file
    lines = [json.loads(line) for line in (tmp_path / "a/toy/metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line.get("check/error") for line in lines}[30] == pytest.approx(0.9)
    assert lines[0]["step"] == 0 and lines[0]["check/judge"] == 0.5

    gentler = dataclasses.replace(CHECKED, lr=1e-4)
    with pytest.raises(ValueError, match="another run"):
        Trainer(Checked(ERRORS, chosen="b"), gentler, tmp_path / "a")
    back = Trainer(Checked([0.3] * 9, chosen="b"), gentler, tmp_path / "a", resume_best=True)
    assert back.step == 10 and back.guard.error == 0.4
    kept = {k: v for k, v in weights(best).items() if k.startswith("average")}
    assert all(torch.equal(v, weights(back)[k]) for k, v in kept.items())
    assert all(torch.equal(v, weights(back)[k.replace("average", "student")]) for k, v in kept.items())
    begun = {k: v for k, v in weights(Trainer(Checked(ERRORS), CHECKED, tmp_path / "b")).items() if "critic" in k}
    assert all(torch.equal(v, weights(back)[k]) and not torch.equal(v, weights(best)[k]) for k, v in begun.items())
    again = Trainer(Checked([0.3] * 9, chosen="b"), gentler, tmp_path / "a")  # the new settings are the run's now
    assert again.step == 10
    again.train()
    assert again.step == 40 and again.guard.error == 0.3


def test_only_what_may_differ_may_differ(tmp_path):
    Trainer(Checked(ERRORS), CHECKED, tmp_path).train(until=10)
    other = Checked(ERRORS)
    other.settings["latents"] = "others"
    with pytest.raises(ValueError, match="another run"):
        Trainer(other, CHECKED, tmp_path, resume_best=True)
    with pytest.raises(ValueError, match="no average has been kept there; leave out --resume-best"):
        Trainer(Checked(ERRORS), CHECKED, tmp_path / "empty", resume_best=True)
    best = next(tmp_path.rglob("best.safetensors"))
    tensorfile.write(best, tensorfile.read(best).tensors, {"step": "some"})
    with pytest.raises(ValueError, match=r"best\.safetensors: its header does not say which step it is of"):
        Trainer(Checked(ERRORS), CHECKED, tmp_path, resume_best=True)


def test_no_finite_gradient_for_long_ends_the_training(tmp_path):
    """Ten updates in a row of one phase; the other one's are none of its business. Nine are let pass."""
    schedule = dataclasses.replace(CHECKED, check_every=0)
    Trainer(Checked(bad_steps=range(11, 20)), schedule, tmp_path / "nine").train()
    with pytest.raises(TrainingFailed, match="after step 20 the last 10 gradients of the student were not finite"):
        Trainer(Checked(bad_steps=range(10, 20)), schedule, tmp_path / "ten").train()
