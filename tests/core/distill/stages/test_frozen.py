"""A teacher that is held in bf16: what of it is, what is not, and how far it is from one in fp32."""

import functools

import pytest
import standin
import torch

from sprint_core.distill.dataset.batch import Batch
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.recipes import RECIPES, Objective, Schedule, override, with_method
from sprint_core.distill.stages.base import Embedded, Watch
from sprint_core.distill.stages.frozen import HalfTransformer
from sprint_core.distill.stages.rivals import distill_stage
from sprint_core.distill.stages.student import DistillStage
from sprint_core.models.transformer import SanaTransformer

CONFIG = standin.TEACHER
ROUNDING = 2.0**-8  # of bf16, relative


class Noise:
    fingerprint = "noise"

    def batch(self, random: SampleRandom) -> Batch:
        return Batch(random.normal(32, 2, 2), list(random.normal(5, CONFIG.caption_width)))


def transformer() -> SanaTransformer:
    model = SanaTransformer(CONFIG)
    model.load_state_dict(standin.random_model(model))
    return model


def stage(precision: str, method: str = "scm") -> DistillStage:
    values = {"method": method, "form": "cosine", "tangent": "difference", "teacher_precision": precision}
    aim = Objective(**with_method(values | {"tangent_warmup_steps": 1}))
    watch = Watch(list(torch.ones(4, 5, CONFIG.caption_width)), (32, 2, 2), 3.0)
    return distill_stage(Embedded(transformer(), torch.zeros(1, CONFIG.caption_width)), Noise(), aim, watch=watch)


def velocity(model: SanaTransformer) -> torch.Tensor:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(draw(4, 32, 2, 2), torch.tensor([0.02, 0.3, 0.7, 1.0]), draw(4, 5, CONFIG.caption_width))


def dtypes(module: torch.nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in module.state_dict().values()}


def test_a_half_transformer_is_its_twin_to_rounding():
    twin = transformer()
    half = HalfTransformer(twin)
    found, expected = velocity(half), velocity(twin)
    assert dtypes(half) == {torch.bfloat16} and found.dtype == torch.float32
    assert half.state_dict().keys() == twin.state_dict().keys()
    error = (found - expected).norm() / expected.norm()
    assert ROUNDING / 8 < error < 4 * ROUNDING
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(velocity(half), found)
        again = velocity(twin).float()
    assert (again - found).norm() / expected.norm() < 4 * ROUNDING


def test_only_the_teacher_is_held_in_bf16():
    exact, half = stage("fp32", "dmd2"), stage("bf16", "dmd2")
    assert dtypes(half.teacher.transformer) == {torch.bfloat16} and dtypes(exact.teacher) == {torch.float32}
    assert half.modules.keys() == {"student", "fake", "critic"}
    for name, module in half.modules.items():
        assert all(p.requires_grad for p in module.parameters())
        start = exact.modules[name].state_dict()
        assert all(torch.equal(tensor, start[key]) for key, tensor in module.state_dict().items()), name
    assert not any(p.requires_grad for p in half.teacher.parameters())


def test_a_teacher_in_fp32_is_the_given_one():
    given = Embedded(transformer(), torch.zeros(1, CONFIG.caption_width))
    found = DistillStage(given, Noise(), Objective())
    assert found.teacher is given and type(given.transformer) is SanaTransformer


@pytest.mark.parametrize("phase", ["student", "critic"])
def test_both_phases_learn_what_they_would_from_fp32(phase):
    """By the loss and its gradient, which for the student passes through the teacher's blocks."""
    found = {}
    for precision in ("fp32", "bf16"):
        one = stage(precision)
        loss, _ = one.loss(phase, 1, SampleRandom(0, 1, phase, range(4)))
        loss.backward()
        gradients = [p.grad.flatten() for p in one.modules[phase].parameters() if p.grad is not None]
        found[precision] = loss.detach(), torch.cat(gradients)
    (loss, gradient), (other, half) = found["fp32"], found["bf16"]
    torch.testing.assert_close(other, loss, rtol=0.02, atol=0)
    assert torch.cosine_similarity(gradient, half, dim=0) > 0.99


@pytest.mark.parametrize("method", ["scm", "dmd2", "sid"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_trains_and_is_watched(tmp_path, method, precision):
    schedule = Schedule(steps=3, batch=2, lr=1e-4, precision=precision, check_every=2, stop_factor=0.0)
    trainer = Trainer(stage("bf16", method), schedule, tmp_path)
    before = [p.detach().clone() for p in trainer.stage.modules["student"].parameters()]
    trainer.train()
    after = trainer.stage.modules["student"].parameters()
    assert not trainer.skipped and any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert dtypes(trainer.average) == {torch.float32} and trainer.guard.error < float("inf")


def test_full_size_holds_it_in_bf16_and_small_worlds_do_not():
    found = {name: recipe.objective.teacher_precision for name, recipe in RECIPES.items()}
    assert {name for name, precision in found.items() if precision == "bf16"} == {"sprint-0.6B", "sprint-1.6B"}
    with pytest.raises(ValueError, match=r"control.teacher_precision is bf16: a ControlNet has no teacher"):
        override(RECIPES["demo-control"], ["control.teacher_precision=bf16"])
    with pytest.raises(ValueError, match="teacher_precision is 'fp16'; there are fp32 and bf16"):
        override(RECIPES["demo"], ["distill.teacher_precision=fp16"])
