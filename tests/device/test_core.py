"""The core on a device apart: the same images, nothing left on the host, few copies."""

import copy

import pytest
import standin
import torch

from sprint_core.models.controlnet import AUTHORS
from sprint_core.pipeline import Control, Pipeline
from sprint_core.weights import checkpoint

PROMPTS = ["a red circle", "two small blue squares"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return standin.make(tmp_path_factory.mktemp("models") / "sprint")


@pytest.fixture(scope="module")
def both(folder, device) -> tuple[Pipeline, Pipeline]:
    return Pipeline.load(folder), Pipeline.load(folder, device=device)


@pytest.fixture(scope="module")
def nets(device):
    return checkpoint.build(standin.control(AUTHORS)), checkpoint.build(standin.control(AUTHORS), device=device)


def test_the_device_refuses_what_a_gpu_refuses(device, library):
    with pytest.raises(RuntimeError, match="at least two devices, second:0 and cpu"):
        torch.ones(3).to(device) + torch.ones(3)
    assert (torch.ones(3).to(device) + torch.tensor(1.0)).cpu().tolist() == [2.0, 2.0, 2.0]
    library.reset()
    torch.ones(3).to(device).sum().item()
    assert {**library.counts(), "operations": 0} == {
        "to_device": 1, "to_host": 0, "scalars": 1, "kernels": 1, "operations": 0
    }  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("way", ["text", "image", "control", "negative"])
def test_images_are_the_cpus(both, nets, device, steps, way):
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    images = []
    for pipeline, net, where in zip(both, nets, (torch.device("cpu"), device), strict=True):
        more = {
            "text": {},
            "image": {"image": image, "strength": 0.6},
            "control": {"controls": [Control(net, image.to(where), 0.8)]},
            "negative": {"negative": "a green ring"},
        }[way]
        images.append(pipeline.generate(PROMPTS, seeds=[1, 2], size=(96, 64), steps=steps, **more).cpu())
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-5)


def test_tokens_are_looked_up_where_the_embedding_lies(folder, device):
    """As in main memory, where ComfyUI leaves what does not fit: rows travel, and not the whole of it."""
    gemma, ids = Pipeline.load(folder).text_encoder.gemma, torch.tensor([[2, 5, 7]])
    with torch.inference_mode():
        expected = gemma(ids)
        apart = copy.deepcopy(gemma).to(device)
        apart.model.embed_tokens.cpu()
        torch.testing.assert_close(apart(ids.to(device)).cpu(), expected, rtol=1e-4, atol=1e-5)


def test_an_image_takes_few_copies(both, counted):
    """Of a new prompt: its tokens, noise and times go there; before the loop nothing is waited for twice."""
    pipeline = both[1]
    pipeline.generate(PROMPTS[:1], seeds=[0], size=(96, 64), steps=1)
    image, counts = counted(lambda: pipeline.generate(["a white square"], seeds=[3], size=(96, 64), steps=1))
    assert image.shape == (1, 64, 96, 3)
    print(counts)
