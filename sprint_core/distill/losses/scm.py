"""Continuous-time consistency distillation, sCM (paper, sections 3.1 and 3.2).

The student's prediction f(x_t, t) = cos t x_t - sin t sigma_d F is trained to stay the same along the
teacher's trajectory dx_t/dt. All functions are pure. Shapes: samples [b, c, h, w], angles and
weights [b]; x_t has standard deviation sigma_data, networks F take x_t / sigma_data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...trigflow import SIGMA_DATA, T_MAX
from ..engine.randomness import SampleRandom
from .jvp import tangent
from .transform import Network, per_sample

TANGENT_EPS = 0.1  # in g / (||g|| + 0.1)


@dataclass(frozen=True)
class Proposal:
    """Angles with tan t = exp(n) / sigma_data, n ~ N(mean, std^2)."""

    mean: float
    std: float

    def draw(self, random: SampleRandom) -> Tensor:
        """[b] angles in (0, pi/2)."""
        n = random.normal() * self.std + self.mean
        return torch.atan(n.exp() / SIGMA_DATA).clamp(max=T_MAX)


def guided_velocity(teacher: Callable[..., Tensor], x: Tensor, t: Tensor, w: Tensor, captions, nulls) -> Tensor:
    """dx_t/dt of the teacher with classifier-free guidance w [b]: sigma_d (F_u + w (F_c - F_u)).

    teacher(x, t, captions) is a TrigFlow network; captions and nulls may be anything it takes.
    """
    conditional, unconditional = teacher(x, t, captions), teacher(x, t, nulls)
    return SIGMA_DATA * torch.lerp(unconditional, conditional, per_sample(w, x))


def tangent_target(
    student: Network, x_t: Tensor, t: Tensor, dxdt: Tensor, r: float, forward_mode: Network | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """F(x_t / sigma_d, t) with its graph, the normalised tangent g, and metrics.

    g = -cos^2 t (sigma_d F - dx_t/dt) - r (cos t sin t x_t + sigma_d dF), where dF is the derivative of
    F along cos t sin t (dx_t/dt / sigma_d, 1), and r in [0, 1] is the warm-up of the unstable part.
    forward_mode: the same student in operations that forward-mode differentiation knows, if it is not already.
    """
    angle = per_sample(t, x_t)
    cos, sin = angle.cos(), angle.sin()
    direction = (cos * sin * dxdt / SIGMA_DATA, t.cos() * t.sin())
    dF = tangent(forward_mode or student, x_t / SIGMA_DATA, t, *direction)
    F = student(x_t / SIGMA_DATA, t)  # apart from the tangent: a graph through both would keep three times as much
    still = F.detach()
    g = -(cos**2) * (SIGMA_DATA * still - dxdt) - r * (cos * sin * x_t + SIGMA_DATA * dF)
    norm = g.flatten(1).norm(dim=1)
    metrics = {"g_norm": norm.mean(), "dF_norm": dF.flatten(1).norm(dim=1).mean()}
    return F, g / (per_sample(norm, g) + TANGENT_EPS), metrics


def loss(F: Tensor, g: Tensor, t: Tensor, log_variance: Tensor) -> Tensor:
    """Mean over samples of (F - F^- - g)^2 / (sigma_d tan t) * exp(-w) + w, with w [b] learnt.

    Its gradient in F at w = 0 is proportional to -g: zero where the consistency holds.
    """
    error = (F - F.detach() - g).square().flatten(1).mean(1)
    return (error / (SIGMA_DATA * t.tan()) * torch.exp(-log_variance) + log_variance).mean()
