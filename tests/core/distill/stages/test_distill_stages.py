"""The teacher's and the student's stages at a tiny size: what learns, what stays, what is exact."""

import copy
import dataclasses
import json

import pytest
import standin
import torch

from sprint_core import trigflow
from sprint_core.distill.dataset.batch import Batch
from sprint_core.distill.engine.guard import TrainingFailed
from sprint_core.distill.engine.randomness import SampleRandom, initialise
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.recipes import RECIPES, Objective, Schedule
from sprint_core.distill.stages.base import Captioned, Watch
from sprint_core.distill.stages.student import DistillStage, continued
from sprint_core.distill.stages.teacher import TeacherStage, euler, student_of
from sprint_core.models.gemma import Gemma
from sprint_core.models.transformer import SanaTransformer, TransformerConfig
from sprint_core.text.formats import TextPreset
from sprint_core.text.prompts import PromptTokenizer
from sprint_core.text.tokenizers import HFTokenizer
from sprint_core.trigflow import SIGMA_DATA
from sprint_core.weights import checkpoint, layouts

CONFIG = TransformerConfig(width=64, depth=3, cross_heads=2, caption_width=64, guidance_embed=False)
PICTURES = {"red": torch.full((32, 2, 2), 1.0), "blue": torch.full((32, 2, 2), -1.0)}
PRESET = TextPreset(instruction=None, max_tokens=16)


class TwoPictures:
    fingerprint = "two flat pictures"

    def batch(self, random: SampleRandom) -> Batch:
        captions = [list(PICTURES)[i] for i in random.integers(2)]
        return Batch(torch.stack([PICTURES[caption] for caption in captions]), captions)


DATA = TwoPictures()


def untrained() -> Captioned:
    tokenizer = HFTokenizer(json.dumps(standin.byte_tokenizer()).encode())
    model = Captioned(SanaTransformer(CONFIG), Gemma(standin.TEXT), PromptTokenizer(tokenizer, PRESET))
    initialise(model, 0)
    for name, p in model.named_parameters():
        if "scale_shift_table" in name:
            p.data.mul_(0.1)
    return model


@pytest.fixture
def model() -> Captioned:
    return untrained()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Captioned:
    """After a short training."""
    schedule = Schedule(steps=80, batch=8, lr=3e-3, warmup_steps=10, ema=0.95)
    return Trainer(TeacherStage(untrained(), DATA), schedule, tmp_path_factory.mktemp("teacher")).train()


def test_student_starts_as_the_teacher_whatever_the_guidance(model):
    student = student_of(model.transformer)
    x, s, caption = torch.randn(2, 32, 2, 2), torch.tensor([0.3, 0.9]), torch.randn(2, 4, 64)
    expected = model.transformer(x, s, caption)
    for guidance in (1.0, 4.5, 20.0):
        torch.testing.assert_close(student(x, s, caption, torch.full((2,), guidance)), expected)
    plain = student_of(model.transformer, guidance_embed=False)
    assert plain.config == CONFIG and student.config == dataclasses.replace(CONFIG, guidance_embed=True)
    torch.testing.assert_close(plain(x, s, caption, s), expected)


@pytest.mark.parametrize("change", [{"time_scale": 1000.0}, {"qk_norm": False}])
def test_teacher_without_stabilisers_is_refused(change):
    with pytest.raises(ValueError, match="fine-tune it with them first"):
        student_of(SanaTransformer(dataclasses.replace(CONFIG, **change)))


def test_teacher_learns_what_captions_mean(teacher):
    """The sign of the samples follows the caption; guidance and average included."""
    z = torch.randn((4, 32, 2, 2), generator=torch.Generator().manual_seed(0))
    samples = euler(teacher, z, ["red", "blue", "red", "blue"], 1.0, steps=8, cfg=2.0)
    assert (samples.mean((1, 2, 3)) * torch.tensor([1.0, -1.0, 1.0, -1.0]) > 0.5).all()


@pytest.mark.parametrize(("step", "phase"), [(0, "student"), (1, "critic")])
def test_distillation_moves_only_its_own_phase(model, step, phase):
    stage = DistillStage(model, DATA, Objective(tangent_warmup_steps=1))
    assert [one.module for one in stage.phases(step)] == [phase]
    before = copy.deepcopy(model.state_dict())
    loss, metrics = stage.loss(phase, 5, SampleRandom(0, 0, phase, range(4)))
    loss.backward()
    assert loss.isfinite() and all(value.isfinite() for value in metrics.values())
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.modules[phase].parameters())
    if phase == "critic":
        assert all(p.grad is None for p in stage.modules["student"].parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("step", [0, 99])
def test_flow_matching_is_the_mean_square_of_the_velocity_error(model, step):
    """Whatever the tangent's warm-up."""
    aim = Objective(form="flow", scm_weight=0.5, ladd_weight=0.0, tangent_warmup_steps=99)
    loss, metrics = DistillStage(model, DATA, aim).loss("student", step, SampleRandom(0, 0, "student", range(4)))
    torch.testing.assert_close(loss.detach(), 0.5 * metrics["x_error"] / SIGMA_DATA**2)
    assert "g_norm" not in metrics and loss > 0


def test_the_weight_is_clipped_apart(model):
    stage = DistillStage(model, DATA, Objective())
    student = stage.modules["student"]
    assert set(stage.clipped_apart("student")) == {student.transformer, student.log_variance}
    assert stage.clipped_apart("critic") == (stage.modules["critic"],)


def test_each_loss_says_how_loud_it_is(model):
    """Where a line is logged: the gradient of the weighted loss in the last layer."""
    stage = DistillStage(model, DATA, Objective(ladd_weight=0.25, form="cosine", tangent="difference"))
    seen = {step: stage.loss("student", step, SampleRandom(0, 0, "", range(4)))[1] for step in (16, 18)}
    assert "ladd_grad" not in seen[16] and {"scm_grad", "ladd_grad"} <= set(seen[18])
    random = SampleRandom(0, 0, "", range(4))
    x0, conditioning = stage._batch(random)
    stage._scm_loss(x0, conditioning, 18, random)
    sample = stage._sample(x0, conditioning, 18, random)
    adversarial = 0.25 * stage._generator_loss(sample, conditioning, random)
    (gradient,) = torch.autograd.grad(adversarial, stage.student.transformer.proj_out.weight)
    torch.testing.assert_close(seen[18]["ladd_grad"], gradient.norm())


def test_objectives_can_be_used_alone(model):
    only_scm = DistillStage(model, DATA, Objective(ladd_weight=0.0))
    assert [phase.module for phase in only_scm.phases(1)] == ["student"]
    _, metrics = only_scm.loss("student", 0, SampleRandom(0, 0, "", range(2)))
    assert "adversarial" not in metrics and "scm" in metrics
    only_ladd = DistillStage(model, DATA, Objective(scm_weight=0.0))
    _, metrics = only_ladd.loss("student", 0, SampleRandom(0, 0, "", range(2)))
    assert "scm" not in metrics and "adversarial" in metrics


def test_distillation_goes_on_from_a_student(model, tmp_path):
    """Its weights, not the teacher's; copied, since training changes them in place. Another size is refused."""
    before = student_of(model.transformer)
    for p in before.parameters():
        p.data.add_(0.01)
    path = tmp_path / "student.safetensors"
    tensors = {name: tensor.detach() for name, tensor in before.state_dict().items()}
    sizes = {"size_px": 64, "flow_shift": 1.0}
    checkpoint.save(path, [checkpoint.Weights(layouts.TRANSFORMER, before.config, tensors, tmp_path, sizes)], {})
    found = DistillStage(model, DATA, Objective(), start=continued(path)).modules["student"].transformer
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in tensors.items())
    other = SanaTransformer(dataclasses.replace(CONFIG, depth=2))
    with pytest.raises(checkpoint.CheckpointError, match="no student of this teacher"):
        continued(path)(other)


def test_the_adversary_may_join_later(model):
    stage = DistillStage(model, DATA, Objective(ladd_from=2))
    taken = [phase.module for step in range(5) for phase in stage.phases(step)]
    assert taken == ["student", "student", "student", "critic", "student"]
    metrics = [stage.loss("student", step, SampleRandom(0, 0, "", range(2)))[1] for step in (1, 2)]
    assert "adversarial" not in metrics[0] and "adversarial" in metrics[1]


FLAT = Watch(["red", "blue"] * 16, (32, 2, 2), 1.0)
SHORT = Schedule(steps=40, batch=8, lr=1e-3, warmup_steps=10, ema=0.9, clip=0.5, check_every=10)


def test_the_guard_ends_what_is_known_to_fail(teacher, tmp_path):
    """LADD at full strength from the first step, while sCM's learnt weight has yet to find its size: LADD drowns it."""
    fails = Objective(tangent_warmup_steps=20, guidance=(1.5, 2.0))
    stage = DistillStage(teacher, DATA, fails, watch=FLAT)
    trainer = Trainer(stage, SHORT, tmp_path)
    with pytest.raises(TrainingFailed, match=r"best\.safetensors holds: go on from there by --resume-best"):
        trainer.train()
    assert 0 < trainer.step < SHORT.steps and trainer.guard.file.is_file()


def test_the_guard_lets_pass_what_holds(teacher, tmp_path):
    """Without a learnt weight, and LADD from where the tangent is warm: the error falls to less than half."""
    holds = dataclasses.replace(RECIPES["demo"].objective, tangent_warmup_steps=20, ladd_from=20, guidance=(1.5, 2.0))
    schedule = dataclasses.replace(SHORT, betas=(0.0, 0.99))
    stage = DistillStage(teacher, DATA, holds, watch=FLAT)
    first = stage.check(stage.student)["error"]
    average = Trainer(stage, schedule, tmp_path).train()
    assert stage.check(average)["error"] < 0.5 * first


def test_distilled_student_paints_in_one_step(teacher, tmp_path):
    """The whole chain on two flat images: after sCM and LADD one step gives the captioned one."""
    schedule = Schedule(steps=40, batch=8, lr=1e-3, warmup_steps=10, ema=0.95, clip=0.5)
    stage = DistillStage(teacher, DATA, Objective(tangent_warmup_steps=20, guidance=(1.5, 2.0)))
    student = Trainer(stage, schedule, tmp_path).train().transformer
    z = torch.randn((4, 32, 2, 2), generator=torch.Generator().manual_seed(0))
    caption, mask = teacher.encode(["red", "blue", "red", "blue"])
    one = torch.ones(4)
    x0 = trigflow.flow_predict_x0(student(z, one, caption, one * 2.0, mask), z, 1.0)
    assert (x0.mean((1, 2, 3)) * torch.tensor([1.0, -1.0, 1.0, -1.0]) > 0.5).all()
