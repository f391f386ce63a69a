"""What a GPU records of a stage is what any step with an equal constant would compute."""

import pytest
import torch
from small_stages import CONFIG, teacher

from sprint_core.distill.dataset.resident import ResidentLatents
from sprint_core.distill.dataset.tokenized import TokenizedCaptions
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.recipes import Objective, with_method
from sprint_core.distill.stages.base import TextConditioned
from sprint_core.distill.stages.rivals import distill_stage
from sprint_core.distill.stages.teacher import TeacherStage

WARM, LADD, STEPS = 6, 9, 60  # LADD begins later than the tangent is warm


class Worded(TextConditioned):
    """Captions of tokens, each of which has an embedding."""

    def __init__(self):
        super().__init__()
        self.transformer = teacher().transformer
        self.words = torch.randn(8, CONFIG.caption_width, generator=torch.Generator().manual_seed(0))

    def encode(self, captions):
        if isinstance(captions, TokenizedCaptions):
            return self.words[captions.ids], captions.kept
        return self.words[torch.zeros(len(captions), 3, dtype=torch.long)], torch.ones(len(captions), 3)


def resident() -> ResidentLatents:
    ids = torch.arange(20).reshape(5, 4) % 8
    kept = torch.ones(5, 4, dtype=torch.bool)
    return ResidentLatents(
        torch.randn(5, 32, 2, 3, generator=torch.Generator().manual_seed(1)),
        TokenizedCaptions(ids, kept, (ids[0], kept[0])),
        "noise",
    )


def stages():
    yield "teacher", TeacherStage(Worded(), resident())
    common = {"tangent": "difference", "tangent_warmup_steps": WARM}
    for method in ("scm", "dmd2", "rcm", "emd"):
        values = common | ({"ladd_from": LADD} if method in ("scm", "dmd2") else {})
        yield method, distill_stage(Worded(), resident(), Objective(**with_method({"method": method, **values})))


@pytest.mark.parametrize("name", ["teacher", "scm", "dmd2", "rcm", "emd"])
def test_losses_of_equal_constants_are_the_same_function(name):
    stage = dict(stages())[name]
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
    with_jvp = distill_stage(Worded(), resident(), Objective(tangent="jvp", tangent_warmup_steps=0))
    assert with_jvp.constant("student", STEPS) is None
    stage = TeacherStage(Worded(), resident())
    stage.dataset = object()  # which is not known to lie on the device
    assert stage.constant("teacher", 0) is None
