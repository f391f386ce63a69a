"""Distillation by the methods that compare scores (methods.py): with a fake network, alone or beside sCM and LADD."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ...devices import fp32
from ...trigflow import SIGMA_DATA
from ..engine.phase import Phase
from ..engine.randomness import SampleRandom
from ..losses import score
from ..losses.score import LastStep, Scores
from ..losses.transform import Network, per_sample
from ..methods import METHODS
from ..recipes import Objective
from .base import TextConditioned
from .sprint import Conditioning
from .student import DistillStage
from .teacher import student_of


def distill_stage(teacher: Any, dataset: Any, objective: Objective, *args: Any, **options: Any) -> DistillStage:
    """The stage of the objective's method."""
    kind = RivalStage if METHODS[objective.method].score else DistillStage
    return kind(teacher, dataset, objective, *args, **options)


def plan(objective: Objective) -> tuple[Phase, ...]:
    """In each period the student learns once, then the fake network, and beside it the critic, as often as they are to.

    Until the score takes part, the student learns in every step.
    """
    row = METHODS[objective.method]
    fakes = objective.fakes or row.fakes
    both: dict[str, Any] = {"period": 1 + fakes, "kinds": objective.sampled_steps}
    others = both | {"turns": tuple(range(1, 1 + fakes)), "averaged": False}
    rate, start = objective.fake_rate or row.fake_rate, objective.score_from
    phases = Phase("student", start=start, before=True, **both), Phase("fake", start=start, rate=rate, **others)
    return phases + (Phase("critic", start=objective.ladd_from, **others),) * bool(objective.ladd_weight)


class RivalStage(DistillStage):
    """A student whose samples move by the difference of two scores. Of the data only sCM and the critic see latents.

    The fake network starts as the teacher, with the student's guidance embedding: it is told the same guidance.
    """

    def __init__(self, teacher: TextConditioned, *args: Any, **options: Any):
        super().__init__(teacher, *args, **options)
        self.row = METHODS[self.objective.method]
        self.fake = student_of(teacher.transformer).requires_grad_(True)
        self.modules["fake"] = self.fake
        self.plan = plan(self.objective)

    @property
    def compilable(self) -> tuple[nn.Module, ...]:
        return (*super().compilable, self.fake)

    def constant(self, phase: str, step: int) -> Hashable | None:
        """As many steps of the student's samples, too, as `_simulated` takes."""
        constant = super().constant(phase, step)
        return constant and (constant, step < self.objective.score_from, self._steps_of_samples(step))

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        self.fake.requires_grad_(phase == "fake")  # the student's gradient may pass through it
        if phase != "fake":
            return super().loss(phase, step, random)
        x0, conditioning = self._batch(random)
        with torch.no_grad():
            generate, z = self._simulated(x0, conditioning, step, random)
            samples = generate(z)
        s = score.TIMES[self.row.times](random).to(x0)
        return score.fake_loss(self._fake(conditioning), samples, s, _noise(x0, random)), {}

    def _errors(self, latents: Tensor, ends: Tensor) -> dict[str, float]:
        """The squared distance (Wasserstein's) of Gaussians of each channel, over the teacher's variance.

        Noise by noise, such a student need not do what its teacher does: that error is logged alone.
        """
        parts = [(x.mean((0, 2, 3)), x.std((0, 2, 3))) for x in (latents, ends)]
        error = sum((mine - theirs).square().sum() for mine, theirs in zip(*parts, strict=True))
        logged = super()._errors(latents, ends)["error"]
        return {"error": float(error / parts[1][1].square().sum()), "endpoints": logged}

    def _generated(
        self, x0: Tensor, conditioning: Conditioning, step: int, random: SampleRandom
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the critic judges is what the score moves."""
        if step < self.objective.score_from:
            return super()._generated(x0, conditioning, step, random)
        generate, z = self._simulated(x0, conditioning, step, random)
        s = score.TIMES[self.row.times](random).to(x0)
        scores = Scores(self._real(conditioning), self._fake(conditioning))
        moved = score.SCORES[self.row.score](generate, z, s, scores, _noise(x0, random), self.objective.chain_steps)
        return SIGMA_DATA * moved.samples, {"score": self.objective.score_weight * moved.loss.mean()}

    def _sample(self, x0: Tensor, conditioning: Conditioning, step: int, random: SampleRandom) -> Tensor:
        """The last of 1 to `sampled_steps` steps from noise, rather than of noised data."""
        generate, z = self._simulated(x0, conditioning, step, random)
        return SIGMA_DATA * generate(z)

    def _simulated(
        self, x0: Tensor, conditioning: Conditioning, step: int, random: SampleRandom
    ) -> tuple[LastStep, Tensor]:
        student = functools.partial(self._velocity, self.student, conditioning, around_block=self.around_block)
        return score.simulate(student, x0, self._steps_of_samples(step), random)

    def _steps_of_samples(self, step: int) -> int:
        """Follows from how often the phase has taken part: the same in all processes."""
        phase = next(phase for phase in self.plan if step in phase)
        return phase.count(step) % self.objective.sampled_steps + 1

    def _real(self, conditioning: Conditioning) -> Network:
        """The teacher's velocity under classifier-free guidance."""
        network = functools.partial(self.teacher.transformer, around_block=self.around_block)
        return self._guided(network, conditioning)

    def _fake(self, conditioning: Conditioning) -> Network:
        network = functools.partial(self.fake, guidance=conditioning.guidance, around_block=self.around_block)
        if self.row.fake_guided:
            return self._guided(network, conditioning)
        return functools.partial(network, **conditioning.text)

    def _guided(self, network: Callable[..., Tensor], conditioning: Conditioning) -> Network:
        """v_u + w (v_c - v_u) of v_c with and v_u without the caption."""
        texts = self._empty_text(len(conditioning.guidance)), conditioning.text
        guidance = self.objective.teacher_guidance * conditioning.guidance

        def velocity(x: Tensor, s: Tensor) -> Tensor:
            unconditional, conditional = (fp32(network(x, s, **text)) for text in texts)
            return torch.lerp(unconditional, conditional, per_sample(guidance, x))

        return velocity


def _noise(like: Tensor, random: SampleRandom) -> score.Noise:
    return lambda: random.normal(*like.shape[1:]).to(like)
