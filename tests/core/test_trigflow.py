"""Every equation in float64 against the published three-line form, the schedules, and what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import SCMScheduler
from oracles import randn

from sprint_core import trigflow
from sprint_core.trigflow import SIGMA_DATA, T_MAX, schedule, sigmas

PI_2 = math.pi / 2
FIRST = math.atan(400.0)
ANGLES = (PI_2, FIRST, 1.3, 1.1, 0.6, 1e-3)


def tensor(seed: int) -> torch.Tensor:
    return randn(2, 3, 4, 5, seed=seed, dtype=torch.float64)


def velocity(x: torch.Tensor, s: float) -> torch.Tensor:
    """Any function will do: the equations hold for every network."""
    return torch.sin(3 * x + s) - x.roll(1, dims=-1) * (1 + s)


def published_F(x: torch.Tensor, t: float) -> torch.Tensor:
    """The wrapper in NVlabs' SanaMSCM.forward and in diffusers' loop, word for word."""
    t_fm = math.sin(t) / (math.sin(t) + math.cos(t))
    root = math.sqrt(t_fm**2 + (1 - t_fm) ** 2)
    x_fm = x / SIGMA_DATA * root
    return ((1 - 2 * t_fm) * x_fm + (1 - 2 * t_fm + 2 * t_fm**2) * velocity(x_fm, t_fm)) / root


def published_sample(start: torch.Tensor, angles: list[float], noises: list[torch.Tensor]) -> torch.Tensor:
    x = start
    for (t, t_next), z in zip(itertools.pairwise(angles), noises, strict=True):
        x0 = math.cos(t) * x - math.sin(t) * SIGMA_DATA * published_F(x, t)
        x = math.cos(t_next) * x0 + math.sin(t_next) * SIGMA_DATA * z
    return x0 / SIGMA_DATA


def flow_sample(x_s: torch.Tensor, times: list[float], noises: list[torch.Tensor]) -> torch.Tensor:
    for (s, s_next), z in zip(itertools.pairwise(times), noises, strict=True):
        x0 = trigflow.flow_predict_x0(velocity(x_s, s), x_s, s)
        x_s = trigflow.flow_add_noise(x0, z, s_next)
    return x0


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", ANGLES)
def test_both_forms_of_each_equation(t):
    x0, z = SIGMA_DATA * tensor(1), SIGMA_DATA * tensor(2)
    s = trigflow.s_from_t(t)
    x_t = trigflow.add_noise(x0, z, t)
    x_s = trigflow.flow_input(x_t, t)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(x_t, math.cos(t) * x0 + math.sin(t) * z, **close)
    torch.testing.assert_close(x_s, trigflow.flow_add_noise(x0 / SIGMA_DATA, z / SIGMA_DATA, s), **close)  # (1)
    v = velocity(x_s, s)
    F = trigflow.F_from_velocity(v, x_t, t)
    torch.testing.assert_close(F, published_F(x_t, t), **close)  # (2)
    clean = trigflow.predict_x0(F, x_t, t)
    torch.testing.assert_close(clean, math.cos(t) * x_t - math.sin(t) * SIGMA_DATA * F, **close)
    torch.testing.assert_close(clean / SIGMA_DATA, trigflow.flow_predict_x0(v, x_s, s), **close)  # (3)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["paper", "app"])
def test_sampling_equals_the_published_loop(name, steps):
    angles, times = schedule(name, steps), sigmas(name, steps)
    z, noises = tensor(3), [tensor(4 + i) for i in range(steps)]
    ours = flow_sample(trigflow.flow_add_noise(torch.zeros_like(z), z, times[0]), times, noises)
    theirs = published_sample(math.sin(angles[0]) * SIGMA_DATA * z, angles, noises)
    assert (ours - theirs).abs().max() <= 1e-12
    # The published code starts from sigma_data z, without the sine, which is 1 - 3e-6 at arctan(400).
    published = published_sample(SIGMA_DATA * z, angles, noises)
    assert (ours - published).abs().max() <= (1e-12 if angles[0] == PI_2 else 1e-4)


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_image_to_image_equals_the_published_loop(strength):
    angles, times = schedule("paper", 2, strength), sigmas("paper", 2, strength)
    latent, z = tensor(1), tensor(3)
    noises = [tensor(4), tensor(5)]
    ours = flow_sample(trigflow.flow_add_noise(latent, z, times[0]), times, noises)
    start = trigflow.add_noise(SIGMA_DATA * latent, SIGMA_DATA * z, angles[0])
    assert (ours - published_sample(start, angles, noises)).abs().max() <= 1e-12


def test_step_equals_diffusers_scheduler():
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2)
    scheduler.timesteps = scheduler.timesteps.double()
    t, t_next = scheduler.timesteps[0], scheduler.timesteps[1]
    x_t, F = SIGMA_DATA * tensor(1), tensor(2)
    theirs = scheduler.step(SIGMA_DATA * F, t, x_t, generator=torch.Generator().manual_seed(7))
    z = SIGMA_DATA * randn(*x_t.shape, seed=7).double()
    x0 = trigflow.predict_x0(F, x_t, t)
    torch.testing.assert_close(x0, theirs.pred_original_sample, rtol=0, atol=1e-12)
    ours = trigflow.add_noise(x0, z, t_next)
    torch.testing.assert_close(ours, theirs.prev_sample, rtol=0, atol=1e-6)  # it draws and scales noise in fp32


def test_times_and_angles_are_inverse():
    t = torch.linspace(0, PI_2, 101, dtype=torch.float64)
    s = trigflow.s_from_t(t)
    assert s[0] == 0 and s.diff().min() > 0 and abs(s[-1] - 1) < 1e-15
    torch.testing.assert_close(trigflow.t_from_s(s), t, rtol=0, atol=1e-15)
    for angle, time in zip(t.tolist(), s.tolist(), strict=True):
        assert trigflow.s_from_t(angle) == pytest.approx(time, abs=1e-15)
        assert trigflow.t_from_s(time) == pytest.approx(angle, abs=1e-15)


def test_known_times():
    known = {1.5708: 1.0, FIRST: 0.9975, 1.3: 0.7827, 1.1: 0.6627, 0.6: 0.4062}  # as the paper's code rounds them
    for t, s in known.items():
        assert trigflow.s_from_t(t) == pytest.approx(s, abs=6e-5)


def test_angles_per_image_broadcast():
    x0, z, t = tensor(1), tensor(2), torch.tensor([1.3, 0.6], dtype=torch.float64)[:, None, None, None]
    batch = trigflow.add_noise(x0, z, t)
    for i, angle in enumerate((1.3, 0.6)):
        torch.testing.assert_close(batch[i], trigflow.add_noise(x0[i], z[i], angle), rtol=0, atol=1e-15)


def test_shifting_a_flow_time_adds_to_its_logit():
    """As SANA's teachers are trained and sampled: towards noise, by ln factor; a factor of 1 changes nothing."""
    s = torch.linspace(0, 1, 21, dtype=torch.float64)
    assert torch.equal(trigflow.shift(s, 1.0), s)
    inside = s[1:-1]
    torch.testing.assert_close(trigflow.shift(inside, 3.0).logit(), inside.logit() + math.log(3.0))
    times = trigflow.shifted_sigmas(4, 3.0)
    assert times == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0]) and times[0] == 1.0 and times[-1] == 0.0
    assert trigflow.shifted_sigmas(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]


# --- the deterministic step -----------------------------------------------------------------------


def test_rotation_is_exact_for_a_single_image():
    """All data at one point: dx/dt = sigma_data F = -sin t x0 + cos t z, and the path is the noising itself."""
    x0, z = tensor(1), tensor(2)
    t, t_next = 1.2, 0.4
    F = (math.cos(t) * z - math.sin(t) * x0) / SIGMA_DATA
    moved = trigflow.rotate(trigflow.add_noise(x0, z, t), F, t, t_next)
    torch.testing.assert_close(moved, trigflow.add_noise(x0, z, t_next), rtol=0, atol=1e-14)


def test_rotation_to_zero_is_the_prediction():
    x_t, F = tensor(1), tensor(2)
    torch.testing.assert_close(trigflow.rotate(x_t, F, 0.9, 0.0), trigflow.predict_x0(F, x_t, 0.9))


def test_rotation_converges_to_the_closed_form_of_gaussian_data():
    """Data N(0, c^2): the mean of dx/dt is linear in x, so that x grows as the root of the variance."""
    c, (start, end) = 0.2, (1.4, 0.3)

    def variance(t):
        return (c * math.cos(t)) ** 2 + (SIGMA_DATA * math.sin(t)) ** 2

    def error(steps):
        x, angles = torch.ones(1, dtype=torch.float64), np.linspace(start, end, steps + 1).tolist()
        for t, t_next in itertools.pairwise(angles):
            F = x * math.sin(t) * math.cos(t) * (SIGMA_DATA**2 - c**2) / variance(t) / SIGMA_DATA
            x = trigflow.rotate(x, F, t, t_next)
        return abs(x.item() - math.sqrt(variance(end) / variance(start)))

    assert error(200) < 5e-3
    assert error(100) / error(200) == pytest.approx(2, abs=0.1)  # first order


# --- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps", "angles"),
    [
        ("paper", 1, [PI_2, 0]),
        ("paper", 2, [FIRST, 1.3, 0]),
        ("paper", 3, [FIRST, 1.3, 0.6, 0]),
        ("paper", 4, [FIRST, 1.3, 1.1, 0.6, 0]),
        ("app", 1, [PI_2, 0]),
        ("app", 2, [PI_2, 1.3, 0]),
        ("1.5708, 1.3", 2, [PI_2, 1.3, 0]),
        ("1.571 1.3,0.5", 99, [PI_2, 1.3, 0.5, 0]),
        ("1.2\n0.6, 0", 1, [1.2, 0.6, 0]),
        ((1.2, 0.6, 0.0), 1, [1.2, 0.6, 0]),
        ([0.25], 1, [0.25, 0]),
    ],
)
def test_schedules(name, steps, angles):
    assert schedule(name, steps) == angles
    assert all(0 <= s <= 1 for s in sigmas(name, steps))
    assert sigmas(name, steps) == pytest.approx([math.sin(t) / (math.sin(t) + math.cos(t)) for t in angles])
    for strength in (0.3, 1.0):
        assert schedule(name, steps, strength) == [t * strength for t in angles]


@pytest.mark.parametrize("steps", [1, 3, 4, 17, 40])
def test_app_schedule_is_even(steps):
    assert schedule("app", steps) == pytest.approx(np.linspace(PI_2, 0, steps + 1), abs=1e-15)


@pytest.mark.parametrize(
    ("steps", "second"), [(1, 0.0), (2, 1.3), (3, 1.3), (4, 1.3), (5, PI_2 * 4 / 5), (40, PI_2 * 39 / 40)]
)
def test_auto_is_the_papers_up_to_four_steps_and_the_apps_beyond(steps, second):
    angles = schedule("auto", steps)
    assert len(angles) == steps + 1 and angles[1] == pytest.approx(second, abs=1e-12)
    assert angles[0] == (FIRST if steps in (2, 3, 4) else PI_2)


def test_defaults_are_the_papers_two_steps():
    assert schedule("paper") == [FIRST, 1.3, 0.0]
    assert pytest.approx(FIRST, abs=1e-7) == 1.5682963
    assert max(sigmas("paper", 1)) == 1.0 and T_MAX == PI_2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("paper", 0), "1 to 4 steps, not 0"),
        (("paper", 5), "'app' has up to 40"),
        (("app", 0), "1 to 40 steps, not 0"),
        (("auto", 0), "1 to 40 steps, not 0"),
        (("auto", 41), "1 to 40 steps, not 41"),
        (("app", 41), "1 to 40 steps, not 41"),
        (("1.3, 1.3",), "1.3 follows 1.3"),
        (("0.5, 1.0",), "1 follows 0.5"),
        (("1.571, 1.5708",), "must fall strictly"),
        (("1.58",), "1.58 lies outside"),
        (("-0.5",), "-0.5 lies outside"),
        (("1.0, 0, 0",), "0 lies outside"),
        (("nan",), "nan lies outside"),
        (("inf",), "inf lies outside"),
        (((1.0, math.nan),), "nan lies outside"),
        (("",), "at least one angle"),
        ((" , ",), "at least one angle"),
        (("0",), "at least one angle"),
        (((),), "at least one angle"),
        (("papr",), "list of angles .* not 'papr'"),
        (("1.2; 0.6",), "list of angles"),
        (("paper", 2, 0.0), "strength .* is 0"),
        (("paper", 2, 1.01), "strength .* is 1.01"),
        (("paper", 2, -1.0), "strength .* is -1"),
        (("paper", 2, math.nan), "strength .* is nan"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    for function in (schedule, sigmas):
        with pytest.raises(ValueError, match=message):
            function(*arguments)
