"""Every stage's loss written out in a few lines, in float64 and with the same draws: what no pure function sees."""

import dataclasses
import itertools

import pytest
import standin
import torch
import torch.nn.functional as nnf
from by_hand import (
    CONFIG,
    OBJECTIVE,
    SHAPE,
    WIDTH,
    Distilled,
    Model,
    Noise,
    Steered,
    angles,
    assert_same,
    column,
    consistency,
    drawn,
    draws,
    fake,
    logits,
    noised,
)
from torch import Tensor

from sprint_core.distill.stages import autoencoder as autoencoder_stages
from sprint_core.distill.stages.base import Preview, Watch
from sprint_core.distill.stages.control import ControlStage, block_count
from sprint_core.distill.stages.student import DistillStage
from sprint_core.distill.stages.teacher import TeacherStage, student_of
from sprint_core.models import controlnet
from sprint_core.models.autoencoder import Autoencoder

# --- distillation and ControlNets: sCM and LADD ------------------------------------------------------


@pytest.fixture(params=["distill", "control"])
def hand(request) -> Distilled:
    if request.param == "distill":
        stage = DistillStage(Model(), Noise(), OBJECTIVE, start=student_of)
    else:
        stage = ControlStage(Model(dataclasses.replace(CONFIG, guidance_embed=True)), Noise(), OBJECTIVE)
    generator = torch.Generator().manual_seed(1)
    for module in (*stage.modules.values(), stage.teacher):
        for parameter in module.double().parameters():  # so that guidance, hint, weight and heads all count
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return (Distilled if request.param == "distill" else Steered)(stage)


@pytest.mark.parametrize(("step", "form"), [(2, "published"), (20, "published"), (2, "cosine"), (20, "cosine")])
def test_the_students_loss(hand, step, form):
    if form == "cosine":
        hand.stage.objective = dataclasses.replace(OBJECTIVE, form="cosine", tangent="difference")
    got, _ = hand.stage.loss("student", step, draws(step))
    random = draws(step)
    x0, text, w, hint = drawn(hand, random)
    scm = consistency(hand, x0, text, w, hint, step, random)
    sample, t = fake(hand, x0, text, w, hint, random), angles(random, -0.6, 1.0)
    adversarial = -logits(hand, noised(sample, t, random)[1], t, text, w).mean()
    trained = getattr(hand.stage.student, "transformer", None) or hand.stage.student.branch
    assert_same(got, 0.7 * scm + 0.3 * adversarial, trained if form == "cosine" else hand.stage.student)


def test_the_critics_loss(hand):
    got, _ = hand.stage.loss("critic", 1, draws())
    random = draws()
    x0, text, w, hint = drawn(hand, random)
    _, other, _, _ = drawn(hand, random)
    with torch.no_grad():
        sample = fake(hand, x0, text, w, hint, random)
    real, mine, mismatched = [], [], []
    for found, clean, captions in ((real, x0, text), (mine, sample, text), (mismatched, x0, other)):
        t = angles(random, -0.6, 1.0)  # of its own each
        found.append(logits(hand, noised(clean, t, random)[1], t, captions, w))
    hinge = [nnf.relu(1 + fakes[0]).mean() for fakes in (mine, mismatched)]
    want = nnf.relu(1 - real[0]).mean() + sum(hinge) / 2
    learnt = [p for p in hand.stage.student.parameters() if p.requires_grad]
    assert all(g is None for g in torch.autograd.grad(got, learnt, allow_unused=True, retain_graph=True))
    assert_same(got, want, hand.stage.critic)


def test_what_learns_and_what_is_frozen(hand):
    assert not any(p.requires_grad for p in hand.stage.teacher.parameters())
    learns = {name for name, p in hand.stage.student.named_parameters() if p.requires_grad}
    frozen = {name for name, p in hand.stage.student.named_parameters()} - learns
    assert learns and all(name.startswith(tuple(f"branch.{part}" for part in controlnet.SHARED)) for name in frozen)
    if isinstance(hand, Steered):
        assert frozen and len(hand.stage.student.branch.transformer_blocks) == 2  # half of the trunk's
    assert [block_count(depth) for depth in (20, 28, 6)] == [7, 7, 3]


class Preview64(Preview):
    def noise(self, device):
        return super().noise(device).double()


def test_the_sample_grid_shows_one_step(hand):
    """At the last guidance scale, from the noise of seeds 0 and 1, with the preview's hints."""
    hints = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(9)).double()
    hand.stage.preview = preview = Preview64([torch.ones(3, WIDTH), torch.zeros(2, WIDTH)], SHAPE, lambda x: x, hints)
    noise = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(2)]).double()
    one, text = torch.ones(2).double(), hand.stage.teacher.encode(preview.captions)
    want = noise - hand.velocity(text, 5.0 * one, preview.hints)(noise, one)
    torch.testing.assert_close(hand.stage.samples(hand.stage.student), want)


def test_the_guards_error():
    """One step from the student against 20 Euler steps of the teacher at the middle guidance, over their variance."""
    captions = [torch.ones(3, WIDTH), torch.zeros(2, WIDTH), -torch.ones(4, WIDTH)]
    shown = []

    def judge(latents: Tensor) -> float:
        shown.append(latents)
        return 0.25

    objective = dataclasses.replace(OBJECTIVE, guidance=(2.0, 3.0, 7.0))
    stage = DistillStage(Model().float(), Noise(), objective, watch=Watch(captions, SHAPE, 4.0, judge))
    found = stage.check(stage.student)
    z = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(5000 + i)) for i in range(3)])
    text, null, one = stage.teacher.encode(captions), stage.teacher.encode([""] * 3), torch.ones(3)
    even, x = torch.linspace(1, 0, 21), z
    times = 4 * even / (1 + 3 * even)
    with torch.no_grad():
        for s, s_next in itertools.pairwise(times):
            v, v_null = (stage.teacher.transformer(x, s.expand(3), t[0], mask=t[1]) for t in (text, null))
            x = x + (s_next - s) * (v_null + 0.6 * 3 * (v - v_null))
        mine = z - stage.student.transformer(z, one, text[0], guidance=3 * one, mask=text[1])
    assert found == {"error": pytest.approx(float((mine - x).square().mean() / x.var()), rel=1e-3), "judge": 0.25}
    torch.testing.assert_close(shown[0], mine)
    assert DistillStage(Model().float(), Noise(), objective).check(stage.student) == {}


# --- the teacher --------------------------------------------------------------------------------------


def test_the_teachers_loss():
    """One caption in ten is empty; times are logit-normal, shifted by 3; v is to be z - x0."""
    count = 40
    stage = TeacherStage(Model(), Noise())
    got, _ = stage.loss("teacher", 0, draws(count=count))
    random = draws(count=count)
    batch = Noise().batch(random)
    empty = [n < 0.1 for n in random.uniform().tolist()]
    assert 0 < sum(empty) < count / 4
    captions = ["" if drop else caption for caption, drop in zip(batch.captions, empty, strict=True)]
    text, z = stage.model.encode(captions), random.normal(*SHAPE).double()
    n = random.normal().sigmoid()
    s = (3 * n / (1 + 2 * n)).double()
    x_s = (1 - column(s)) * batch.latents + column(s) * z
    v = stage.model.transformer(x_s, s, text[0], mask=text[1])
    assert_same(got, (v - (z - batch.latents)).square().mean(), stage.model)


def test_the_teachers_sample_grid():
    """20 Euler steps along shifted times, with classifier-free guidance of 4.5."""
    model = Model().float()
    preview = Preview([torch.ones(3, WIDTH), torch.zeros(2, WIDTH)], SHAPE, lambda x: x)
    text, null = model.encode(preview.captions), model.encode(["", ""])
    x = preview.noise(torch.device("cpu"))
    even = torch.linspace(1, 0, 21)
    times = 3 * even / (1 + 2 * even)
    with torch.no_grad():
        got = TeacherStage(model, Noise(), preview=preview).samples(model)
        for s, s_next in itertools.pairwise(times):
            v, v_null = (model.transformer(x, s.expand(2), t[0], mask=t[1]) for t in (text, null))
            x = x + (s_next - s) * (v_null + 4.5 * (v - v_null))
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


# --- the auto-encoder ---------------------------------------------------------------------------------

PX, POOL = 160, 10


def images(seeds) -> Tensor:
    drawn = [torch.rand(3, PX, PX, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in seeds]
    return torch.stack(drawn).double()


@pytest.fixture
def codec() -> Autoencoder:
    codec = Autoencoder(standin.AUTOENCODER)
    codec.load_state_dict(standin.random_model(codec))
    return codec.double()


def reconstruction_loss(image: Tensor, target: Tensor) -> Tensor:
    error = image - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


@pytest.mark.parametrize("step", [4, 5], ids=["crops", "whole"])
def test_the_autoencoders_loss(codec, step):
    """Noise of a twentieth of each channel's spread; the first half of the steps sees squares of 128 px."""
    stage = autoencoder_stages.WholeStage(codec, autoencoder_stages.SeededImages(images, POOL), steps=10)
    got, _ = stage.loss("autoencoder", step, draws())
    random = draws()
    target = images(random.integers(POOL).tolist())
    if step == 4:
        corners = zip(random.integers(PX - 127), random.integers(PX - 127), strict=True)
        target = torch.stack([x[:, i : i + 128, j : j + 128] for x, (i, j) in zip(target, corners, strict=True)])
    latent = codec.encode(target)
    with torch.no_grad():
        spread = latent.movedim(1, 0).flatten(1).std(1)
        noise = 0.05 * spread.view(1, -1, 1, 1) * random.normal(*latent.shape[1:]).double()
    assert_same(got, reconstruction_loss(codec.decode(latent + noise), target), codec)


def test_the_decoders_loss(codec):
    """Noise of a twentieth of the unit that scaled latents have; the encoder is frozen."""
    stage = autoencoder_stages.DecoderStage(codec, autoencoder_stages.SeededImages(images, POOL))
    got, _ = stage.loss("decoder", 0, draws())
    random = draws()
    target = images(random.integers(POOL).tolist())
    latent = codec.encode(target)
    noise = 0.05 / 0.41407 * random.normal(*latent.shape[1:]).double()
    assert_same(got, reconstruction_loss(codec.decode(latent + noise), target), codec.decoder)
    assert not any(p.requires_grad for p in codec.encoder.parameters())
