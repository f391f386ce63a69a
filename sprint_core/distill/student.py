"""The distillation stage: sCM and LADD together, student and critic in turn (paper, section 3.2)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import MLP, timestep_embedding
from ..transformer import SanaTransformer
from ..trigflow import SIGMA_DATA, add_noise, predict_x0
from . import ladd, scm
from .jvp import plain_attention
from .randomness import SampleRandom
from .teacher import Batch, Captioned, student_of
from .transform import per_sample, trigflow_network


@dataclass(frozen=True)
class Recipe:
    """What the paper's ablations vary; the defaults are the published configuration."""

    guidance: tuple[float, ...] = (4.0, 4.5, 5.0)
    scm_weight: float = 1.0
    ladd_weight: float = 0.5
    tangent_warmup_steps: int = 4000
    proposal: scm.Proposal = scm.PROPOSAL
    critic_proposal: scm.Proposal = ladd.CRITIC_PROPOSAL


class LogVariance(nn.Module):
    """w(t), the learnt weight of sCM's loss: zero at first. [b] -> [b]."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.mlp = MLP(128, width, nn.SiLU())
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, t: Tensor) -> Tensor:
        return self.out(self.mlp(timestep_embedding(t, 128)))[:, 0]


class Student(nn.Module):
    def __init__(self, transformer: SanaTransformer):
        super().__init__()
        self.transformer, self.log_variance = transformer, LogVariance()


class DistillStage:
    """Student and critic in turn. The teacher and its text encoder are frozen."""

    name, averaged = "distill", "student"

    def __init__(self, teacher: Captioned, batch: Batch, recipe: Recipe):
        self.teacher = teacher.requires_grad_(False).eval()
        config = teacher.transformer.config
        self.modules = {
            "student": Student(student_of(teacher.transformer).requires_grad_(True)),
            "critic": ladd.Critic(config.width, config.depth),
        }
        self.batch, self.recipe = batch, recipe

    def phases(self, step: int) -> tuple[str, ...]:
        """In turn; without the adversary, the student alone."""
        adversary = self.recipe.ladd_weight > 0
        return ("critic",) if adversary and step % 2 else ("student",)

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        latents, captions = self.batch(random)
        x0, w = SIGMA_DATA * latents, random.choice(self.recipe.guidance).to(latents)
        with torch.no_grad():
            condition = dict(zip(("caption", "mask"), self.teacher.encode(captions)))
        if phase == "critic":
            return self._critic_loss(x0, w, condition, captions, random)
        total, metrics = x0.new_zeros(()), {}
        if self.recipe.scm_weight:
            consistency, metrics = self._scm_loss(x0, w, condition, step, random)
            total = total + self.recipe.scm_weight * consistency
        if self.recipe.ladd_weight:
            adversarial = ladd.generator_loss(self._judge(self._sample(x0, w, condition, random), condition, random))
            total = total + self.recipe.ladd_weight * adversarial
            metrics["adversarial"] = adversarial.detach()
        return total, metrics

    def _scm_loss(self, x0: Tensor, w: Tensor, condition: dict, step: int, random: SampleRandom):
        student = self.modules["student"]
        t, x_t = self._noised(x0, self.recipe.proposal.draw(random).to(x0), random)
        with torch.no_grad():
            nulls = dict(zip(("caption", "mask"), self.teacher.encode([""] * len(x0))))
            dxdt = scm.guided_velocity(self._teacher, x_t / SIGMA_DATA, t, w, condition, nulls)
        r = min(1.0, step / max(1, self.recipe.tangent_warmup_steps))
        F, g, metrics = scm.tangent_target(self._student(w, condition), x_t, t, dxdt, r)
        loss = scm.loss(F, g, t, student.log_variance(t))
        return loss, metrics | {"scm": loss.detach(), "x_error": (SIGMA_DATA * F.detach() - dxdt).square().mean()}

    def _critic_loss(self, x0: Tensor, w: Tensor, condition: dict, captions: Sequence[str], random: SampleRandom):
        with torch.no_grad():
            fake = self._sample(x0, w, condition, random)
        t = self.recipe.critic_proposal.draw(random).to(x0)
        real, fake = ladd.renoise(x0, t, random), ladd.renoise(fake, t, random)
        others = dict(zip(("caption", "mask"), self.teacher.encode([*captions[1:], captions[0]])))
        judge = functools.partial(self.modules["critic"], self.teacher.transformer)
        logits = [judge(x, t, **c) for x, c in ((real, condition), (fake, condition), (real, others))]
        metrics = {"real": logits[0].detach().mean(), "fake": logits[1].detach().mean()}
        return ladd.critic_loss(logits[0], logits[1:]), metrics

    def _judge(self, x0: Tensor, condition: dict, random: SampleRandom) -> Tensor:
        t = self.recipe.critic_proposal.draw(random).to(x0)
        return self.modules["critic"](self.teacher.transformer, ladd.renoise(x0, t, random), t, **condition)

    def _sample(self, x0: Tensor, w: Tensor, condition: dict, random: SampleRandom) -> Tensor:
        """The student's prediction from angles of the generator, half of them at pi/2."""
        t, x_t = self._noised(x0, ladd.generator_angles(self.recipe.proposal, random).to(x0), random)
        F = self._student(w, condition)(x_t / SIGMA_DATA, t)
        return predict_x0(F, x_t, per_sample(t, x_t))

    def _noised(self, x0: Tensor, t: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor]:
        z = SIGMA_DATA * random.normal(*x0.shape[1:]).to(x0)
        return t, add_noise(x0, z, per_sample(t, x0))

    def _student(self, w: Tensor, condition: dict):
        network = self.modules["student"].transformer
        return trigflow_network(lambda x, s: network(x, s, guidance=w, attention=plain_attention, **condition))

    def _teacher(self, x: Tensor, t: Tensor, condition: dict) -> Tensor:
        return trigflow_network(lambda x, s: self.teacher.transformer(x, s, **condition))(x, t)
