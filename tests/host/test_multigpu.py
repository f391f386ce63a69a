"""ComfyUI's MultiGPU CFG Split with our objects, on two devices that are both the CPU: `cpu` and `cpu:1`.

ComfyUI keeps them apart, copies MODEL and CONTROL_NET to the second, and runs a thread for each, as for two GPUs.
"""

import pytest
import standin
import torch

from sprint_core.weights import checkpoint

LIMIT = 1e-5  # of one batch of two halves against two batches of one
SECOND = torch.device("cpu", 1)
STEPS = 3


@pytest.fixture
def split(monkeypatch):
    """split(model): the model for two devices, and a list in which each call of a network notes its batch by device."""
    import comfy.model_management as mm
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    monkeypatch.setattr(mm, "get_all_torch_devices", lambda exclude_current=False: [torch.device("cpu"), SECOND])

    def run(model):
        model = MultiGPUCFGSplitNode.execute(model, max_gpus=2).result[0]
        (copy,) = model.get_additional_models_with_key("multigpu")
        assert copy.load_device == SECOND and copy.model is not model.model
        calls = []
        for patcher, name in ((model, "first"), (copy, "second")):
            note = lambda _, inputs, name=name: calls.append((name, len(inputs[0])))  # noqa: E731
            handle = patcher.model.diffusion_model.register_forward_pre_hook(note)
            handles.append(handle)
        return model, calls

    handles = []
    yield run
    for handle in handles:
        handle.remove()
    mm.unload_all_models()


@pytest.fixture(scope="module")
def teacher(node, host):
    folder = standin.make(host.base / "models" / "diffusers" / "split-teacher", standin.TEACHER)
    return node("SanaSprintModelLoader", model=folder.name)


@pytest.fixture(scope="module")
def teacher_net(node, host):
    control = standin.control("authors", guidance_embed=False)
    checkpoint.save(host.base / "models" / "controlnet" / "split-control.safetensors", [control], {})
    return node("SanaSprintControlNetLoader", control_net="split-control.safetensors")


def test_a_teachers_two_halves_run_on_two_devices(teacher, split, ksample, other, close):
    run = {"negative": other, "steps": STEPS, "cfg": 4.5, "sampler_name": "euler"}
    expected = ksample(model=teacher, **run)
    model, calls = split(teacher)
    close(ksample(model=model, **run), expected, LIMIT)
    assert sorted(calls) == [("first", 1)] * STEPS + [("second", 1)] * STEPS
    close(ksample(model=model, **run, seed=2), ksample(model=teacher, **run, seed=2), LIMIT)  # and once more


def test_a_lora_and_a_control_net_come_along(
    node, host, teacher, teacher_net, split, ksample, positive, other, vae, pixels, write_lora, close
):
    write_lora("split.safetensors", "lora_unet_", {"transformer_blocks.0.attn2.to_k": (64, 64)})
    with_lora, _ = node("SanaSprintLoraLoader", model=teacher, lora_name="split.safetensors")
    both = node(
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=other,
        control_net=teacher_net,
        image=pixels,
        strength=0.7,
        start_percent=0.0,
        end_percent=1.0,
        vae=vae,
    )
    run = {"positive": both[0], "negative": both[1], "steps": STEPS, "cfg": 4.5, "sampler_name": "euler"}
    expected = ksample(model=with_lora, **run)
    assert (expected - ksample(model=teacher, **run)).abs().max() > 1e-2
    model, calls = split(with_lora)
    close(ksample(model=model, **run), expected, LIMIT)
    assert sorted(calls) == [("first", 1)] * STEPS + [("second", 1)] * STEPS


def test_a_sprint_has_one_half_and_gives_the_same_bits(model, split, sample):
    expected = sample(steps=STEPS)
    doubled, calls = split(model)
    assert torch.equal(sample(model=doubled, steps=STEPS), expected)
    assert calls == [("first", 1)] * STEPS
