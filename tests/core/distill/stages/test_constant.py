"""What a GPU records of a stage is what any step with an equal constant would compute."""

import pytest
import torch
from resident_stages import WARM, Worded, resident, stages
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.recipes import Objective
from sprint_core.distill.stages.rivals import distill_stage
from sprint_core.distill.stages.teacher import TeacherStage

STEPS = 60
CPU, NOWHERE = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("name", ["teacher", "scm", "dmd2", "rcm", "emd"])
def test_losses_of_equal_constants_are_the_same_function(name):
    stage = stages(name, CPU)
    seen, recorded = {}, 0
    for step in range(STEPS):
        for phase in stage.phases(step):
            constant = stage.constant(phase.module, step)
            assert (constant is None) == (name in ("scm", "rcm") and step < WARM)
            if constant is None:
                continue
            loss, metrics = stage.loss(phase.module, step, SampleRandom(0, 0, phase.module, range(2)))
            found = {"loss": loss.detach(), **metrics}
            known = seen.setdefault((phase.module, constant), found)
            assert known.keys() == found.keys()
            for key, value in known.items():
                assert torch.equal(value, found[key]), (step, phase.module, key)
            recorded += known is not found
    assert recorded > STEPS // 2


def test_what_changes_from_step_to_step_has_no_constant():
    with_jvp = distill_stage(Worded(CPU), resident(CPU), Objective(tangent="jvp", tangent_warmup_steps=0))
    assert with_jvp.constant("student", STEPS) is None
    for form, tangent, warming in (("cosine", "difference", True), ("flow", "jvp", False)):
        aim = Objective(form=form, tangent=tangent, tangent_warmup_steps=4, ladd_weight=0.0)
        student = distill_stage(Worded(CPU), resident(CPU), aim)
        assert [student.constant("student", step) is None for step in (2, 3, 4, 5)] == [warming] * 2 + [False] * 2
    stage = TeacherStage(Worded(CPU), resident(CPU))
    stage.dataset = object()  # which is not known to lie on the device
    assert stage.constant("teacher", 0) is None


class OnDevice(SampleRandom):
    """Draws of no value, as on a device whose tensors nothing can read."""

    device = NOWHERE

    def __init__(self, step: int):
        super().__init__(0, step, "phase", ())

    def __len__(self):
        return 2

    def normal(self, *shape):
        return torch.empty(2, *shape, device=NOWHERE)

    def uniform(self):
        return torch.empty(2, device=NOWHERE)

    def integers(self, high):
        return torch.empty(2, dtype=torch.long, device=NOWHERE)


class NothingOfTheHost(TorchDispatchMode):
    """Refuses operations that read or make a tensor elsewhere than on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)]
        assert all(one.device == NOWHERE for one in tensors), func
        return result


@pytest.mark.parametrize("name", ["teacher", "scm", "dmd2", "sid", "rcm", "emd"])
def test_what_is_recorded_has_nothing_of_the_host(name):
    """A GPU refuses to record such operations, and whatever waits for it."""
    stage, seen = stages(name, NOWHERE), set()
    for step in range(20, 40):
        for phase in stage.phases(step):
            constant = stage.constant(phase.module, step)
            assert constant is not None
            if (phase.module, constant) in seen:
                continue
            seen.add((phase.module, constant))
            stage.loss(phase.module, step, OnDevice(step))  # what is kept from then on is made
            with NothingOfTheHost():
                loss, _ = stage.loss(phase.module, step, OnDevice(step))
                loss.backward()
    assert {module for module, _ in seen} == {phase.module for phase in stage.plan}
