"""A phase's optimizers: every parameter once, embedders of time and guidance at a rate of their own."""

import copy
import dataclasses

import pytest
import torch

from sprint_core.distill import recipes
from sprint_core.distill.engine import optimizers, sharding
from sprint_core.distill.recipes import Schedule
from sprint_core.models.layers import timestep_embedding
from sprint_core.models.transformer import SanaTransformer, TransformerConfig

CONFIG = TransformerConfig(width=32, depth=1, cross_heads=1, caption_width=32, guidance_embed=True)
KINDS = {"adamw": (0.0, 0.99), "muon": (0.0, 0.99), "came": (0.9, 0.999, 0.9999)}


def rates(kind: str, embedder_rate: float) -> dict[str, float]:
    """Of every parameter, by name, in a step at a rate of 2."""
    network = torch.nn.ModuleDict({"transformer": SanaTransformer(CONFIG)})
    schedule = Schedule(10, 1, 1e-3, optimizer=kind, betas=KINDS[kind], embedder_rate=embedder_rate)
    names = {id(p): name for name, p in network.named_parameters()}
    pairs = []
    for optimizer in optimizers.fresh("student", network, schedule).values():
        optimizers.set_rate(optimizer, 2.0)
        pairs += [(names[id(p)], group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(pairs) == len(names) == len(dict(pairs))
    return dict(pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_embedders_of_time_and_guidance_have_a_rate_of_their_own(kind):
    by_name = rates(kind, 0.1)
    slow = {name for name, rate in by_name.items() if rate == pytest.approx(0.2)}
    time = "transformer.time_embed"
    parts = [f"{layer}.{tensor}" for layer in ("linear_1", "linear_2") for tensor in ("weight", "bias")]
    assert slow == {f"{time}.{which}_embedder.{part}" for which in ("timestep", "guidance") for part in parts}
    assert all(rate == 2.0 for name, rate in by_name.items() if name not in slow)
    assert set(rates(kind, 1.0).values()) == {2.0}


def test_a_frozen_embedder_stays():
    network = SanaTransformer(CONFIG)
    schedule = Schedule(10, 1, 1e-3, embedder_rate=0.0)
    (optimizer,) = optimizers.fresh("student", network, schedule).values()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizers.set_rate(optimizer, 1e-3)
    optimizer.step()
    moved = {name for name, p in network.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if "_embedder." not in name}


def test_why_most_features_of_a_time_or_a_guidance_are_one_bias():
    for values in (torch.linspace(0, 1, 101), 0.1 * torch.tensor([4.0, 4.5, 5.0])):
        features = timestep_embedding(values)
        assert (features > 0.99).all(0).sum() > 90


def test_the_rate_of_embedders_is_checked_and_set_where_few_steps_need_it():
    for bad in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="embedder_rate must be 0 or more"):
            Schedule(10, 1, 1e-3, embedder_rate=bad)
    rows = {name: recipe.stages["distill"] for name, recipe in recipes.RECIPES.items() if not recipe.is_control}
    published = {"sprint-0.6B": 1.0, "sprint-1.6B": 1.0}
    assert {name: row.embedder_rate for name, row in rows.items()} == {"demo": 0.1, "shapes": 0.1} | published
    assert dataclasses.replace(Schedule(10, 1, 1e-3), embedder_rate=0.1).chosen["embedder_rate"] == "0.1"


@pytest.mark.parametrize("kind", KINDS)
def test_groups_go_on_where_they_stopped(kind):
    """Bit for bit, each group at its rate."""

    def step(network: torch.nn.Module, made: dict, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        for optimizer in made.values():
            optimizers.set_rate(optimizer, 1e-2)
            optimizer.step()

    schedule = Schedule(10, 1, 1e-3, optimizer=kind, betas=KINDS[kind], embedder_rate=0.1)
    whole, resumed = SanaTransformer(CONFIG), SanaTransformer(CONFIG)
    made, again = (optimizers.fresh("student", network, schedule) for network in (whole, resumed))
    step(whole, made, 1)
    resumed.load_state_dict(whole.state_dict())
    for name, optimizer in again.items():
        sharding.load_optimizer(optimizer, copy.deepcopy(sharding.optimizer_state(made[name])))
    step(whole, made, 2)
    step(resumed, again, 2)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
