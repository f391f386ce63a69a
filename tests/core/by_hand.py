"""What a student's losses ask of a stage, written out in a few lines of float64 with the same draws."""

import dataclasses
import math

import standin
import torch
from torch import Tensor

from sprint_core.distill.dataset.batch import Batch
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.recipes import Objective
from sprint_core.distill.stages.base import TextConditioned
from sprint_core.distill.stages.sprint import SprintStage
from sprint_core.models.transformer import SanaTransformer, TransformerConfig
from sprint_core.text.encoder import pad_embeddings

SIGMA, B, SHAPE, WIDTH = 0.5, 3, (32, 2, 3), 24
CONFIG = TransformerConfig(width=64, depth=4, cross_heads=2, caption_width=WIDTH, guidance_embed=False)
OBJECTIVE = Objective(
    guidance=(4.0, 5.0),
    teacher_guidance=0.6,
    scm_weight=0.7,
    ladd_weight=0.3,
    max_time_share=0.5,
    tangent_warmup_steps=8,
)


class Model(TextConditioned):
    """Captions are their own embeddings; "" is two tokens of ones."""

    def __init__(self, config: TransformerConfig = CONFIG):
        super().__init__()
        self.transformer = SanaTransformer(config)
        self.transformer.load_state_dict(standin.random_model(self.transformer))
        self.double()

    def encode(self, captions):
        like = next(self.parameters())
        return pad_embeddings([(torch.ones(2, WIDTH) if isinstance(c, str) else c).to(like) for c in captions])


class Noise:
    """Latents, captions of 2 to 5 tokens, and hints."""

    fingerprint = "noise"

    def batch(self, random: SampleRandom) -> Batch:
        captions = [row[: 2 + n] for row, n in zip(random.normal(5, WIDTH), random.integers(4), strict=True)]
        return Batch(random.normal(*SHAPE).double(), captions, random.normal(*SHAPE).double())


def column(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)


def draws(step: int = 0, count: int = B) -> SampleRandom:
    return SampleRandom(0, step, "", range(count))


def gradients(loss: Tensor, module: torch.nn.Module) -> Tensor:
    """Of everything that learns, in one row."""
    learnt = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, learnt, allow_unused=True)
    assert sum(g is not None for g in gradients) > 0.8 * len(gradients)
    pairs = zip(learnt, gradients, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in pairs])


def assert_same(got: Tensor, want: Tensor, module: torch.nn.Module) -> None:
    """Of two losses: their values and gradients."""
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-6, atol=1e-8)
    first, second = gradients(got, module), gradients(want, module)
    assert (first - second).norm() <= 1e-5 * second.norm()


def trigflow_output(velocity, x: Tensor, t: Tensor) -> Tensor:
    """Eq. (2): F(x, t) of a flow network."""
    s, c = t.sin(), t.cos()
    return (column(c - s) * x + velocity(x / column(c + s), s / (s + c))) / column(c + s)


@dataclasses.dataclass
class Distilled:
    """What the two losses ask of a stage, by hand: of the student of a teacher."""

    stage: SprintStage

    def velocity(self, text, w, hint):
        return lambda x, s: self.stage.student.transformer(x, s, text[0], guidance=w, mask=text[1])

    def trajectory(self, x0, z, x_t, t, text, w):
        null = self.stage.teacher.encode([""] * B)
        teacher = lambda text: lambda x, s: self.stage.teacher.transformer(x, s, text[0], mask=text[1])  # noqa: E731
        conditional, unconditional = (trigflow_output(teacher(one), x_t / SIGMA, t) for one in (text, null))
        return SIGMA * (unconditional + column(0.6 * w) * (conditional - unconditional))

    def condition(self, w):
        return {}


class Steered(Distilled):
    """Of a ControlNet on its trunk: the image's own trajectory, and guidance wherever the trunk runs."""

    def velocity(self, text, w, hint):
        def run(x, s):
            residuals = self.stage.student.branch(x, s, text[0], hint, guidance=w, mask=text[1])
            return self.stage.teacher.transformer(x, s, text[0], guidance=w, mask=text[1], control=residuals)

        return run

    def trajectory(self, x0, z, x_t, t, text, w):
        return -column(t.sin()) * x0 + column(t.cos()) * z

    def condition(self, w):
        return {"guidance": w}


def angles(random: SampleRandom, mean: float, std: float) -> Tensor:
    """tan t = exp(n) / sigma_data, n ~ N(mean, std^2)."""
    return torch.atan((random.normal() * std + mean).exp() / SIGMA).double()


def noised(x0: Tensor, t: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor]:
    z = SIGMA * random.normal(*SHAPE).double()
    return z, column(t.cos()) * x0 + column(t.sin()) * z


def drawn(hand: Distilled, random: SampleRandom):
    """x0, text, guidance and hint."""
    batch = Noise().batch(random)
    w = torch.tensor([OBJECTIVE.guidance[i] for i in random.integers(2)]).double()
    return SIGMA * batch.latents, hand.stage.teacher.encode(batch.captions), w, batch.hints


def fake(hand: Distilled, x0, text, w, hint, random: SampleRandom) -> Tensor:
    """The student's prediction; half of its angles are pi/2."""
    t = angles(random, 0.2, 1.6)
    t = torch.where(random.uniform() < 0.5, torch.tensor(math.pi / 2), t.float()).double()
    _, x_t = noised(x0, t, random)
    F = trigflow_output(hand.velocity(text, w, hint), x_t / SIGMA, t)
    return column(t.cos()) * x_t - column(t.sin()) * SIGMA * F


def logits(hand: Distilled, x_t, t, text, w) -> Tensor:
    """Outputs of the teacher's blocks, under the heads."""
    s, c, outputs = t.sin(), t.cos(), []

    def keep(i, run, x, caption):
        outputs.append(run(x, caption))
        return outputs[-1]

    x_s = x_t / (SIGMA * column(c + s))
    teacher, critic = hand.stage.teacher.transformer, hand.stage.critic
    teacher(x_s, s / (s + c), text[0], mask=text[1], around_block=keep, **hand.condition(w))
    heads = zip(critic.blocks, critic.heads, strict=True)
    return torch.cat([head(outputs[i], SHAPE[1:]).flatten(1) for i, head in heads], dim=1)


def consistency(hand: Distilled, x0, text, w, hint, step: int, random: SampleRandom) -> Tensor:
    """sCM's loss: the published one, the derivative of F by central differences; or what holds."""
    t = angles(random, 0.2, 1.6)
    z, x_t = noised(x0, t, random)
    c, s, h = column(t.cos()), column(t.sin()), 1e-5
    velocity = hand.velocity(text, w, hint)
    F = trigflow_output(velocity, x_t / SIGMA, t)
    with torch.no_grad():
        dxdt = hand.trajectory(x0, z, x_t, t, text, w)
        if hand.stage.objective.form == "cosine":
            h = column(0.1 * t)
            x = h.cos() * x_t - h.sin() * dxdt
            early = column(0.9 * t)
            f = early.cos() * x - early.sin() * SIGMA * trigflow_output(velocity, x / SIGMA, 0.9 * t)
            change = SIGMA * s * c / h * ((c * x_t - f) / (SIGMA * s) - F)
            r = min(1, step / 8)
            g = -(1 - r) * c**2 * (SIGMA * F - dxdt) + r * change
            target = F + g / (column(g.flatten(1).norm(dim=1)) + 0.1)
    if hand.stage.objective.form == "cosine":
        return ((F - target).square().flatten(1).sum(1) * t.cos()).mean()
    with torch.no_grad():
        dx, dt = c * s * dxdt / SIGMA, t.cos() * t.sin()
        ends = [trigflow_output(velocity, x_t / SIGMA + e * dx, t + e * dt) for e in (h, -h)]
        dF = (ends[0] - ends[1]) / (2 * h)
        g = -(c**2) * (SIGMA * F - dxdt) - min(1, step / 8) * (c * s * x_t + SIGMA * dF)
        target = F + g / (column(g.flatten(1).norm(dim=1)) + 0.1)
    weight = hand.stage.student.log_variance(t)
    return ((F - target).square().flatten(1).mean(1) / (SIGMA * t.tan()) * (-weight).exp() + weight).mean()
