"""The model that comes with the pack, through the nodes: what every user sees first."""

import pytest
import torch

from sprint_core.pipeline import Pipeline
from sprint_core.shapes import captions, examples, judge
from sprint_core.weights import presets


@pytest.fixture(scope="module")
def bundled(node):
    return node("SanaSprintLoader", model=presets.BUNDLED_NAME)


@pytest.fixture(scope="module")
def pipeline():
    """The core's, with its weights copied: mapped ones may lie at any byte, which changes how a product rounds."""
    pipeline = Pipeline.load(presets.BUNDLED)
    for part in (pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder.gemma):
        part.load_state_dict({name: tensor.clone() for name, tensor in part.state_dict().items()}, assign=True)
    return pipeline


def test_a_file_with_all_parts_is_opened_once(host, node, monkeypatch):
    """Transformer, text encoder, VAE and the colours of its previews."""
    tensorfile, opened = host.pack("sprint_core.weights.tensorfile"), []
    read = tensorfile.read
    monkeypatch.setattr(tensorfile, "read", lambda path, *args: opened.append(path) or read(path, *args))
    node("SanaSprintLoader", model=presets.BUNDLED_NAME)
    assert opened == [host.pack("sprint_core.weights.presets").BUNDLED]


@pytest.fixture
def paint(node, bundled):
    """Prompt to image through the nodes, at the model's own size."""
    model, clip, vae = bundled

    def run(text, pixels=None, **inputs):
        latent = node("SanaSprintEmptyLatent", model=model)
        if pixels is not None:
            latent = node("VAEEncode", vae=vae, pixels=pixels)
        positive = node("SanaSprintTextEncode", clip=clip, text=text)
        latent = node("SanaSprintSampler", model=model, positive=positive, latent_image=latent, **inputs)
        return node("VAEDecode", vae=vae, samples=latent)

    return run


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_nodes_paint_what_the_core_paints(paint, pipeline, steps):
    expected = pipeline.generate(["two red crosses"], seeds=[3], steps=steps)
    assert expected.shape == (1, 256, 256, 3)
    assert torch.equal(paint("two red crosses", seed=3, steps=steps), expected)


def test_images_show_what_prompts_say(paint):
    """Held-out prompts, judged from pixels; docs/benchmarks.md has the exact shares, of many more."""
    prompts = [prompt for name in captions.CATEGORIES for prompt in examples.prompts(name, 5, seed=7)]
    right = [judge.judge(paint(p.text, seed=i, steps=2)[0].numpy(), p.requirement) for i, p in enumerate(prompts)]
    assert sum(right) >= 0.5 * len(prompts)


def test_the_prompt_decides_the_image(paint):
    """With one seed, another colour gives the same place in another colour."""
    red, blue = (judge.detect(paint(f"a large {colour} circle", seed=5)[0].numpy()) for colour in ("red", "blue"))
    assert [thing.colour for thing in red] == ["red"] and [thing.colour for thing in blue] == ["blue"]


def test_image_to_image_repaints(paint):
    """Little strength leaves the image, all of it makes another one."""
    image = paint("a large red circle in the middle on a grey background", seed=1)
    kept = paint("a large red circle in the middle on a grey background", image, seed=2, denoise=0.2)
    assert (kept - image).abs().mean() < 0.02
    changed = paint("a large blue square in the middle on a teal background", image, seed=2)
    assert judge.judge(changed[0].numpy(), "a large blue square in the middle on a teal background")


def test_its_prompts_carry_no_instruction(bundled):
    """The prompt format is its file's: words, no instruction, and whatever is no word of its world is unknown."""
    (tokens,) = bundled[1].tokenize("a red circle")["gemma2_2b"]
    assert len(tokens) == 1 + 3
