"""sCM and LADD together, student and critic in turn (paper, section 3.2): what distillation and ControlNets share."""

import abc
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ... import sampler, trigflow
from ...devices import fp32
from ...models.layers import MLP, sdpa, timestep_embedding
from ...models.transformer import AroundBlock, Attention
from ...trigflow import SIGMA_DATA, add_noise, flow_predict_x0, predict_x0
from ..dataset.batch import Captions, Dataset
from ..dataset.read_ahead import reading_ahead
from ..dataset.resident import ResidentLatents
from ..engine.activation_checkpointing import around_block
from ..engine.phase import Phase
from ..engine.randomness import SampleRandom, initialise
from ..engine.sharding import gather, is_part
from ..engine.stage import Stage, is_logged_next
from ..losses import ladd, scm
from ..losses.jvp import plain_attention
from ..losses.transform import Network, per_sample, trigflow_network
from ..recipes import Objective
from .base import FRESH_SEED, Preview, TextConditioned

TIME_FEATURES = 128


class LogVariance(nn.Module):
    """w(t), the learnt weight of sCM's loss: zero at first. [b] -> [b]."""

    def __init__(self):
        super().__init__()
        self.mlp = MLP(TIME_FEATURES, 64, nn.SiLU())
        self.out = nn.Linear(64, 1)

    def forward(self, t: Tensor) -> Tensor:
        return self.out(self.mlp(timestep_embedding(t, TIME_FEATURES)))[:, 0]


class Weighted(nn.Module, abc.ABC):
    """A network that sCM trains, with the weight of its loss."""

    log_variance: LogVariance

    @property
    @abc.abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients tell how loud each loss is."""


Trained = TypeVar("Trained", bound=Weighted)


@dataclass(frozen=True)
class Conditioning:
    """What the student is conditioned on: guidance scales [b], captions and their mask, and a ControlNet's hints."""

    guidance: Tensor
    text: Mapping[str, Tensor]  # caption [b, n, c], mask [b, n]
    hint: Tensor | None = None


def plan(objective: Objective) -> tuple[Phase, ...]:
    """Student and critic in turn from where the adversary takes part; before that, and without it, the student alone.

    The average moves after the critic's updates too: `ema` was chosen so.
    """
    if not objective.ladd_weight:
        return (Phase("student"),)
    student = Phase("student", period=2, start=objective.ladd_from, before=True)
    return student, Phase("critic", period=2, turns=(1,), start=objective.ladd_from)


class SprintStage(Stage[Trained], Generic[Trained]):
    """Student and critic in turn. The teacher, whose blocks the critic reads, and its text encoder are frozen."""

    averaged = "student"

    def __init__(
        self,
        teacher: TextConditioned,
        student: Trained,
        dataset: Dataset,
        objective: Objective,
        preview: Preview | None,
        activation_checkpointing: bool,
    ):
        self.teacher = teacher.requires_grad_(False).eval()
        self.student = student
        config = teacher.transformer.config
        self.critic = ladd.Critic(config.width, config.depth)
        modules: dict[str, nn.Module] = {"student": self.student, "critic": self.critic}
        super().__init__(modules, {"latents": dataset.fingerprint, **objective.chosen}, plan(objective))
        for fresh in (student.log_variance, self.critic):
            initialise(fresh, FRESH_SEED)
        for parameter in student.log_variance.out.parameters():
            nn.init.zeros_(parameter)
        for module in self.modules.values():
            module.to(next(teacher.transformer.parameters()).device)
        self.dataset = dataset
        self.objective = objective
        self.preview = preview
        self.around_block = around_block(activation_checkpointing)
        self.proposal = scm.Proposal(objective.noise_mean, objective.noise_std)
        self.critic_proposal = scm.Proposal(objective.critic_mean, objective.critic_std)

    def reading_ahead(self, asked: Iterator[tuple[str, SampleRandom]]) -> AbstractContextManager:
        """The critic reads the captions of others, too."""
        randoms = (random for phase, random in asked for _ in range(2 if phase == "critic" else 1))
        return reading_ahead(self.dataset, randoms, self.device)

    def constant(self, phase: str, step: int) -> Hashable | None:
        """Of sCM once its tangent is warm, unless that is found by forward-mode differentiation."""
        aim = self.objective
        warms = aim.scm_weight and aim.form != "flow" and self._warmth(step) < 1
        if warms or aim.is_forward_mode or not isinstance(self.dataset, ResidentLatents):
            return None
        return self._adversary(step), self._is_logged(step)

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        x0, conditioning = self._batch(random)
        if phase == "critic":
            return self._critic_loss(x0, conditioning, step, random)
        metrics = {}
        losses = {}
        if self.objective.scm_weight:
            consistency, metrics = self._scm_loss(x0, conditioning, step, random)
            losses["scm"] = self.objective.scm_weight * consistency
        sample, of_sample = self._generated(x0, conditioning, step, random)
        losses |= of_sample
        if sample is not None and self._adversary(step):
            adversarial = self._generator_loss(sample, conditioning, random)
            losses["ladd"] = self.objective.ladd_weight * adversarial
            metrics["adversarial"] = adversarial.detach()
        if self._is_logged(step) and not is_part(self.student.last_layer):  # which in parts has no gradient of its own
            metrics |= {f"{name}_grad": self._loudness(loss) for name, loss in losses.items()}
        return torch.stack(list(losses.values())).sum(), metrics

    def clipped_apart(self, phase: str) -> Sequence[nn.Module]:
        """sCM's weight apart from the network: its gradient is up to a hundred times as large."""
        return tuple(self.student.children()) if phase == "student" else super().clipped_apart(phase)

    def samples(self, average: Trained) -> Tensor | None:
        """From the preview's captions, in as many steps as it says."""
        if self.preview is None:
            return None
        z, guidance = self.preview.noise(self.device), self.objective.guidance[-1]
        inputs = z, self.preview.captions, guidance, self.preview.hints
        return self.preview.decode(torch.cat([self._sampled(steps, average, *inputs) for steps in self.preview.steps]))

    # --- what distillation and ControlNets do differently -------------------------------------------------

    @abc.abstractmethod
    def _trajectory(self, x0: Tensor, z: Tensor, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """dx_t/dt [b, c, h, w], along which the student is to be consistent."""

    @abc.abstractmethod
    def _velocity(
        self,
        student: Trained,
        conditioning: Conditioning,
        x: Tensor,
        s: Tensor,
        attention: Attention = sdpa,
        around_block: AroundBlock | None = None,
    ) -> Tensor:
        """The student's flow velocity at x [b, c, h, w] and flow times s [b]."""

    @abc.abstractmethod
    def _judge(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The critic's logits of noised latents."""

    # --- the losses -----------------------------------------------------------------------------------

    def _scm_loss(
        self, x0: Tensor, conditioning: Conditioning, step: int, random: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        t = self.proposal.draw(random).to(x0)
        z, x_t = self._noised(x0, t, random)
        with torch.no_grad():
            dxdt = self._trajectory(x0, z, x_t, t, conditioning)
        if self.objective.form == "flow":
            F, g = scm.velocity_target(self._student(conditioning), x_t, t, dxdt)
            metrics = {}
        else:
            F, g, metrics = self._tangent_target(x_t, t, dxdt, conditioning, step)
        loss = scm.loss(F, g, t, self.student.log_variance, self.objective.form)
        return loss, metrics | {"scm": loss.detach(), "x_error": (SIGMA_DATA * F.detach() - dxdt).square().mean()}

    def _tangent_target(
        self, x_t: Tensor, t: Tensor, dxdt: Tensor, conditioning: Conditioning, step: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if self.objective.is_forward_mode:
            gather(self.student)
        forward_mode = functools.partial(self._velocity, self.student, conditioning, attention=plain_attention)
        networks = self._student(conditioning), trigflow_network(forward_mode)
        r, tangent = self._warmth(step), self.objective.tangent
        return scm.tangent_target(networks[0], x_t, t, dxdt, r, networks[1], tangent)

    def _generated(
        self, x0: Tensor, conditioning: Conditioning, step: int, random: SampleRandom
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The samples that the critic judges, if any, and weighted losses of their own."""
        return (self._sample(x0, conditioning, step, random) if self._adversary(step) else None), {}

    def _generator_loss(self, sample: Tensor, conditioning: Conditioning, random: SampleRandom) -> Tensor:
        return ladd.generator_loss(self._noised_logits(sample, conditioning, random))

    def _critic_loss(
        self, x0: Tensor, conditioning: Conditioning, step: int, random: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Fakes are the student's samples, and true latents with the captions of others."""
        _, other = self._batch(random)
        mismatched = replace(conditioning, text=other.text)
        with torch.no_grad():
            sample = self._sample(x0, conditioning, step, random)
        real = self._noised_logits(x0, conditioning, random)
        fake = self._noised_logits(sample, conditioning, random)
        metrics = {"real": real.detach().mean(), "fake": fake.detach().mean()}
        return ladd.critic_loss(real, [fake, self._noised_logits(x0, mismatched, random)]), metrics

    def _loudness(self, loss: Tensor) -> Tensor:
        """The norm of its gradient in the last layer, which costs no backward pass through the student."""
        return torch.autograd.grad(loss, self.student.last_layer, retain_graph=True)[0].norm()

    def _noised_logits(self, x0: Tensor, conditioning: Conditioning, random: SampleRandom) -> Tensor:
        """The critic's, of latents that are noised to angles of their own."""
        t = self.critic_proposal.draw(random).to(x0)
        return self._judge(ladd.renoise(x0, t, random), t, conditioning)

    @torch.no_grad()
    def _one_step(
        self, student: Trained, z: Tensor, captions: Captions, guidance: float, hints: Tensor | None = None
    ) -> Tensor:
        """Scaled latents of one step from noise z [b, c, h, w]."""
        return self._sampled(1, student, z, captions, guidance, hints)

    @torch.no_grad()
    def _sampled(
        self, steps: int, student: Trained, z: Tensor, captions: Captions, guidance: float, hints: Tensor | None = None
    ) -> Tensor:
        """Scaled latents of the sampler's steps from noise z [b, c, h, w], later noise being the same every time."""
        conditioning = Conditioning(z.new_full((len(z),), guidance), self._text(captions), hints)

        def denoise(x_s: Tensor, s: Tensor) -> Tensor:
            times = s.to(x_s).expand(len(x_s))
            return flow_predict_x0(fp32(self._velocity(student, conditioning, x_s, times)), x_s, s.to(x_s))

        noise = sampler.StepNoise(range(len(z)), z.shape[1:], z.device)
        return sampler.sample(denoise, z, torch.tensor(trigflow.sigmas("paper", steps)), noise)

    # --- their parts ----------------------------------------------------------------------------------

    def _batch(self, random: SampleRandom) -> tuple[Tensor, Conditioning]:
        """x0 of standard deviation sigma_data, and what the student is conditioned on."""
        batch = self.dataset.batch(random)
        x0 = SIGMA_DATA * batch.latents.to(self.device)
        guidance = random.choice(self.objective.guidance).to(x0)
        hint = None if batch.hints is None else batch.hints.to(self.device)
        return x0, Conditioning(guidance, self._text(batch.captions), hint)

    def _sample(self, x0: Tensor, conditioning: Conditioning, step: int, random: SampleRandom) -> Tensor:
        """The student's prediction from angles of the generator, half of them at pi/2."""
        t = ladd.generator_angles(self.proposal, self.objective.max_time_share, random).to(x0)
        _, x_t = self._noised(x0, t, random)
        return predict_x0(self._student(conditioning)(x_t / SIGMA_DATA, t), x_t, per_sample(t, x_t))

    def _noised(self, x0: Tensor, t: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """Noise z of standard deviation sigma_data, and x_t."""
        z = SIGMA_DATA * random.normal(*x0.shape[1:]).to(x0)
        return z, add_noise(x0, z, per_sample(t, x0))

    def _student(self, conditioning: Conditioning) -> Network:
        """The student as a TrigFlow network F(x_t / sigma_data, t)."""
        velocity = functools.partial(self._velocity, self.student, conditioning, around_block=self.around_block)
        return trigflow_network(velocity)

    def _warmth(self, step: int) -> float:
        """r in [0, 1], how much of the tangent's unstable part counts."""
        return min(1.0, step / max(1, self.objective.tangent_warmup_steps))

    def _is_logged(self, step: int) -> bool:
        return is_logged_next(step, max(phase.period for phase in self.plan))

    def _adversary(self, step: int) -> bool:
        return self.objective.ladd_weight > 0 and step >= self.objective.ladd_from

    @torch.no_grad()
    def _text(self, captions: Captions) -> dict[str, Tensor]:
        caption, mask = self.teacher.encode(captions)
        return {"caption": caption, "mask": mask}

    @torch.no_grad()
    def _empty_text(self, count: int) -> dict[str, Tensor]:
        caption, mask = self.teacher.encode_empty(count)
        return {"caption": caption, "mask": mask}
