"""The distillation stage: sCM and LADD together, student and critic in turn (paper, section 3.2)."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...models.layers import MLP, sdpa, timestep_embedding
from ...models.transformer import SanaTransformer
from ...trigflow import SIGMA_DATA, add_noise, flow_predict_x0, predict_x0
from ...weights import checkpoint, layouts
from ..engine.randomness import SampleRandom, initialise
from ..engine.recompute import kept, recomputed
from ..losses import ladd, scm
from ..losses.jvp import plain_attention
from ..losses.transform import Network, per_sample, trigflow_network
from ..recipes import Objective
from .base import FRESH_SEED, Data, Encoding, Preview
from .teacher import student_of


class LogVariance(nn.Module):
    """w(t), the learnt weight of sCM's loss: zero at first. [b] -> [b]."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.mlp = MLP(128, width, nn.SiLU())
        self.out = nn.Linear(width, 1)

    def forward(self, t: Tensor) -> Tensor:
        return self.out(self.mlp(timestep_embedding(t, 128)))[:, 0]


class Student(nn.Module):
    def __init__(self, transformer: SanaTransformer):
        super().__init__()
        self.transformer, self.log_variance = transformer, LogVariance()


def continued(path: Path) -> Callable[[SanaTransformer], SanaTransformer]:
    """Start from the SANA-Sprint in a file rather than from its teacher. Raises CheckpointError; so does the start."""
    weights = checkpoint.load(path, layouts.TRANSFORMER)

    def start(teacher: SanaTransformer) -> SanaTransformer:
        if weights.config != replace(teacher.config, guidance_embed=True):
            raise checkpoint.CheckpointError(f"{path}: no student of this teacher: {weights.config}, {teacher.config}")
        device = next(teacher.parameters()).device
        return copy.deepcopy(checkpoint.build(weights, dtype=torch.float32, device=device))  # out of its file

    return start


@dataclass(frozen=True)
class Given:
    """What the student is told: the guidance scale w [b], caption and mask, and a ControlNet's hint."""

    w: Tensor
    text: Mapping[str, Tensor]
    hint: Tensor | None = None


class DistillStage:
    """Student and critic in turn. The teacher and its text encoder are frozen."""

    name, averaged = "distill", "student"

    def __init__(
        self,
        teacher: Encoding,
        data: Data,
        objective: Objective,
        preview: Preview | None = None,
        recompute: bool = False,
        start: Callable[[SanaTransformer], SanaTransformer] = student_of,
    ):
        self.teacher = teacher.requires_grad_(False).eval()
        student = Student(start(teacher.transformer).requires_grad_(True))
        self._prepare(student, data, objective, preview, recompute)

    def _prepare(
        self, student: nn.Module, data: Data, objective: Objective, preview: Preview | None, recompute: bool
    ) -> None:
        """student: any module with a `log_variance`."""
        config = self.teacher.transformer.config
        self.modules = {"student": student, "critic": ladd.Critic(config.width, config.depth)}
        for fresh in (student.log_variance, self.modules["critic"]):
            initialise(fresh, FRESH_SEED)
        for parameter in student.log_variance.out.parameters():
            nn.init.zeros_(parameter)
        for module in self.modules.values():
            module.to(next(self.teacher.transformer.parameters()).device)
        self.data, self.objective, self.preview = data, objective, preview
        self.around = recomputed if recompute else kept
        self.proposal = scm.Proposal(objective.noise_mean, objective.noise_std)
        self.critic_proposal = scm.Proposal(objective.critic_mean, objective.critic_std)
        self.settings = {"latents": data.identity, **objective.chosen}

    def phases(self, step: int) -> tuple[str, ...]:
        """In turn; without the adversary, the student alone."""
        return ("critic",) if self._adversary(step) and step % 2 else ("student",)

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        x0, given = self._batch(random)
        if phase == "critic":
            return self._critic_loss(x0, given, random)
        total, metrics = x0.new_zeros(()), {}
        if self.objective.scm_weight:
            consistency, metrics = self._scm_loss(x0, given, step, random)
            total = total + self.objective.scm_weight * consistency
        if self._adversary(step):
            fake = self._sample(x0, given, random)
            angle = self.critic_proposal.draw(random).to(x0)
            adversarial = ladd.generator_loss(self._judge(ladd.renoise(fake, angle, random), angle, given))
            total = total + self.objective.ladd_weight * adversarial
            metrics["adversarial"] = adversarial.detach()
        return total, metrics

    def samples(self, average: nn.Module) -> Tensor | None:
        """One step each from the preview's captions."""
        if self.preview is None:
            return None
        z = self.preview.noise(self._device)
        times = z.new_ones(len(z))
        given = Given(times * self.objective.guidance[-1], self._text(self.preview.captions), self.preview.hints)
        v = self._velocity(average, given, z, times)
        return self.preview.decode(flow_predict_x0(v, z, 1.0))

    # --- what a ControlNet's stage does otherwise -----------------------------------------------------

    def _batch(self, random: SampleRandom) -> tuple[Tensor, Given]:
        """x0 of standard deviation sigma_data, and what the student is told of it."""
        latents, captions = self.data.batch(random)
        x0 = SIGMA_DATA * latents.to(self._device)
        w = random.choice(self.objective.guidance).to(x0)
        return x0, Given(w, self._text(captions))

    def _trajectory(self, x0: Tensor, z: Tensor, x_t: Tensor, t: Tensor, given: Given) -> Tensor:
        """dx_t/dt along which the student is to be consistent: the guided teacher's."""
        nulls = self._text([""] * len(x_t))
        return scm.guided_velocity(self._teacher, x_t / SIGMA_DATA, t, given.w, given.text, nulls)

    def _velocity(self, student: nn.Module, given: Given, x: Tensor, s: Tensor, attention=sdpa, around=None) -> Tensor:
        """The student's flow velocity; around: as SanaTransformer's around_block."""
        return student.transformer(x, s, guidance=given.w, attention=attention, around_block=around, **given.text)

    def _judge(self, x_t: Tensor, t: Tensor, given: Given) -> Tensor:
        """The critic's logits of a noised picture."""
        return self.modules["critic"](self.teacher.transformer, x_t, t, around=self.around, **given.text)

    # --- the losses -----------------------------------------------------------------------------------

    def _scm_loss(self, x0: Tensor, given: Given, step: int, random: SampleRandom):
        student = self.modules["student"]
        t = self.proposal.draw(random).to(x0)
        z, x_t = self._noised(x0, t, random)
        with torch.no_grad():
            dxdt = self._trajectory(x0, z, x_t, t, given)
        r = min(1.0, step / max(1, self.objective.tangent_warmup_steps))
        plain = trigflow_network(functools.partial(self._velocity, student, given, attention=plain_attention))
        F, g, metrics = scm.tangent_target(self._student(given), x_t, t, dxdt, r, plain)
        loss = scm.loss(F, g, t, student.log_variance(t))
        return loss, metrics | {"scm": loss.detach(), "x_error": (SIGMA_DATA * F.detach() - dxdt).square().mean()}

    def _critic_loss(self, x0: Tensor, given: Given, random: SampleRandom):
        _, strangers = self._batch(random)
        wrong = replace(given, text=strangers.text)  # captions of other pictures
        with torch.no_grad():
            fake = self._sample(x0, given, random)
        t = self.critic_proposal.draw(random).to(x0)
        real, fake = ladd.renoise(x0, t, random), ladd.renoise(fake, t, random)
        logits = [self._judge(x_t, t, told) for x_t, told in ((real, given), (fake, given), (real, wrong))]
        metrics = {"real": logits[0].detach().mean(), "fake": logits[1].detach().mean()}
        return ladd.critic_loss(logits[0], logits[1:]), metrics

    def _sample(self, x0: Tensor, given: Given, random: SampleRandom) -> Tensor:
        """The student's prediction from angles of the generator, half of them at pi/2."""
        t = ladd.generator_angles(self.proposal, self.objective.max_time_share, random).to(x0)
        _, x_t = self._noised(x0, t, random)
        return predict_x0(self._student(given)(x_t / SIGMA_DATA, t), x_t, per_sample(t, x_t))

    def _noised(self, x0: Tensor, t: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """Noise z of standard deviation sigma_data, and x_t."""
        z = SIGMA_DATA * random.normal(*x0.shape[1:]).to(x0)
        return z, add_noise(x0, z, per_sample(t, x0))

    def _student(self, given: Given) -> Network:
        student = self.modules["student"]
        return trigflow_network(functools.partial(self._velocity, student, given, around=self.around))

    def _teacher(self, x: Tensor, t: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        return trigflow_network(lambda x, s: self.teacher.transformer(x, s, **text))(x, t)

    def _adversary(self, step: int) -> bool:
        return self.objective.ladd_weight > 0 and step >= self.objective.ladd_from

    def _text(self, captions: Sequence) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(("caption", "mask"), self.teacher.encode(captions)))

    @property
    def _device(self) -> torch.device:
        return next(self.modules["student"].parameters()).device
