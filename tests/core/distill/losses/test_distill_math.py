"""The transform, sCM and LADD against finite differences, closed forms and exact properties."""

import itertools
import math

import pytest
import standin
import torch

from sprint_core import trigflow
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.losses import jvp, ladd, scm
from sprint_core.distill.losses.transform import per_sample, trigflow_network
from sprint_core.distill.recipes import Objective
from sprint_core.models.layers import sdpa
from sprint_core.models.transformer import SanaTransformer, TransformerConfig
from sprint_core.trigflow import SIGMA_DATA

CONFIG = TransformerConfig(width=64, depth=3, cross_heads=2, caption_width=32)
GAUSSIAN_STD = 0.8  # of the toy data, unlike SIGMA_DATA


def random64(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def network() -> SanaTransformer:
    model = SanaTransformer(CONFIG)
    model.load_state_dict(standin.random_model(model))
    return model.double().requires_grad_(False)


@pytest.fixture
def condition() -> dict:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"caption": random64(2, 5, 32, seed=1), "guidance": torch.tensor([4.5, 4.0]).double(), "mask": mask}


def trig(network: SanaTransformer, condition: dict):
    return trigflow_network(lambda x, s: network(x, s, **condition, attention=jvp.plain_attention))


def test_plain_attention_is_sdpa():
    q, k, v = random64(2, 6, 32), random64(2, 5, 32, seed=1), random64(2, 5, 32, seed=2)
    mask = torch.tensor([0.0, 0.0, -1e4, 0.0, 0.0], dtype=torch.float64).expand(2, 1, 1, 5)
    torch.testing.assert_close(jvp.plain_attention(q, k, v, 2, mask), sdpa(q, k, v, 2, mask))


def test_transformed_teacher_walks_the_flow_teachers_euler_steps(network, condition):
    """Rotations of the TrigFlow network are Euler steps of the flow network, under the change of variables."""
    F = trig(network, condition)
    angles = [trigflow.T_MAX * (1 - i / 10) for i in range(11)]
    x_t = SIGMA_DATA * random64(2, 32, 4, 4, seed=3)
    x_s = trigflow.flow_input(x_t, angles[0])
    for t, t_next in itertools.pairwise(angles):
        output = F(x_t / SIGMA_DATA, torch.full((2,), t, dtype=torch.float64))
        x_t = trigflow.rotate(x_t, output, t, t_next)
        s, s_next = trigflow.s_from_t(t), trigflow.s_from_t(t_next)
        v = network(x_s, torch.full((2,), s, dtype=torch.float64), **condition)
        x_s = x_s + (s_next - s) * v
    torch.testing.assert_close(x_t / SIGMA_DATA, x_s, rtol=1e-5, atol=1e-5)


def test_tangent_is_the_finite_difference(network, condition):
    F = trig(network, condition)
    x, t = random64(2, 32, 4, 4, seed=4), torch.tensor([0.7, 1.2], dtype=torch.float64)
    dx, dt, h = random64(2, 32, 4, 4, seed=5), torch.tensor([0.5, 0.3], dtype=torch.float64), 1e-5
    tangent = jvp.tangent(F, x, t, dx, dt)
    difference = (F(x + h * dx, t + h * dt) - F(x - h * dx, t - h * dt)) / (2 * h)
    assert (difference - tangent).abs().max() / tangent.abs().max() <= 1e-6
    assert not tangent.requires_grad


def toy_std(t: torch.Tensor) -> torch.Tensor:
    return (t.cos().square() * GAUSSIAN_STD**2 + t.sin().square() * SIGMA_DATA**2).sqrt()


def toy_velocity(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """dx_t/dt of Gaussian data: trajectories scale with the standard deviation."""
    slope = t.sin() * t.cos() * (SIGMA_DATA**2 - GAUSSIAN_STD**2) / toy_std(t) ** 2
    return per_sample(slope, x_t) * x_t


def toy_solution(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """F of the exact consistency function f(x_t, t) = x_t * std(0) / std(t)."""
    f = per_sample(GAUSSIAN_STD / toy_std(t), x) * x
    angle = per_sample(t, x)
    return (angle.cos() * x - f) / angle.sin()


def toy() -> tuple[torch.Tensor, torch.Tensor]:
    t = torch.tensor([0.3, 0.9, 1.4], dtype=torch.float64)
    return per_sample(toy_std(t), torch.empty(3, 2, 4, 4)) * random64(3, 2, 4, 4), t


@pytest.mark.parametrize("form", ["published", "cosine"])
@pytest.mark.parametrize("tangent", ["jvp", "difference"])
def test_loss_has_no_gradient_at_the_true_consistency_function(form, tangent, monkeypatch):
    """The difference, of first order, in the limit of small steps."""
    monkeypatch.setattr(scm, "DIFFERENCE_SHARE", 1e-6)
    x_t, t = toy()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    F, g, _ = scm.tangent_target(
        lambda x, u: scale * toy_solution(x, u), x_t, t, toy_velocity(x_t, t), r=1.0, tangent=tangent
    )
    scm.loss(F, g, t, torch.zeros_like, form).backward()
    error = 1e-12 if tangent == "jvp" else 1e-5
    assert g.abs().max() < error
    assert scale.grad.abs() < 100 * error


def test_tangent_away_from_the_solution_is_the_closed_form():
    """A student F(x, t) = c x has dF = c dx: g by hand, then normalised."""
    x_t, t = toy()
    dxdt, c, r = toy_velocity(x_t, t), 0.3, 0.5
    _, g, metrics = scm.tangent_target(lambda x, u: c * x, x_t, t, dxdt, r)
    cos, sin = per_sample(t.cos(), x_t), per_sample(t.sin(), x_t)
    by_hand = -(cos**2) * (c * x_t - dxdt) - r * cos * sin * (x_t + c * dxdt)
    norm = by_hand.flatten(1).norm(dim=1)
    torch.testing.assert_close(g, by_hand / per_sample(norm + 0.1, g))
    torch.testing.assert_close(metrics["g_norm"], norm.mean())


def difference_by_hand(F, x_t, t, dxdt, r, h):
    """The formula word by word, with f* and F* as they are defined."""
    c, s = per_sample(t.cos(), x_t), per_sample(t.sin(), x_t)
    ahead = per_sample(h, x_t)
    x = ahead.cos() * x_t - ahead.sin() * dxdt
    angle = per_sample(t - h, x_t)
    f = angle.cos() * x - angle.sin() * SIGMA_DATA * F(x / SIGMA_DATA, t - h)
    star, now = (c * x_t - f) / (SIGMA_DATA * s), F(x_t / SIGMA_DATA, t)
    g = -(1 - r) * c**2 * (SIGMA_DATA * now - dxdt) + r * SIGMA_DATA * s * c / ahead * (star - now)
    return g / (per_sample(g.flatten(1).norm(dim=1), g) + 0.1)


@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_difference_is_its_formula_and_goes_to_the_jvp(network, condition, r, monkeypatch):
    """A step of a tenth of the angle; of smaller ones the error falls with the step (ReLUs make it uneven)."""
    F = trig(network, condition)
    x_t, t = 0.5 * random64(2, 32, 4, 4, seed=6), torch.tensor([0.7, 1.2], dtype=torch.float64)
    dxdt = random64(2, 32, 4, 4, seed=7)
    out, g, _ = scm.tangent_target(F, x_t, t, dxdt, r, tangent="difference")
    torch.testing.assert_close(g, difference_by_hand(F, x_t, t, dxdt, r, 0.1 * t))
    torch.testing.assert_close(out, F(x_t / SIGMA_DATA, t))
    _, want, _ = scm.tangent_target(F, x_t, t, dxdt, r)
    errors = []
    for share in (1e-3, 1e-5):
        monkeypatch.setattr(scm, "DIFFERENCE_SHARE", share)
        errors.append((scm.tangent_target(F, x_t, t, dxdt, r, tangent="difference")[1] - want).norm() / want.norm())
    assert errors[1] < 1e-4 and (r == 0 or errors[1] < 0.02 * errors[0])


def test_flow_matching_is_the_velocity_error_for_one_forward_pass():
    """Its mean square over all elements, and the gradient of that, in closed form: all angles count alike."""
    x_t, dxdt = (0.5 * random64(2, 8, 2, 2, seed=seed) for seed in (1, 2))
    t, calls = torch.tensor([0.3, 1.57], dtype=torch.float64), []
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def student(x, u):
        calls.append(u)
        return c * x

    F, g = scm.velocity_target(student, x_t, t, dxdt)
    loss = scm.loss(F, g, t, torch.zeros_like, "flow")
    loss.backward()
    assert len(calls) == 1
    error = (0.7 * x_t - dxdt) / SIGMA_DATA
    torch.testing.assert_close(loss.detach(), error.square().mean())
    torch.testing.assert_close(c.grad, (2 * error * x_t / SIGMA_DATA).mean())


def test_the_rows_that_recipes_may_name():
    for field, table in (("form", scm.FORMS), ("tangent", scm.TANGENTS)):
        for name in table:
            Objective(**{field: name})
        with pytest.raises(ValueError, match=f"{field} is 'other'; there are {' and '.join(table)}"):
            Objective(**{field: "other"})


def test_guided_velocity_is_classifier_free_guidance():
    x, t, w = random64(2, 1, 2, 2), torch.tensor([0.5, 1.0]).double(), torch.tensor([4.0, 5.0]).double()
    v = scm.guided_velocity(lambda x, t, y: x * y, x, t, w, 3.0, 1.0)
    torch.testing.assert_close(v, SIGMA_DATA * (x + per_sample(w, x) * 2 * x))


def test_proposal_has_its_median_and_stays_below_pi_half():
    t = scm.Proposal(0.2, 1.6).draw(SampleRandom(0, 0, "", range(8000)))
    assert t.max() <= trigflow.T_MAX and t.min() > 0
    assert abs(float((t.tan() * SIGMA_DATA).log().median()) - 0.2) < 0.05


def test_loss_weight_is_learnt_towards_the_error():
    """At the best log-variance w, exp(w) is the weighted error."""
    F, g, t = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0), torch.tensor([1.0])
    w = torch.zeros(1, requires_grad=True)
    scm.loss(F, g, t, lambda t: w).backward()
    assert math.isclose(w.grad.item(), 1 - 4.0 / (SIGMA_DATA * math.tan(1.0)), rel_tol=1e-5)


def test_heads_sit_at_the_published_depths():
    assert ladd.block_ids(20) == ladd.PUBLISHED_BLOCKS
    assert ladd.block_ids(28) == (3, 11, 20, 27)
    assert ladd.block_ids(6)[-1] == 5 and len(ladd.block_ids(1)) == 1


def test_a_head_in_torchs_own_layers():
    """1x1, norm of 8 groups, leaky ReLU of 0.2; the same with 3x3 beside a shortcut; 1x1 to one logit a token."""
    torch.manual_seed(0)
    head, (b, h, w) = ladd.Head(16), (2, 3, 4)
    tokens = torch.randn(b, h * w, 16)
    first = torch.nn.Sequential(head.inward, head.norm1, torch.nn.LeakyReLU(0.2))
    second = torch.nn.Sequential(head.around, head.norm2, torch.nn.LeakyReLU(0.2))
    x = first(tokens.mT.reshape(b, 16, h, w))
    torch.testing.assert_close(head(tokens, (h, w)), head.outward(x + second(x))[:, 0])
    assert (head.norm1.num_groups, head.norm2.num_groups, head.inward.out_channels) == (8, 8, 128)


def test_ladd_reaches_student_and_heads_but_no_teacher(network, condition):
    teacher = SanaTransformer(CONFIG)
    teacher.load_state_dict(standin.random_model(teacher))
    teacher.requires_grad_(False)
    critic = ladd.Critic(CONFIG.width, CONFIG.depth)
    condition = {name: value.float() for name, value in condition.items()}
    x0 = torch.randn(2, 32, 4, 4, requires_grad=True)
    t = torch.tensor([0.4, 1.1])
    noisy = ladd.renoise(x0, t, SampleRandom(0, 0, "", range(2)))
    ladd.generator_loss(critic(teacher, noisy, t, **condition)).backward()
    assert x0.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in teacher.parameters())


def test_critic_sees_the_blocks_it_names(network, condition):
    """With heads that read out one channel, logits are that channel of the block outputs."""
    critic = ladd.Critic(CONFIG.width, CONFIG.depth)
    assert critic.blocks == ladd.block_ids(CONFIG.depth)
    outputs = []

    def keep(i, run, x, caption):
        outputs.append(run(x, caption))
        return outputs[-1]

    class FirstChannel(torch.nn.Module):
        def forward(self, tokens, size):
            return tokens[..., 0].unflatten(1, size)

    critic.heads = torch.nn.ModuleList(FirstChannel() for _ in critic.blocks)
    x_t, t = random64(2, 32, 4, 4), torch.tensor([0.4, 1.1], dtype=torch.float64)
    logits = critic(network, x_t, t, **condition)
    x_s = trigflow.flow_input(x_t, per_sample(t, x_t))
    network(x_s, trigflow.s_from_t(t), around_block=keep, **condition)
    torch.testing.assert_close(logits, torch.cat([outputs[i][..., 0] for i in critic.blocks], dim=1))


def test_half_of_the_generators_angles_are_at_maximum():
    t = ladd.generator_angles(scm.Proposal(0.2, 1.6), 0.3, SampleRandom(0, 0, "", range(4000)))
    assert abs(float((t == trigflow.T_MAX).float().mean()) - 0.3) < 0.03


def test_hinge():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert ladd.critic_loss(real, [fake]).item() == pytest.approx(0.25 + 0.5)
    assert ladd.critic_loss(real, [fake, fake]).item() == pytest.approx(0.75)
    assert ladd.generator_loss(fake).item() == pytest.approx(1.0)
