"""Stock caches and renormalisation, which read the network's arguments by position and its channels by name."""

import itertools

import pytest
import standin
import torch

from sprint_core.weights import checkpoint, layouts

STEPS = 6


@pytest.fixture(scope="module", params=["sprint", "teacher"])
def folder(host, request, pipeline_folder):
    if request.param == "sprint":
        return pipeline_folder
    return standin.make(host.base / "models" / "diffusers" / "cached-teacher", standin.TEACHER)


@pytest.fixture(scope="module")
def either(node, folder):
    """A Sprint, then a teacher."""
    return node("SanaSprintModelLoader", model=folder.name)


@pytest.fixture
def euler(ksample, either):
    return lambda **inputs: ksample(**({"model": either, "steps": STEPS, "sampler_name": "euler"} | inputs))


def reused(folder, sigmas, positive):
    """An Euler loop on the core's network whose steps from the third on reuse the second's v - x."""
    net = checkpoint.build(checkpoint.load(folder, layouts.TRANSFORMER))
    guidance = torch.tensor([4.5]) if net.config.guidance_embed else None
    x = torch.randn(1, 32, 3, 4, generator=torch.manual_seed(1))
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        if i < 2:
            v = net(x, s[None], positive[0][0], guidance)
            change = v - x
        x = x + (s_next - s) * (x + change)
    return x / 0.41407


def test_easy_cache_reuses_what_it_says(node, folder, either, euler, positive, close):
    """In fp32 ComfyUI hands the sampler's own latent to the cache, which adds to it in place."""
    eager = node("EasyCache", model=either, reuse_threshold=1e9, start_percent=0.0, end_percent=1.0)
    sigmas = node("BasicScheduler", model=either, scheduler="simple", steps=STEPS)
    close(euler(model=eager), reused(folder, sigmas, positive), 1e-4)


@pytest.mark.parametrize("id", ["EasyCache", "LazyCache"])
def test_a_cache_that_never_reuses_changes_nothing(node, either, euler, other, id):
    wary = node(id, model=either, reuse_threshold=0.0)
    run = {"cfg": 4.5, "negative": other}
    assert torch.equal(euler(model=wary, **run), euler(**run))


def test_easy_cache_saves_runs_of_the_network(node, either, euler, other):
    calls = []
    hook = either.model.diffusion_model.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for threshold in (0.0, 1e9):
        cached = node("EasyCache", model=either, reuse_threshold=threshold, start_percent=0.0, end_percent=1.0)
        euler(model=cached, cfg=4.5, negative=other)
        counts.append(len(calls))
        calls.clear()
    hook.remove()
    assert counts[1] * STEPS == counts[0] * 2 > 0


@pytest.mark.parametrize("limit", [1.0, 0.5])
def test_renorm_cfg_limits_the_guided_prediction(node, either, euler, positive, other, limit, close):
    """One step: the prediction is at most as long as the conditional one times the limit."""
    run = {"steps": 1, "negative": other}
    guided, plain = euler(cfg=4.5, **run), euler(cfg=1.0, **run)
    longest = limit * plain.norm()
    expected = guided * min(1.0, float(longest / guided.norm()))
    close(euler(model=node("RenormCFG", model=either, renorm_cfg=limit), cfg=4.5, **run), expected, 1e-4)
