"""The sampling loop against a direct one in float64, its noise, and what it must not do."""

import itertools
import math

import pytest
import torch
from oracles import randn
from torch.utils._python_dispatch import TorchDispatchMode

from sprint_core import sampler, trigflow
from sprint_core.sampler import StepNoise, euler, initial_noise, sample, seeded_noise

SHAPE = (3, 4, 5)


def denoise(x_s: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """A stand-in for a network whose images do not depend on one another."""
    return torch.tanh(x_s + s) * (1 - s / 2)


def angles_loop(x_s: torch.Tensor, angles: list[float], noises: list[torch.Tensor]) -> torch.Tensor:
    """Multistep consistency sampling written with TrigFlow's angles, for the same network."""
    sigma_data = trigflow.SIGMA_DATA
    x_t = x_s * sigma_data * (math.cos(angles[0]) + math.sin(angles[0]))
    for (t, t_next), z in zip(itertools.pairwise(angles), noises, strict=True):
        sum_t = math.cos(t) + math.sin(t)
        x0 = sigma_data * denoise(x_t / (sigma_data * sum_t), torch.tensor(math.sin(t) / sum_t, dtype=torch.float64))
        x_t = math.cos(t_next) * x0 + math.sin(t_next) * sigma_data * z
    return x_t / (sigma_data * (math.cos(angles[-1]) + math.sin(angles[-1])))


@pytest.mark.parametrize(
    "angles",
    [[math.pi / 2, 0.0], [1.5, 1.3, 0.0], [1.5, 1.3, 1.1, 0.6, 0.0], [1.5, 0.9], [1.2, 0.8, 0.4]],
    ids=["1 step", "2 steps", "4 steps", "1 step to 0.9", "2 steps to 0.4"],
)
def test_equals_the_loop_over_angles(angles):
    """Schedules that end above 0 leave the noise that their last time stands for."""
    x_s = randn(2, *SHAPE, dtype=torch.float64)
    noises = [randn(2, *SHAPE, seed=5 + i, dtype=torch.float64) for i in range(len(angles) - 1)]
    times = torch.tensor([trigflow.s_from_t(t) for t in angles], dtype=torch.float64)
    got = sample(denoise, x_s, times, iter(noises).__next__)
    assert (got - angles_loop(x_s, angles, noises)).abs().max() <= 1e-12


def test_noise_is_asked_for_only_between_steps():
    drawn = []

    def noise():
        drawn.append(1)
        return torch.zeros(1, *SHAPE)

    for times, calls in (([1.0, 0.0], 0), ([0.9, 0.7, 0.0], 1), ([0.9, 0.7], 1), ([0.9, 0.7, 0.4], 2)):
        drawn.clear()
        sample(denoise, torch.ones(1, *SHAPE), torch.tensor(times), noise)
        assert len(drawn) == calls
    x = torch.ones(1, *SHAPE)
    assert sample(denoise, x, torch.tensor([0.5]), noise) is x  # no steps, nothing to do


def test_on_step_sees_every_prediction_and_may_stop():
    times, events = torch.tensor([0.9, 0.6, 0.0]), []

    def traced(x_s, s):
        events.append(("denoise", round(s.item(), 6)))
        return denoise(x_s, s)

    def on_step(i, x_s, x0):
        events.append(("step", i))
        torch.testing.assert_close(x0, denoise(x_s, times[i]))

    sample(traced, randn(1, *SHAPE), times, lambda: randn(1, *SHAPE, seed=2), on_step=on_step)
    assert events == [("denoise", 0.9), ("step", 0), ("denoise", 0.6), ("step", 1)]

    def stop(*_):
        raise InterruptedError

    events.clear()
    with pytest.raises(InterruptedError):
        sample(traced, randn(1, *SHAPE), times, None, on_step=stop)
    assert events == [("denoise", 0.9)]


def test_renoising_is_an_argument():
    got = sample(denoise, torch.ones(1, *SHAPE), torch.tensor([0.9, 0.5]), lambda: 3.0, lambda x0, z, s: z + s)
    assert got == 3.5


# --- multi-step models -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_euler_is_exact_where_the_velocity_is_constant(steps):
    """Its data are one image: every step is on the straight line between noise and image, to its end or before."""
    image, z = randn(2, *SHAPE, dtype=torch.float64), randn(2, *SHAPE, seed=2, dtype=torch.float64)
    for end in (0.0, 0.3):
        times = torch.linspace(0.9, end, steps + 1, dtype=torch.float64)
        got = euler(lambda x_s, s: x_s - s * (z - image), trigflow.flow_add_noise(image, z, times[0]), times)
        torch.testing.assert_close(got, trigflow.flow_add_noise(image, z, end), rtol=0, atol=1e-14)


# --- noise ----------------------------------------------------------------------------------------


def test_noise_of_a_seed_is_torchs_cpu_noise():
    for seed in (0, 7, 2**63):
        want = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(seed))
        assert torch.equal(seeded_noise(seed, SHAPE), want)
        again = torch.Generator("cpu").manual_seed(seed + 1)
        steps = StepNoise([seed], SHAPE)
        for _ in range(3):
            assert torch.equal(steps()[0], torch.randn(SHAPE, generator=again))


def test_seeds_wrap_around():
    assert torch.equal(seeded_noise(2**64 + 3, SHAPE), seeded_noise(3, SHAPE))
    assert torch.equal(StepNoise([2**64 - 1], SHAPE)()[0], seeded_noise(0, SHAPE))
    assert torch.isfinite(initial_noise([-1], SHAPE)).all()


def test_a_batch_is_its_images_bit_for_bit():
    seeds, times = [3, 2**64 - 1, 3, 11], torch.tensor(trigflow.sigmas("paper", 4))

    def run(seeds):
        return sample(denoise, initial_noise(seeds, SHAPE), times, StepNoise(seeds, SHAPE))

    batch = run(seeds)
    for image, seed in zip(batch, seeds, strict=True):
        assert torch.equal(image, run([seed])[0])
    assert not torch.equal(batch[0], batch[1]) and torch.equal(batch[0], batch[2])


# --- what would wait for the device ---------------------------------------------------------------


class Watched(torch.Tensor):
    """A tensor that records when its numbers are read."""

    reads: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("tolist", "item", "__bool__", "__float__", "__int__", "numpy"):
            cls.reads.append(function.__name__)
        return super().__torch_function__(function, types, args, kwargs or {})


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a number was read from a tensor"
        return function(*args, **(kwargs or {}))


def test_numbers_are_read_once():
    """The schedule in one go before the first step; images never, so they may as well have none (meta)."""
    Watched.reads.clear()
    times = torch.tensor([0.9, 0.7, 0.5, 0.0]).as_subclass(Watched)
    seen = []

    def network(x_s, s):
        assert isinstance(s, torch.Tensor) and s.shape == ()
        seen.append(len(Watched.reads))
        return x_s * 2

    x_s = torch.empty(2, *SHAPE, device="meta")
    with NoReads():
        result = sample(network, x_s, times, lambda: torch.empty_like(x_s))
    assert result.device.type == "meta"
    assert Watched.reads == ["tolist"] and seen == [1, 1, 1]


@pytest.mark.parametrize("cfg", [0.0, 1.0, 4.5])
def test_classifier_free_guidance(cfg):
    conditional, unconditional = (randn(2, 32, 3, 4, seed=seed, dtype=torch.float64) for seed in (1, 2))
    got = sampler.classifier_free_guidance(conditional, unconditional, cfg)
    torch.testing.assert_close(got, cfg * conditional + (1 - cfg) * unconditional, rtol=0, atol=1e-14)
    assert cfg != 1 or torch.equal(got, conditional)


def test_euler_steps_are_those_of_the_velocity():
    """x_s - x0 = s v, so that one step adds (s' - s) v; a constant velocity is integrated exactly."""
    x_s, v = (randn(2, 32, 3, 4, seed=seed, dtype=torch.float64) for seed in (1, 2))
    sigmas = torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=torch.float64)
    got = sampler.euler(lambda x, s: x - s * v, x_s, sigmas)
    torch.testing.assert_close(got, x_s - 0.9 * v, rtol=0, atol=1e-14)
