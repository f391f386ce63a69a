"""TrigFlow and the flow view of it: the mathematics of SANA-Sprint, no modules.

SANA-Sprint is trained with angles t in [0, pi/2] (TrigFlow), but its network is a flow-matching
network under a change of variables. With s = sin t / (sin t + cos t):

    (1) noising     x_t = cos t * x0 + sin t * z,   and   x_s = x_t / (sigma_data (cos t + sin t))
    (2) network     F = ((cos t - sin t) x + v(x_s, s)) / (cos t + sin t),   x = x_t / sigma_data
    (3) prediction  x0 = cos t * x_t - sin t * sigma_data * F,   and   x0 / sigma_data = x_s - s v
    (4) next step   x_t' = cos t' * x0 + sin t' * z,   and   x_s' = (1 - s') x0 + s' z

The right-hand forms are an ordinary flow model's, which is why samplers, ControlNet and ComfyUI
speak x_s and s only. Glossary, never reused: t angle, s flow time, x0 clean, z noise, F TrigFlow
output, v flow velocity. t and s are floats, or tensors that broadcast with the samples; what is
computed of them alone is again a float or a tensor.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar, overload

import torch
from torch import Tensor

SIGMA_DATA = 0.5  # standard deviation of the latents TrigFlow was trained on (paper, section 3.1)
T_MAX = math.pi / 2
T_MAX_TRAINED = math.atan(200.0 / SIGMA_DATA)  # 1.5682963: the first angle of the paper's 2 and 4 steps
T_LARGEST_ACCEPTED = 1.571  # published configurations write pi/2 as 1.5708, a little above it

# Paper, Table 7. Three steps are ours: the four-step row without 1.1.
PAPER_ANGLES = {
    1: (T_MAX,),
    2: (T_MAX_TRAINED, 1.3),
    3: (T_MAX_TRAINED, 1.3, 0.6),
    4: (T_MAX_TRAINED, 1.3, 1.1, 0.6),
}
APP_MAX_STEPS = 40
APP_TWO_STEPS = (1.5708, 1.3)

Scalar = TypeVar("Scalar", float, Tensor)


@overload
def _sin_cos(t: float) -> tuple[float, float]: ...
@overload
def _sin_cos(t: Tensor) -> tuple[Tensor, Tensor]: ...
def _sin_cos(t):
    return (torch.sin(t), torch.cos(t)) if isinstance(t, Tensor) else (math.sin(t), math.cos(t))


@overload
def s_from_t(t: float) -> float: ...
@overload
def s_from_t(t: Tensor) -> Tensor: ...
def s_from_t(t):
    """Flow time s in [0, 1] of an angle t in [0, pi/2]: sin t / (sin t + cos t)."""
    sin, cos = _sin_cos(t)
    return sin / (sin + cos)


@overload
def t_from_s(s: float) -> float: ...
@overload
def t_from_s(s: Tensor) -> Tensor: ...
def t_from_s(s):
    """Angle in [0, pi/2] of a flow time in [0, 1]; the inverse of `s_from_t`."""
    return torch.atan2(s, 1 - s) if isinstance(s, Tensor) else math.atan2(s, 1 - s)


def add_noise(x0: Tensor, z: Tensor, t: float | Tensor) -> Tensor:
    """Eq. (1), left: x_t of clean x0 and noise z, both with standard deviation sigma_data."""
    sin, cos = _sin_cos(t)
    return cos * x0 + sin * z


def flow_input(x_t: Tensor, t: float | Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Eq. (1), right: what the flow network sees, x_s, for a TrigFlow sample x_t."""
    sin, cos = _sin_cos(t)
    return x_t / (sigma_data * (cos + sin))


def F_from_velocity(v: Tensor, x_t: Tensor, t: float | Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Eq. (2): the TrigFlow output of a network whose flow velocity at (x_s, s) is v."""
    sin, cos = _sin_cos(t)
    return ((cos - sin) * (x_t / sigma_data) + v) / (cos + sin)


def predict_x0(F: Tensor, x_t: Tensor, t: float | Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Eq. (3), left: the consistency function f(x_t, t), the predicted clean sample."""
    sin, cos = _sin_cos(t)
    return cos * x_t - sin * sigma_data * F


def flow_predict_x0(v: Tensor, x_s: Tensor, s: float | Tensor) -> Tensor:
    """Eq. (3), right: the predicted clean latent of a flow model."""
    return x_s - s * v


def flow_add_noise(x0: Tensor, z: Tensor, s: float | Tensor) -> Tensor:
    """Eq. (4), right: x_s of a clean latent x0 and unit noise z."""
    return (1 - s) * x0 + s * z


def rotate(x_t: Tensor, F: Tensor, t: float | Tensor, t_next: float | Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """One deterministic (ODE) step from angle t to t_next: x' = cos(t - t') x - sin(t - t') sigma_data F."""
    sin, cos = _sin_cos(t - t_next)
    return cos * x_t - sin * sigma_data * F


# --- schedules ------------------------------------------------------------------------------------


def _app_angles(steps: int) -> tuple[float, ...]:
    if steps == 2:
        return APP_TWO_STEPS
    return tuple(T_MAX * (1 - i / steps) for i in range(steps))


def parse_angles(text: str) -> tuple[float, ...]:
    """Angles from comma- or space-separated numbers. Raises ValueError on anything else."""
    words = text.replace(",", " ").split()
    try:
        return tuple(float(word) for word in words)
    except ValueError:
        raise ValueError(f"a custom schedule is a list of angles such as '1.5708, 1.3', not {text!r}") from None


def check_angles(angles: Sequence[float]) -> tuple[float, ...]:
    """A custom schedule made safe: strictly decreasing, in (0, 1.571], no trailing 0.

    Angles above pi/2 are clamped to it, since 1.5708 is how the published files write pi/2.
    Raises ValueError.
    """
    angles = tuple(float(t) for t in angles)
    if angles and angles[-1] == 0.0:
        angles = angles[:-1]
    if not angles:
        raise ValueError("a schedule needs at least one angle above 0")
    for t in angles:
        if not 0.0 < t <= T_LARGEST_ACCEPTED:  # also refuses NaN
            raise ValueError(f"angle {t:g} lies outside (0, {T_LARGEST_ACCEPTED}]; pi/2 = 1.5708 is pure noise")
    clamped = tuple(min(t, T_MAX) for t in angles)
    for angle, following in itertools.pairwise(clamped):
        if following >= angle:
            raise ValueError(f"angles must fall strictly, but {following:g} follows {angle:g}")
    return clamped


def rule_of(name: str, steps: int) -> str:
    """'paper' or 'app' for 'auto': the paper's schedule for its numbers of steps, else the app's. Other names stay."""
    if name != "auto":
        return name
    return "paper" if steps in PAPER_ANGLES else "app"


def schedule(name: str | Sequence[float], steps: int = 2, strength: float = 1.0) -> list[float]:
    """Angles t of a named or custom schedule, descending, closed by 0.

    name: 'paper' (1-4 steps, Table 7), 'app' (1-40 steps, the authors' demo), 'auto' (see `rule_of`), or the
    angles themselves, as numbers or as text; `steps` is then ignored.
    strength: image-to-image, in (0, 1]: multiplies every angle. Raises ValueError.
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength (denoise) is {strength:g}; it must lie in (0, 1]")
    name = rule_of(name, steps) if isinstance(name, str) else name
    if not isinstance(name, str):
        angles = check_angles(name)
    elif name == "paper":
        if steps not in PAPER_ANGLES:
            raise ValueError(f"the paper's schedule has 1 to 4 steps, not {steps}; 'app' has up to {APP_MAX_STEPS}")
        angles = check_angles(PAPER_ANGLES[steps])
    elif name == "app":
        if not 1 <= steps <= APP_MAX_STEPS:
            raise ValueError(f"the app's schedule has 1 to {APP_MAX_STEPS} steps, not {steps}")
        angles = check_angles(_app_angles(steps))
    else:
        angles = check_angles(parse_angles(name))
    return [t * strength for t in angles] + [0.0]


def sigmas(name: str | Sequence[float], steps: int = 2, strength: float = 1.0) -> list[float]:
    """The same schedule as flow times s, which is what ComfyUI calls SIGMAS: at most 1, closed by 0."""
    return [min(s_from_t(t), 1.0) for t in schedule(name, steps, strength)]


def percent_to_s(percent: float) -> float:
    """Flow time in [0, 1] after a share `percent` in [0, 1] of the way from noise to image, which the angle measures.

    This is how ComfyUI's models turn the start and end of a ControlNet into sigmas; percent is clamped to [0, 1].
    """
    return min(1.0, s_from_t(min(max(1.0 - percent, 0.0), 1.0) * T_MAX))


def acts_at(s: Tensor, start: float, end: float) -> bool:
    """Whether flow time s, an fp32 scalar on the CPU, lies between shares `start` and `end` of the way to the image."""
    last, first = torch.tensor([percent_to_s(end), percent_to_s(start)]).tolist()
    return last <= s.item() <= first  # all rounded to fp32, as ComfyUI compares them


def shift(s: Scalar, factor: float) -> Scalar:
    """Flow times in [0, 1] moved towards noise, as multi-step models are trained and sampled: logit s + ln factor."""
    return factor * s / (1 + (factor - 1) * s)


def shifted_sigmas(steps: int, factor: float) -> list[float]:
    """A multi-step model's SIGMAS, steps + 1 flow times: evenly from 1 to 0, then shifted."""
    return [shift(1 - i / steps, factor) for i in range(steps + 1)]
