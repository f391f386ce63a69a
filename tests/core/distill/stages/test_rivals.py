"""The methods that compare scores: losses by hand, phases, what learns, what is refused, and that each one learns."""

import dataclasses
import math

import pytest
import torch
from by_hand import (
    SHAPE,
    SIGMA,
    B,
    Distilled,
    Model,
    Noise,
    angles,
    assert_same,
    column,
    consistency,
    drawn,
    draws,
    logits,
    noised,
)
from torch import Tensor

from sprint_core.distill import methods
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.methods import METHODS
from sprint_core.distill.recipes import RECIPES, Objective, Schedule, override, with_method
from sprint_core.distill.stages import rivals
from sprint_core.distill.stages.base import Watch
from sprint_core.distill.stages.rivals import RivalStage, distill_stage
from sprint_core.distill.stages.student import DistillStage

SCORED = [name for name, row in METHODS.items() if row.score]
COMMON = {
    "guidance": (4.0, 5.0),
    "teacher_guidance": 0.6,
    "tangent": "difference",
    "tangent_warmup_steps": 8,
    "chain_steps": 2,
}


def objective(method: str, **changes) -> Objective:
    return Objective(**with_method({"method": method, **COMMON, **changes}))


def stage_of(method: str, **changes) -> RivalStage:
    """In float64, with every weight moved, so that guidance and fake network count."""
    stage = distill_stage(Model(), Noise(), objective(method, **changes))
    generator = torch.Generator().manual_seed(1)
    for module in (*stage.modules.values(), stage.teacher):
        for parameter in module.double().parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    assert isinstance(stage, RivalStage)
    return stage


def simulated(velocity, steps: int, random):
    """The last step as a function of its noise, and that noise."""
    z, s, before = random.normal(*SHAPE).double(), torch.ones(B).double(), torch.zeros(B, *SHAPE).double()

    def generate(z: Tensor) -> Tensor:
        x = (1 - column(s)) * before + column(s) * z
        return x - column(s) * velocity(x, s)

    for _ in range(steps - 1):
        with torch.no_grad():
            after = generate(z)
        u = random.uniform().double()
        before, s = after, torch.minimum(5 * u / (1 + 4 * u), s)
        z = random.normal(*SHAPE).double()
    return generate, z


def times(method: str, random) -> Tensor:
    if method == "sid":
        return torch.sigmoid(random.normal().double() * 1.6 + math.log(2))
    u = random.uniform().double()
    return (5 * u / (1 + 4 * u)).clamp(0.02, 0.98)


def velocities(stage: RivalStage, method: str, text, w):
    """Of the guided teacher, and of the fake network, which SiD guides too."""
    null = stage.teacher.encode([""] * B)

    def guided(network):
        def run(x, s):
            v, v_null = (network(x, s, one) for one in (text, null))
            return v_null + column(0.6 * w) * (v - v_null)

        return run

    real = guided(lambda x, s, one: stage.teacher.transformer(x, s, one[0], mask=one[1]))
    alone = lambda x, s, one: stage.fake(x, s, one[0], guidance=w, mask=one[1])  # noqa: E731
    return real, guided(alone) if method == "sid" else lambda x, s: alone(x, s, text)


def scored(stage: RivalStage, method: str, generate, z: Tensor, text, w, random) -> tuple[Tensor, Tensor]:
    """The student's samples, and their loss."""
    s = times(method, random)
    real, fake = velocities(stage, method, text, w)
    difference = lambda x: column(s) * (fake(x, s) - real(x, s))  # X_real - X_fake  # noqa: E731
    normal = lambda: random.normal(*SHAPE).double()  # noqa: E731
    root = math.sqrt(math.prod(SHAPE))
    eps = normal()
    if method == "emd":
        moved = torch.zeros(B, *SHAPE).double()
        for _ in range(2):
            latent = z.detach().requires_grad_(True)
            G = generate(latent)
            with torch.no_grad():
                D = difference((1 - column(s)) * G + column(s) * eps)
                ratio = (1 - column(s)) / column(s)
            (pull,) = torch.autograd.grad((G * (ratio**2 * D)).sum(), latent)
            eps = eps + 0.16 * (ratio * D - eps) + math.sqrt(0.32) * normal()
            z = z + 1.6e-5 * (pull - z) + math.sqrt(3.2e-5) * normal()
            moved = 0.84 * moved + 0.16 * D
        G = generate(z)
        return G, (0.5 * (G - (G + moved).detach()).square().flatten(1).sum(1) / root).mean()
    G = generate(z)
    x = (1 - column(s)) * G + column(s) * eps
    if method == "sid":
        X_fake = x - column(s) * fake(x, s)
        return G, ((1 - s) * (difference(x) * (X_fake - G)).flatten(1).sum(1) / root).mean()
    with torch.no_grad():
        X_real = x - column(s) * real(x, s)
        step = difference(x) / column((G - X_real).abs().mean((1, 2, 3)))
    return G, (0.5 * (G - (G + step).detach()).square().flatten(1).sum(1) / root).mean()


# Each at its second update: with two steps.
@pytest.mark.parametrize(
    ("method", "step", "changes"),
    [
        ("dmd", 6, {}),
        ("dmd2", 6, {}),
        ("sid", 2, {"ladd_weight": 0.3}),
        ("rcm", 15, {}),
        ("emd", 2, {"score_weight": 0.7}),
    ],
)
def test_the_students_loss(method, step, changes):
    stage = stage_of(method, **changes)
    got, _ = stage.loss("student", step, draws(step))
    hand, random, aim, want = Distilled(stage), draws(step), stage.objective, torch.zeros(()).double()
    x0, text, w, hint = drawn(hand, random)
    if aim.scm_weight:
        want = want + aim.scm_weight * consistency(hand, x0, text, w, hint, step, random)
    generate, z = simulated(hand.velocity(text, w, hint), 2, random)
    G, loss = scored(stage, method, generate, z, text, w, random)
    want = want + aim.score_weight * loss
    if aim.ladd_weight:
        t = angles(random, -0.6, 1.0)
        want = want - aim.ladd_weight * logits(hand, noised(SIGMA * G, t, random)[1], t, text, w).mean()
    assert_same(got, want, stage.student.transformer)


@pytest.mark.parametrize("method", ["dmd", "sid"])
def test_the_fakes_loss(method):
    """Flow matching of samples of one and of two steps."""
    stage = stage_of(method)
    for number, step in enumerate([1, 3 if method == "sid" else 2], start=1):
        got, _ = stage.loss("fake", step, draws(step))
        random = draws(step)
        _, text, w, hint = drawn(Distilled(stage), random)
        with torch.no_grad():
            generate, z = simulated(Distilled(stage).velocity(text, w, hint), number, random)
            G = generate(z)
        s, eps = times(method, random), random.normal(*SHAPE).double()
        v = velocities(stage, method, text, w)[1]((1 - column(s)) * G + column(s) * eps, s)
        assert_same(got, (v - (eps - G)).square().mean(), stage.fake)


def test_the_critic_judges_what_the_student_makes_from_noise():
    stage = stage_of("dmd2")
    found, wanted = stage.loss("critic", 1, draws(1))[1]["fake"], draws(1)
    hand = Distilled(stage)
    _, text, w, hint = drawn(hand, wanted)
    drawn(hand, wanted)  # the captions of others
    generate, z = simulated(hand.velocity(text, w, hint), 1, wanted)
    with torch.no_grad():
        sample = SIGMA * generate(z)
        t = angles(wanted, -0.6, 1.0)
        noised(sample, t, wanted)  # the true latents' numbers
        t = angles(wanted, -0.6, 1.0)
        mine = logits(hand, noised(sample, t, wanted)[1], t, text, w).mean()
    torch.testing.assert_close(found, mine)


@pytest.mark.parametrize("method", SCORED)
def test_only_the_phases_own_module_learns(method):
    stage, row = stage_of(method), METHODS[method]
    start = 8 if row.warms_up else 0
    step = next(step for step in range(start, 40) if stage.phases(step)[0].module == "fake")
    for phase in ("student", "fake"):
        for module in stage.modules.values():
            module.zero_grad(set_to_none=True)
        stage.loss(phase, step, draws(step))[0].backward()
        others = {"student": [stage.fake], "fake": [stage.student, stage.critic]}[phase]
        assert all(p.grad is None for module in (*others, stage.teacher) for p in module.parameters())
        trained = stage.student.transformer if phase == "student" else stage.fake
        assert sum(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.parameters()) > 20


def taken(aim: Objective, steps: int) -> str:
    """S, F and C of each step."""
    phases = rivals.plan(aim)
    return " ".join("".join(p.module[0].upper() for p in phases if step in p) for step in range(steps))


def test_whose_turn_it_is():
    """Two time scales: five updates of the fake network for one of the student; rCM's sCM is alone at first."""
    assert taken(objective("dmd"), 8) == "S F F F F F S F"
    assert taken(objective("dmd2"), 8) == "S FC FC FC FC FC S FC"
    assert taken(objective("dmd2", ladd_from=4, fakes=2), 6) == "S F F S FC FC"
    assert taken(objective("sid"), 4) == taken(objective("emd"), 4) == "S F S F"
    assert taken(objective("rcm"), 16) == "S S S S S S S S F F S F F F F S"
    rates = {name: {p.module: p.rate for p in rivals.plan(objective(name))} for name in SCORED}
    assert {name: row["fake"] for name, row in rates.items()} == {"dmd": 1, "dmd2": 1, "sid": 1, "rcm": 0.2, "emd": 5}
    assert rivals.plan(objective("emd", fake_rate=2.0))[1].rate == 2.0
    assert [phase.averaged for phase in rivals.plan(objective("dmd2"))] == [True, False, False]


def test_numbers_of_steps_take_turns(monkeypatch):
    """One to four for the student as for the fake network, though their turns have a period of 6."""
    stage, seen = stage_of("dmd"), {"student": [], "fake": []}
    simulate = rivals.score.simulate
    for phase in rivals.plan(stage.objective):
        for step in [step for step in range(48) if step in phase][:8]:
            spy = lambda *args, phase=phase: seen[phase.module].append(args[2]) or simulate(*args)  # noqa: E731
            monkeypatch.setattr(rivals.score, "simulate", spy)
            stage._simulated(torch.zeros(B, *SHAPE).double(), stage._batch(draws())[1], step, draws())
    assert seen == {"student": [1, 2, 3, 4] * 2, "fake": [1, 2, 3, 4] * 2}


def test_the_guards_error_is_of_the_distribution():
    """By channel: the Gaussians' squared distance, over the variance; noise by noise it is logged."""
    watch = Watch([torch.ones(3, 24), torch.zeros(2, 24)], SHAPE, 4.0)
    stage = distill_stage(Model().float(), Noise(), objective("dmd"), watch=watch)
    found = stage.check(stage.student)
    plain = DistillStage(Model().float(), Noise(), Objective(guidance=(4.0, 5.0), teacher_guidance=0.6), watch=watch)
    assert found["endpoints"] == pytest.approx(plain.check(plain.student)["error"])
    z = watch.noise(torch.device("cpu"))
    mine, ends = stage._one_step(stage.student, z, watch.captions, 5.0), stage._ends
    parts = [x.movedim(1, 0).flatten(1) for x in (mine, ends)]
    distance = sum((getattr(parts[0], f)(1) - getattr(parts[1], f)(1)).square().sum() for f in ("mean", "std"))
    assert found["error"] == pytest.approx(float(distance / parts[1].var(1).sum()), rel=1e-4)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=gan"], r"distill: method is 'gan'; there are scm \(\[scm_weight\], \[ladd_weight\]\), dmd \("),
        (
            ["method=emd", "scm_weight=0.2"],
            r"method emd does not go with scm_weight 0.2, .* emd \(score_weight, \[ladd",
        ),
        (
            ["method=dmd", "ladd_weight=0.5"],
            r"does not go with .*ladd_weight 0.5; .* dmd2 \(score_weight, ladd_weight\)",
        ),
        (["method=dmd2", "ladd_weight=0"], "method dmd2 does not go with"),
        (["method=rcm", "scm_weight=0"], "method rcm does not go with"),
        (["score_weight=1"], "method scm does not go with scm_weight 0.2, score_weight 1"),
        (["method=rcm", "tangent_warmup_steps=2400"], "fake network would never begin: distill.tangent_warmup_steps"),
        (["method=dmd", "sampled_steps=5"], "sampled_steps must lie in 1 to 4"),
        (["method=emd", "chain_steps=0"], "chain_steps be 1"),
        (["method=dmd", "fakes=-1"], "fakes 0 or more"),
        (["teacher_guidance=nan"], "teacher_guidance must be 0 or more"),
        (["method=dmd", "fake_rate=nan"], "fake_rate must be 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        override(RECIPES["demo"], [f"distill.{setting}" for setting in settings])


@pytest.mark.parametrize("method", METHODS)
def test_embedders_learn_slowly_where_scm_teaches(method):
    """Or where somebody says so."""
    expected = 0.1 if method in ("scm", "rcm") else 1.0
    for recipe in ("demo", "shapes"):
        chosen = override(RECIPES[recipe], [f"distill.method={method}"])
        assert chosen.stages["distill"].embedder_rate == expected
        said = override(RECIPES[recipe], [f"distill.method={method}", "distill.embedder_rate=0.3"])
        assert said.stages["distill"].embedder_rate == 0.3
    alone = override(RECIPES["demo"], ["distill.scm_weight=0", "distill.ladd_from=0"])
    assert alone.stages["distill"].embedder_rate == 1.0


def test_a_method_brings_its_weights():
    """Unless a setting says otherwise; what a recipe had without a method stays."""
    for recipe in ("demo", "shapes", "sprint-1.6B"):
        for name, row in METHODS.items():
            changed = override(RECIPES[recipe], [f"distill.method={name}"]).objective
            assert all(getattr(changed, key) == value for key, value in row.sets.items())
            assert changed.guidance == RECIPES[recipe].objective.guidance
    assert override(RECIPES["demo"], ["distill.method=sid", "distill.ladd_weight=0.1"]).objective.ladd_weight == 0.1
    assert override(RECIPES["demo"], ["distill.method=scm"]) == RECIPES["demo"]
    assert "method" not in RECIPES["demo"].objective.chosen
    with pytest.raises(ValueError, match=r"control\.method is dmd: a ControlNet learns by scm alone"):
        override(RECIPES["demo-control"], ["control.method=dmd"])
    assert methods.listed().startswith("scm ([scm_weight], [ladd_weight]), dmd (score_weight), dmd2 (")


def test_the_ratio_is_rcms():
    """Of the lengths of both gradients: 100 sums (F - F^- - g)^2 with |g| near 1, to one sum (G - sg[G - grad])^2 of
    2.1 million elements; here, 0.2 sums and half of one over the root of their number."""
    row = METHODS["rcm"].sets
    theirs = 2 * math.sqrt(2.1e6) / (100 * 2)
    assert row["score_weight"] / (row["scm_weight"] * 2) == pytest.approx(theirs, rel=0.02)


class Unguided(Model):
    """With this embedding of the empty caption."""

    def __init__(self, empty: Tensor):
        super().__init__()
        self.empty = empty

    def encode_empty(self, count):
        return self.encode([self.empty] * count)


def test_a_teacher_that_cannot_be_guided_is_refused():
    """No tokens for the empty caption, or no numbers: before the first step, whatever the method."""
    for empty in (torch.zeros(0, 24), torch.full((2, 24), math.nan)):
        model = Unguided(empty)
        for method in ("scm", "dmd"):
            with pytest.raises(
                ValueError, match=r"its embedding of the empty caption has no tokens or is not finite: delete"
            ):
                distill_stage(model, Noise(), Objective(**with_method({"method": method})))


SHORT = Schedule(steps=14, batch=2, lr=1e-4, warmup_steps=1, check_every=0)


class Floats(Noise):
    def batch(self, random):
        batch = super().batch(random)
        return dataclasses.replace(batch, latents=batch.latents.float(), hints=None)


def float_stage(method: str, watch: Watch | None = None) -> DistillStage:
    return distill_stage(Model().float(), Floats(), objective(method, tangent_warmup_steps=2), watch=watch)


@pytest.mark.parametrize("method", ["dmd2", "sid", "rcm", "emd"])
def test_resume_equals_uninterrupted_bit_for_bit(method, tmp_path):
    whole = Trainer(float_stage(method), SHORT, tmp_path / "whole")
    start = {name: module.state_dict() for name, module in whole.stage.modules.items()}
    start = {name: {key: value.clone() for key, value in state.items()} for name, state in start.items()}
    whole.train(until=8)
    Trainer(float_stage(method), SHORT, tmp_path / "parts").train(until=3)
    resumed = Trainer(float_stage(method), SHORT, tmp_path / "parts")
    resumed.train(until=8)
    assert whole.skipped == 0
    for name, module in whole.stage.modules.items():
        other = resumed.stage.modules[name].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in module.state_dict().items())
        moved = [not torch.equal(value, start[name][key]) for key, value in module.state_dict().items()]
        assert any(moved) == (name != "critic" or method == "dmd2")
    assert all(map(torch.equal, whole.average.parameters(), resumed.average.parameters()))


def test_another_method_does_not_resume(tmp_path):
    """Not even from the best average."""
    schedule = dataclasses.replace(SHORT, check_every=1)
    watch = Watch([torch.ones(3, 24)] * 2, SHAPE, 4.0)
    stages = [float_stage(name, watch) for name in ("sid", "emd", "scm")]
    Trainer(stages[0], schedule, tmp_path).train(until=1)
    for stage in stages[1:]:
        for resume_best in (False, True):
            with pytest.raises(ValueError, match="holds another run"):
                Trainer(stage, schedule, tmp_path, resume_best=resume_best)
    assert Trainer(stages[0], schedule, tmp_path, resume_best=True).step in (0, 1)
