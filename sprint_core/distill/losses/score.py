"""Distillation by the difference of two scores: the teacher's, and that of the student's own samples.

A fake network learns how the student's samples are distributed, by flow matching. Where it and the teacher predict
other clean latents of a noised sample, the sample is to move. With x_s = (1 - s) G + s eps and X = x_s - s v,

    (1) scores      grad log p_s(x_s) = -(x_s - (1 - s) X) / s^2
    (2) difference  X_fake - X_real = s (v_real - v_fake) = s^2 / (1 - s) (score_fake - score_real)

so that the gradient of KL(p_fake || p_real) at noise s moves a sample G along (2), up to a positive weight. All is in
flow variables and scaled latents [b, c, h, w] (standard deviation 1); times s [b]. Real predictions are guided.

How a sample moves are rows of SCORES, at which times s are rows of TIMES. Losses are sums over the n elements of a
sample, divided by sqrt(n): the gradient in G then is as long for every n, and weights hold for every size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import trigflow
from ...devices import fp32
from ...trigflow import flow_add_noise, flow_predict_x0
from ..engine.randomness import SampleRandom
from .scm import Proposal
from .transform import Network, per_sample

SHIFT = 5.0  # of the times: Self-Forcing and rCM
TIME_RANGE = (0.02, 0.98)  # DMD, DMD2
LEAST_DISTANCE = 1e-5  # in DMD's divisor: rCM, SiD
SID_PROPOSAL = Proposal(0.0, 1.6)  # s = sigmoid(n), n ~ N(ln 2, 1.6^2)
CHAIN_STEP_NOISE = 0.4**2  # EMD's step sizes: see `emd`
CHAIN_STEP_LATENT = 0.004**2

Noise = Callable[[], Tensor]  # unit normal, as the latent that it is of


@dataclass(frozen=True)
class Scores:
    """Flow velocities v(x_s, s) of the teacher, and of the network that has learnt the student's samples."""

    real: Network
    fake: Network

    def predictions(self, x_s: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X_fake - X_real, X_real and X_fake in fp32."""
        real, fake, times = fp32(self.real(x_s, s)), fp32(self.fake(x_s, s)), per_sample(s, x_s)
        return times * (real - fake), flow_predict_x0(real, x_s, times), flow_predict_x0(fake, x_s, times)


@dataclass(frozen=True)
class Moved:
    """Samples G = generate(z) [b, c, h, w], with their graph, and each one's loss [b]."""

    samples: Tensor
    loss: Tensor


# --- times --------------------------------------------------------------------------------------------


def shifted_times(random: SampleRandom) -> Tensor:
    """[b] uniform, moved towards noise, and kept off both ends, where predictions say nothing."""
    return trigflow.shift(random.uniform(), SHIFT).clamp(*TIME_RANGE)


def normal_times(random: SampleRandom) -> Tensor:
    """[b] of SiD: the angles of sCM, with mean 0."""
    return trigflow.s_from_t(SID_PROPOSAL.draw(random))


TIMES = {"shifted": shifted_times, "normal": normal_times}


# --- the student's samples ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LastStep:
    """The last of some steps of the student, as a function of its noise: what the generator is to these losses."""

    student: Network  # velocity v(x_s, s)
    before: Tensor  # what the steps before it predicted: any number where s is 1
    s: Tensor  # [b]

    def __call__(self, z: Tensor) -> Tensor:
        """The prediction, in fp32."""
        times = per_sample(self.s, z)
        x_s = flow_add_noise(self.before, z, times)
        return flow_predict_x0(fp32(self.student(x_s, self.s)), x_s, times)


@torch.no_grad()
def simulate(student: Network, like: Tensor, steps: int, random: SampleRandom) -> tuple[LastStep, Tensor]:
    """All of some steps but the last, as in sampling, and that one's noise: rCM's form of DMD2's backward simulation.

    The first is at s = 1. Each other time is drawn anew, at most the one before; so is its noise. Inputs of later steps
    are the student's own samples, noised again, as when it is used.
    """
    z = random.normal(*like.shape[1:]).to(like)
    step = LastStep(student, torch.zeros_like(z), z.new_ones(len(z)))
    for _ in range(steps - 1):
        before, s = step(z), trigflow.shift(random.uniform(), SHIFT).to(z)
        z = random.normal(*like.shape[1:]).to(like)
        step = LastStep(student, before, torch.minimum(s, step.s))
    return step, z


# --- losses ---------------------------------------------------------------------------------------------


def pulled(samples: Tensor, gradient: Tensor) -> Tensor:
    """[b]: a loss whose gradient in the samples is that one, over sqrt(n)."""
    error = (samples - (samples - gradient).detach()).flatten(1)
    return 0.5 * error.square().sum(1) / math.sqrt(error.shape[1])


def dmd(generate: Callable[[Tensor], Tensor], z: Tensor, s: Tensor, scores: Scores, noise: Noise, chain: int) -> Moved:
    """Distribution matching (arXiv 2311.18828, 2405.14867): (X_fake - X_real) / mean |G - X_real|."""
    samples = generate(z)
    with torch.no_grad():
        difference, real, _ = scores.predictions(flow_add_noise(samples, noise(), per_sample(s, z)), s)
        distance = (samples - real).abs().flatten(1).mean(1).clamp(min=LEAST_DISTANCE)
    return Moved(samples, pulled(samples, difference / per_sample(distance, z)))


def sid(generate: Callable[[Tensor], Tensor], z: Tensor, s: Tensor, scores: Scores, noise: Noise, chain: int) -> Moved:
    """Score identity distillation (arXiv 2404.04057; 2509.25127 for SANA), alpha = 1.

    The sum of (1 - s) (X_real - X_fake) (X_fake - G). Its gradient passes through both networks.
    """
    samples = generate(z)
    difference, _, fake = scores.predictions(flow_add_noise(samples, noise(), per_sample(s, z)), s)
    product = (-difference * (fake - samples)).flatten(1)
    return Moved(samples, (1 - s) * product.sum(1) / math.sqrt(product.shape[1]))


def emd(generate: Callable[[Tensor], Tensor], z: Tensor, s: Tensor, scores: Scores, noise: Noise, chain: int) -> Moved:
    """EM distillation (arXiv 2405.16852): a sample moves to where a Langevin chain takes its noise and its latent.

    The chain's distribution is q_s / p_s (x) N(eps) N(z) with x = (1 - s) G(z) + s eps, where q_s is the teacher's, p_s
    the student's: of x it is q_s. From eps and z of the student, in `chain` steps, with D = X_real - X_fake at x,

        eps' = eps + a ((1 - s) / s D - eps) + sqrt(2 a) n,    z' = z + b ((1 - s)^2 / s^2 J^T D - z) + sqrt(2 b) m

    where J is the derivative of G. Noise has no part in where G(z) is to move (noise cancellation): by the sum of
    a (1 - a)^(steps left) D. One step, and z as it was, is DMD without its divisor, times a.

    The paper's authors published no code. These are from memory of it, unchecked: the step sizes a = 0.4^2 and b =
    0.004^2, and that the fake network has one update for each of the student's, at five times its rate. Ours are the
    four steps, for want of time (the paper has 8 and 16), the times, the weight (s / (1 - s))^2, and that z is the
    noise of a student's last step.
    """
    a, b = CHAIN_STEP_NOISE, CHAIN_STEP_LATENT
    times, eps = per_sample(s, z), noise()
    moved = torch.zeros_like(z)
    for _ in range(chain):
        with torch.enable_grad():
            latent = z.detach().requires_grad_(True)
            samples = generate(latent)
        with torch.no_grad():
            difference, _, _ = scores.predictions(flow_add_noise(samples, eps, times), s)
            drift = -(1 - times) / times * difference
        (pull,) = torch.autograd.grad(samples, latent, (1 - times) / times * drift)
        eps = eps + a * (drift - eps) + math.sqrt(2 * a) * noise()
        z = z + b * (pull - z) + math.sqrt(2 * b) * noise()
        moved = (1 - a) * moved - a * difference
    samples = generate(z)
    return Moved(samples, pulled(samples, -moved))


SCORES = {"dmd": dmd, "sid": sid, "emd": emd}


def fake_loss(fake: Network, samples: Tensor, s: Tensor, noise: Noise) -> Tensor:
    """Flow matching of the student's samples: the mean of (v - (eps - G))^2."""
    eps = noise()
    velocity = fp32(fake(flow_add_noise(samples, eps, per_sample(s, samples)), s))
    return (velocity - (eps - samples)).square().mean()
