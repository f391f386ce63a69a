"""Continuous-time consistency distillation, sCM (paper, sections 3.1 and 3.2).

The student's prediction f(x_t, t) = cos t x_t - sin t sigma_d F is trained to stay the same along the
teacher's trajectory dx_t/dt. All functions are pure. Shapes: samples [b, c, h, w], angles and
weights [b]; x_t has standard deviation sigma_data, networks F take x_t / sigma_data.

What varies are rows of two tables: FORMS, how the error is weighted, and TANGENTS, how the change along the
trajectory is found. The published form learns its weight. As tangents have length 1, its optimum is the log of
1 / (n sigma_d tan t) for n elements, and it starts at 1: at first sCM counts n times too little beside LADD, and the
weight jumps to its optimum while the tangent warms up. The cosine form has no learnt weight and no 1 / tan t, and
held over seeds where the published one diverged. The flow form has no tangent: it is flow matching, where all angles
count alike. By sCM's own first term, with cos^2 t and at most length 1, a sample at an angle of 1.55 would count a
five hundredth of one at 1 (errors of 0.25 in 2048 elements), and one step begins at pi/2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...devices import fp32
from ...trigflow import SIGMA_DATA, T_MAX, predict_x0
from ..engine.randomness import SampleRandom
from .jvp import tangent
from .transform import Network, per_sample

TANGENT_EPS = 0.1  # in g / (||g|| + 0.1)
DIFFERENCE_SHARE = 0.1  # of its angle, that the difference goes back


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


# --- tangents: the network with its graph, and g before it is normalised ----------------------------------


def _by_jvp(
    student: Network, x_t: Tensor, t: Tensor, dxdt: Tensor, r: float, forward_mode: Network
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """g = -cos^2 t (sigma_d F - dx_t/dt) - r (cos t sin t x_t + sigma_d dF).

    dF is the derivative of F along cos t sin t (dx_t/dt / sigma_d, 1).
    """
    angle = per_sample(t, x_t)
    cos, sin = angle.cos(), angle.sin()
    direction = (cos * sin * dxdt / SIGMA_DATA, t.cos() * t.sin())
    dF = tangent(forward_mode, x_t / SIGMA_DATA, t, *direction)
    F = student(x_t / SIGMA_DATA, t)  # apart from the tangent: a graph through both would keep three times as much
    still = F.detach()
    g = -(cos**2) * (SIGMA_DATA * still - dxdt) - r * (cos * sin * x_t + SIGMA_DATA * dF)
    return F, g, {"dF_norm": dF.flatten(1).norm(dim=1).mean()}


def _by_difference(
    student: Network, x_t: Tensor, t: Tensor, dxdt: Tensor, r: float, forward_mode: Network
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same g as h = 0.1 t goes to 0, from the student's prediction f* one step h back along the trajectory.

    g = -(1 - r) cos^2 t (sigma_d F - dx_t/dt) + r sigma_d sin t cos t / h (F* - F), where F* is the output at
    (x_t, t) that would predict f*. No forward mode: fused attention, less memory, two thirds of the time.
    """
    step = DIFFERENCE_SHARE * t
    angle, h = per_sample(t, x_t), per_sample(step, x_t)
    cos, sin = angle.cos(), angle.sin()
    back = h.cos() * x_t - h.sin() * dxdt
    with torch.no_grad():
        f = predict_x0(fp32(student(back / SIGMA_DATA, t - step)), back, angle - h)
    F = student(x_t / SIGMA_DATA, t)
    still = fp32(F.detach())
    changed = (cos * x_t - f) / (SIGMA_DATA * sin) - still  # F* - F
    g = -(1 - r) * cos**2 * (SIGMA_DATA * still - dxdt) + r * (SIGMA_DATA * sin * cos / h) * changed
    return F, g, {}


TANGENTS = {"jvp": _by_jvp, "difference": _by_difference}


def tangent_target(
    student: Network,
    x_t: Tensor,
    t: Tensor,
    dxdt: Tensor,
    r: float,
    forward_mode: Network | None = None,
    tangent: str = "jvp",
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """F(x_t / sigma_d, t) with its graph, the normalised tangent g, and metrics.

    r in [0, 1] is the warm-up of the unstable part; tangent: a row of TANGENTS. forward_mode: the same student in
    operations that forward-mode differentiation knows, if it is not already.
    """
    F, g, metrics = TANGENTS[tangent](student, x_t, t, dxdt, r, forward_mode or student)
    norm = g.flatten(1).norm(dim=1)
    return F, g / (per_sample(norm, g) + TANGENT_EPS), metrics | {"g_norm": norm.mean()}


def velocity_target(student: Network, x_t: Tensor, t: Tensor, dxdt: Tensor) -> tuple[Tensor, Tensor]:
    """F with its graph, and what it lacks of the velocity: g = dx_t/dt / sigma_d - F, for the flow form."""
    F = student(x_t / SIGMA_DATA, t)
    return F, dxdt / SIGMA_DATA - fp32(F.detach())


# --- losses: the mean over samples of a weighted (F - F^- - g)^2 ------------------------------------------


@dataclass(frozen=True)
class Form:
    """A row of FORMS. Its gradient in F is proportional to -g: zero where the consistency holds."""

    weight: Callable[[Tensor], Tensor]  # of angles
    over: Callable[..., Tensor]  # how a sample's elements count: torch.mean or torch.sum
    learnt: bool  # times exp(-w) and + w, with a log-variance w that is learnt


# fmt: off
FORMS = {
    "published": Form(lambda t: 1 / (SIGMA_DATA * t.tan()), torch.mean, learnt=True),
    "cosine":    Form(torch.cos,                            torch.sum,  learnt=False),
    "flow":      Form(torch.ones_like,                      torch.mean, learnt=False),
}
# fmt: on


def loss(F: Tensor, g: Tensor, t: Tensor, log_variance: Callable[[Tensor], Tensor], form: str = "published") -> Tensor:
    """In fp32. log_variance: w of angles [b], which the published form learns; form: a row of FORMS."""
    row = FORMS[form]
    error = row.over(fp32(F - F.detach() - g).square().flatten(1), dim=1) * row.weight(t)
    if not row.learnt:
        return error.mean()
    w = log_variance(t)
    return (error * torch.exp(-w) + w).mean()
