"""Multi-step models: SANA 1.0, 1.5 and Sprint's teachers sample with KSampler and classifier-free guidance."""

import dataclasses
import itertools

import pytest
import standin
import torch

from sprint_core import trigflow
from sprint_core.weights import checkpoint, layouts

STEPS, CFG = 6, 4.5


@pytest.fixture(scope="module", params=[1.0, 1000.0], ids=["0..1", "0..1000"])
def folder(host, request):
    config = dataclasses.replace(standin.TEACHER, time_scale=request.param)
    return standin.make(host.base / "models" / "diffusers" / f"multistep-{request.param:g}", config)


@pytest.fixture(scope="module")
def teacher(node, folder):
    return node("SanaSprintModelLoader", model=folder.name)


def shifted(shift, steps):
    """The flow schedule that 'simple' takes from ComfyUI's table, from s = 1 to 0."""
    s = torch.tensor([(1000 - int(i * 1000 / steps)) / 1000 for i in range(steps)] + [0.0], dtype=torch.float64)
    return (shift * s / (1 + (shift - 1) * s)).float()


def test_ksampler_is_an_euler_loop_on_the_core_transformer(folder, teacher, ksample, positive, other, close):
    net = checkpoint.build(checkpoint.load(folder, layouts.TRANSFORMER))
    x = torch.randn(1, 32, 3, 4, generator=torch.manual_seed(1))
    sigmas = shifted(3.0, STEPS)
    for s, s_next in itertools.pairwise(sigmas):
        v = [net(x, s[None], prompt[0][0]) for prompt in (positive, other)]
        x = x + (s_next - s) * (v[1] + CFG * (v[0] - v[1]))
    run = {"model": teacher, "negative": other, "steps": STEPS, "cfg": CFG, "sampler_name": "euler"}
    print(close(ksample(**run) * 0.41407, x, 1e-4))


def test_the_negative_prompt_and_cfg_matter(teacher, ksample, positive, other):
    run = {"model": teacher, "steps": STEPS, "sampler_name": "euler"}
    images = [
        ksample(**run, cfg=1.0),
        ksample(**run, cfg=CFG, negative=other),
        ksample(**run, cfg=2.0, negative=other),
        ksample(**run, cfg=CFG, negative=positive, positive=other),
    ]
    assert torch.pdist(torch.cat(images).flatten(1)).min() > 1e-2


def test_shift_comes_from_the_scheduler_config_and_stock_nodes_replace_it(node, teacher):
    first = node("BasicScheduler", model=teacher, scheduler="simple", steps=STEPS)
    assert torch.allclose(first, shifted(3.0, STEPS), atol=1e-6)
    other = node("ModelSamplingSD3", model=teacher, shift=5.0)
    assert torch.allclose(
        node("BasicScheduler", model=other, scheduler="simple", steps=STEPS), shifted(5.0, STEPS), atol=1e-6
    )


def test_the_time_scale_changes_the_network_and_can_be_chosen(node, folder, teacher):
    x, s, text = torch.randn(1, 32, 3, 4), torch.tensor([0.6]), torch.randn(1, 5, 64)
    outputs = []
    for choice, scale in (("0..1", 1.0), ("0..1000", 1000.0)):
        chosen = node("SanaSprintModelLoader", model=folder.name, time_scale=choice)
        assert chosen.model.diffusion_model.config.time_scale == scale
        outputs.append(chosen.model.diffusion_model(x, s, context=text))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert any(torch.allclose(teacher.model.diffusion_model(x, s, context=text), o, atol=1e-5) for o in outputs)


def test_a_teacher_has_no_guidance_to_embed(node, teacher, ksample, positive):
    guided = node("FluxGuidance", conditioning=positive, guidance=9.0)
    run = {"model": teacher, "steps": 2, "sampler_name": "euler"}
    assert torch.equal(ksample(**run, positive=guided), ksample(**run, positive=positive))


def test_our_sampler_sends_teachers_to_ksampler(node, teacher, sample):
    with pytest.raises(ValueError, match=r"not a SANA-Sprint.*KSampler"):
        sample(model=teacher)


def test_trigflow_mathematics_of_the_flow_step():
    """Euler on v from s to 0 in one step is the consistency prediction that Sprint was distilled to."""
    v, x = torch.randn(2, 3)
    s = torch.tensor(0.7)
    assert torch.allclose(x + (0 - s) * v, trigflow.flow_predict_x0(v, x, s))
