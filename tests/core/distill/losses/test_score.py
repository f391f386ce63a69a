"""Distillation by scores: Gaussians, whose scores are known in closed form, quadrature, and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sprint_core import trigflow
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.losses import score
from sprint_core.distill.losses.score import Scores
from sprint_core.trigflow import SIGMA_DATA

NODES = 24  # of Gauss and Hermite, for each of two normal numbers


def normal64(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(s: Tensor) -> Tensor:
    return s.view(-1, 1, 1, 1)


def gaussian(mean: float, std: float):
    """The flow velocity of latents from N(mean, std^2), and the score of what is noised to s."""

    def moments(s):
        return (1 - s) * mean, (1 - s) ** 2 * std**2 + s**2

    def velocity(x, s):
        center, variance = moments(column(s))
        x0 = mean + (1 - column(s)) * std**2 / variance * (x - center)  # E[x0 | x_s]
        return (x - x0) / column(s)

    def grad_log_p(x, s):
        center, variance = moments(column(s))
        return -(x - center) / variance

    return velocity, grad_log_p


REAL, FAKE = gaussian(0.7, 0.9), gaussian(-0.4, 1.3)
SCORES = Scores(REAL[0], FAKE[0])


def test_the_difference_is_that_of_the_scores():
    """In flow variables, as X and v; and in TrigFlow's, as F."""
    s = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    x = normal64(3, 2, 2, 2)
    difference, real, fake = SCORES.predictions(x, s)
    times = column(s)
    torch.testing.assert_close(difference, fake - real, rtol=1e-9, atol=1e-12)
    scores = FAKE[1](x, s) - REAL[1](x, s)
    torch.testing.assert_close(difference, times**2 / (1 - times) * scores, rtol=1e-9, atol=1e-12)
    t = trigflow.t_from_s(s)
    x_t = x * SIGMA_DATA * column(t.cos() + t.sin())
    F_real, F_fake = (trigflow.F_from_velocity(v(x, s), x_t, column(t)) for v in (REAL[0], FAKE[0]))
    of_angles = column(t.sin()) * (F_real - F_fake)  # f_fake - f_real over sigma_data
    torch.testing.assert_close(difference, of_angles, rtol=1e-9, atol=1e-12)


def quadrature() -> tuple[Tensor, Tensor, Tensor]:
    """Samples of two normal numbers, each [n, 1, 1, 1], and their weights [n]."""
    points, weights = np.polynomial.hermite_e.hermegauss(NODES)
    weights = torch.tensor(weights / math.sqrt(2 * math.pi)).double()
    z, eps = torch.meshgrid(torch.tensor(points), torch.tensor(points), indexing="ij")
    return column(z.flatten()), column(eps.flatten()), torch.outer(weights, weights).flatten()


def kl(mean: Tensor, std: Tensor, s: float) -> Tensor:
    """KL of N(mean, std^2) from the real Gaussian, both noised to s, in closed form."""
    variance, other = (1 - s) ** 2 * std**2 + s**2, (1 - s) ** 2 * 0.9**2 + s**2
    distance = ((1 - s) * (mean - 0.7)) ** 2
    return 0.5 * ((other / variance).log() + (variance + distance) / other - 1)


@pytest.mark.parametrize("s", [0.1, 0.6, 0.95])
def test_samples_move_along_the_gradient_of_the_reverse_kl(s, monkeypatch):
    """By EMD's one step, which has no divisor: exact by quadrature, against the closed form."""
    monkeypatch.setattr(score, "CHAIN_STEP_LATENT", 0.0)
    z, eps, weights = quadrature()
    mean, std = (torch.tensor(x, dtype=torch.float64).requires_grad_(True) for x in (-0.4, 1.3))
    times = torch.full((len(z),), s, dtype=torch.float64)
    scores = Scores(REAL[0], FAKE[0])  # the fake's are the student's own
    noises = iter([eps, *[torch.zeros_like(eps)] * 2])
    moved = score.emd(lambda latent: mean + std * latent, z, times, scores, lambda: next(noises), 1)
    found = torch.autograd.grad((weights * moved.loss).sum(), (mean, std))
    wanted = torch.autograd.grad(kl(mean, std, s), (mean, std))
    for gradient, want in zip(found, wanted, strict=True):
        assert gradient.item() == pytest.approx(0.4**2 * s**2 / (1 - s) ** 2 * want.item(), rel=1e-9)


def test_dmd_divides_by_how_far_the_teacher_is():
    """Per sample; over the root of the number of elements."""
    s, samples = torch.tensor([0.2, 0.8], dtype=torch.float64), normal64(2, 3, 2, 2).requires_grad_(True)
    eps = normal64(2, 3, 2, 2, seed=1)
    moved = score.dmd(lambda z: samples, samples, s, SCORES, lambda: eps, 1)
    (found,) = torch.autograd.grad(moved.loss.sum(), samples)
    with torch.no_grad():
        x = (1 - column(s)) * samples + column(s) * eps
        real, fake = (x - column(s) * v(x, s) for v in (REAL[0], FAKE[0]))
        distance = column((samples - real).abs().mean((1, 2, 3)))
    torch.testing.assert_close(found, (fake - real) / distance / math.sqrt(12), rtol=1e-9, atol=1e-12)


def test_dmd_stays_finite_where_both_agree():
    samples = normal64(2, 3, 2, 2).requires_grad_(True)
    still = Scores(*[lambda x, s: torch.zeros_like(x)] * 2)
    loss = score.dmd(lambda z: samples, samples, torch.zeros(2).double(), still, lambda: 0 * samples.detach(), 1).loss
    assert loss.tolist() == [0.0, 0.0] and torch.autograd.grad(loss.sum(), samples)[0].abs().max() == 0


def test_sid_is_half_the_gradient_of_fishers_divergence():
    """Of a mean, as both have one variance: X_real - X_fake is c (0.7 - mean) there; exact by quadrature."""
    z, eps, weights = quadrature()
    s, mean = 0.4, torch.tensor(-0.4, dtype=torch.float64).requires_grad_(True)
    times = torch.full((len(z),), s, dtype=torch.float64)
    scores = Scores(REAL[0], gaussian(-0.4, 0.9)[0])
    loss = score.sid(lambda latent: mean + 0.9 * latent, z, times, scores, lambda: eps, 1).loss
    c = s**2 / ((1 - s) ** 2 * 0.9**2 + s**2)
    (found,) = torch.autograd.grad((weights * loss).sum(), mean)
    assert found.item() == pytest.approx(-(1 - s) * c**2 * (0.7 + 0.4), rel=1e-9)


def test_sids_gradient_passes_through_both_networks():
    """Differences of the loss written out, with networks that are not linear."""
    s, samples, eps = (
        torch.tensor([0.3], dtype=torch.float64),
        normal64(1, 2, 2, 1).requires_grad_(True),
        normal64(1, 2, 2, 1, seed=1),
    )
    networks = [lambda x, s, a=a: (a * x).sin() + s.view(-1, 1, 1, 1) for a in (1.3, 0.6)]
    loss = score.sid(lambda z: samples, samples, s, Scores(*networks), lambda: eps, 1).loss
    (found,) = torch.autograd.grad(loss.sum(), samples)

    def by_hand(G: Tensor) -> Tensor:
        x = 0.7 * G + 0.3 * eps
        real, fake = (x - 0.3 * network(x, s) for network in networks)
        return 0.7 * ((real - fake) * (fake - G)).sum() / 2  # of 4 elements

    torch.testing.assert_close(loss.sum(), by_hand(samples))
    for i in range(4):
        step = torch.zeros(4).double().index_fill(0, torch.tensor([i]), 1e-6).view_as(samples)
        slope = (by_hand(samples.detach() + step) - by_hand(samples.detach() - step)) / 2e-6
        assert found.flatten()[i].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-9)


# --- EM distillation ------------------------------------------------------------------------------------


def test_one_step_without_a_latents_is_dmd_without_its_divisor(monkeypatch):
    monkeypatch.setattr(score, "CHAIN_STEP_LATENT", 0.0)
    s, z = torch.tensor([0.3, 0.9], dtype=torch.float64), normal64(2, 3, 2, 2)
    weight, eps = torch.tensor(0.7, dtype=torch.float64).requires_grad_(True), normal64(2, 3, 2, 2, seed=1)
    noises = iter([eps, normal64(2, 3, 2, 2, seed=2), normal64(2, 3, 2, 2, seed=3)])
    moved = score.emd(lambda latent: weight * latent.sin(), z, s, SCORES, lambda: next(noises), 1)
    (found,) = torch.autograd.grad(moved.loss.sum(), moved.samples)
    torch.testing.assert_close(moved.samples, 0.7 * z.sin())
    x = (1 - column(s)) * 0.7 * z.sin() + column(s) * eps
    real, fake = (x - column(s) * v(x, s) for v in (REAL[0], FAKE[0]))
    torch.testing.assert_close(found, 0.4**2 * (fake - real) / math.sqrt(12), rtol=1e-9, atol=1e-12)


def test_the_chain_by_hand():
    """Three steps with their noise: what the noise moved is taken out again, and z follows the generator's slope."""
    a, b, s = 0.4**2, 0.004**2, torch.tensor([0.4], dtype=torch.float64)
    drawn = [normal64(1, 1, 2, 2, seed=i) for i in range(8)]
    z, noises, networks = drawn[7], iter(drawn[:7]), (REAL[0], FAKE[0])
    moved = score.emd(lambda latent: latent.sin() + 0.2 * latent, z, s, SCORES, lambda: next(noises), 3)
    eps, noise_alone, latent = drawn[0], drawn[0], z
    for i in range(3):
        x = 0.6 * (latent.sin() + 0.2 * latent) + 0.4 * eps
        real, fake = (x - 0.4 * v(x, s) for v in networks)
        D = 0.6 / 0.4**2 * (real - fake)  # the difference of the scores
        eps = eps + a * (0.4 * D - eps) + math.sqrt(2 * a) * drawn[1 + 2 * i]
        noise_alone = (1 - a) * noise_alone + math.sqrt(2 * a) * drawn[1 + 2 * i]
        slope = latent.cos() + 0.2
        latent = latent + b * (0.6 * slope * D - latent) + math.sqrt(2 * b) * drawn[2 + 2 * i]
    torch.testing.assert_close(moved.samples, latent.sin() + 0.2 * latent, rtol=1e-10, atol=1e-12)
    gradient = -(0.4 / 0.6) * (eps - noise_alone)
    torch.testing.assert_close(moved.loss, (0.5 * gradient.square().sum() / 2)[None], rtol=1e-9, atol=1e-12)


def test_the_chain_comes_to_the_teachers_distribution(monkeypatch):
    """What it moves, x = (1 - s) G(z) + s eps, from the student's marginal; with steps that let z move, too."""
    for name in ("CHAIN_STEP_NOISE", "CHAIN_STEP_LATENT"):
        monkeypatch.setattr(score, name, 0.05)
    s, count, last = 0.6, 4000, {}
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn((count, 1, 1, 1), generator=generator, dtype=torch.float64)

    def real(x, s):
        last["x"] = x
        return REAL[0](x, s)

    times = torch.full((count,), s, dtype=torch.float64)
    score.emd(lambda z: -0.4 + 1.3 * z, noise(), times, Scores(real, FAKE[0]), noise, 100)
    mean, std = (1 - s) * 0.7, math.sqrt((1 - s) ** 2 * 0.9**2 + s**2)  # from -0.16 and 0.79, to 0.28 and 0.70
    assert last["x"].mean().item() == pytest.approx(mean, abs=0.04)
    assert last["x"].std().item() == pytest.approx(std, rel=0.05)


# --- times, samples, the fake network ---------------------------------------------------------------------


def test_where_scores_are_compared():
    """Half of the shifted times lie above 5/6; SiD's are sigmoids of N(ln 2, 1.6^2)."""
    random = SampleRandom(0, 0, "", range(4000))
    shifted, normal = (score.TIMES[name](random) for name in ("shifted", "normal"))
    assert shifted.min() >= 0.02 and shifted.max() <= 0.98 and (shifted > 5 / 6).float().mean().sub(0.5).abs() < 0.03
    n = normal.logit()
    assert n.mean().sub(math.log(2)).abs() < 0.08 and n.std().sub(1.6).abs() < 0.06


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_are_made_as_the_student_is_used(steps):
    """From noise alone, times falling, each input the prediction before it, noised anew; only the last has a graph."""
    weight = torch.tensor(0.5, dtype=torch.float64).requires_grad_(True)
    seen = []

    def student(x, s):
        seen.append((x.detach(), s, x.requires_grad or torch.is_grad_enabled()))
        return weight * x

    like = torch.zeros(3, 2, 2, 2).double()
    last, z = score.simulate(student, like, steps, SampleRandom(0, 0, "", range(3)))
    sample = last(z)
    assert [graph for *_, graph in seen] == [False] * (steps - 1) + [True] and sample.requires_grad
    times = torch.stack([s for _, s, _ in seen])
    assert (times[0] == 1).all() and (times[1:] <= times[:-1]).all() and len(seen) == steps
    random, before = SampleRandom(0, 0, "", range(3)), torch.zeros_like(like)
    for i, (x, s, _) in enumerate(seen):
        if i:
            u = random.uniform().double()
            torch.testing.assert_close(s, torch.minimum(5 * u / (1 + 4 * u), times[i - 1]), rtol=1e-6, atol=0)
        noise = random.normal(2, 2, 2).double()
        torch.testing.assert_close(x, (1 - column(s)) * before + column(s) * noise)
        before = x - column(s) * 0.5 * x
    torch.testing.assert_close(sample, before)


def test_the_fake_network_is_right_where_it_knows_the_samples():
    """Its loss is least at the velocity of their Gaussian: exact by quadrature, against others."""
    z, eps, weights = quadrature()
    times = torch.full((len(z),), 0.6, dtype=torch.float64)
    scale = weights.sqrt()[:, None, None, None]  # so that the mean is the expectation

    def loss(mean: float, std: float) -> float:
        network = gaussian(mean, std)[0]
        samples = -0.4 + 1.3 * z
        found = network(0.4 * samples + 0.6 * eps, times) - (eps - samples)
        return float((scale * found).square().sum())

    exact = score.fake_loss(gaussian(-0.4, 1.3)[0], -0.4 + 1.3 * z, times, lambda: eps)
    network = gaussian(-0.4, 1.3)[0]
    by_hand = (network(0.4 * (-0.4 + 1.3 * z) + 0.6 * eps, times) - (eps + 0.4 - 1.3 * z)).square().mean()
    torch.testing.assert_close(exact, by_hand)
    assert loss(-0.4, 1.3) < min(loss(-0.3, 1.3), loss(-0.5, 1.3), loss(-0.4, 1.2), loss(-0.4, 1.4))
