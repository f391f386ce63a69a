"""Negative prompts in the pipeline, and what the judge sees of them on a model of plain shapes."""

import pytest
import shapes_model
import standin
import torch

from sprint_core import sampler
from sprint_core.models.layers import sdpa
from sprint_core.models.nag import NAG
from sprint_core.pipeline import Caption, Pipeline
from sprint_core.shapes import judge

STRONG = NAG(scale=5.0, alpha=0.7, tau=1.3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Pipeline.load(standin.make(tmp_path_factory.mktemp("models") / "sprint"))


def test_a_step_by_hand(tiny):
    """One step written out; text and its embeddings are the same negative prompt."""
    got = tiny.generate(["a cat"], seeds=[3], size=(96, 64), steps=1, negative="a red dog", nag=STRONG)
    (caption, _), negative = tiny.encode_text(["a cat"]), tiny.encode_text(["a red dog"])
    x, one = sampler.initial_noise([3], (32, 2, 3)), torch.ones(1)
    both = torch.cat([caption, negative.embeddings], dim=1)
    with torch.inference_mode():
        v = tiny.transformer(x, one, both, 4.5 * one, attention=STRONG.around(sdpa, caption.shape[1]))
    torch.testing.assert_close(got, tiny.decode(x - v), rtol=0, atol=1e-5)
    again = tiny.generate(["a cat"], seeds=[3], size=(96, 64), steps=1, negative=negative, nag=STRONG)
    assert torch.equal(got, again)


def test_no_guidance_is_the_plain_image(tiny):
    def paint(**more):
        return tiny.generate(["a cat", "a long dog"], seeds=[3, 4], size=(96, 64), **more)

    plain = paint()
    for nag in (NAG(scale=1.0), NAG(alpha=0.0), NAG(start=0.9)):
        assert torch.equal(paint(negative="red", nag=nag), plain)
    first, both = paint(negative="red", nag=NAG(end=0.1)), paint(negative="red")
    assert not torch.equal(first, plain) and not torch.equal(first, both)


def test_a_negative_prompt_of_another_encoder(tiny):
    with pytest.raises(ValueError, match=r"negative prompt is 7 wide, the prompt 64"):
        tiny.generate(["a cat"], seeds=[3], size=(64, 64), negative=Caption(torch.zeros(1, 3, 7), None))
    with pytest.raises(ValueError, match=r"2 negative prompts for 1 images"):
        tiny.generate(["a cat"], seeds=[3], size=(64, 64), negative=Caption(torch.zeros(2, 3, 64), None))


@pytest.fixture(scope="module")
def of_shapes():
    return Pipeline.load(shapes_model.MODEL)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_named_colour_is_avoided(of_shapes, steps):
    """Prompts that leave the background open: with these seeds half of the images are purple, half of them teal."""
    prompts, seeds = ["a red circle"] * 8 + ["a green cross"] * 4, [*range(8), *range(32, 36)]

    def backgrounds(negative=None):
        images = of_shapes.generate(prompts, seeds=seeds, steps=steps, negative=negative)
        return [judge.observe(image.numpy()).background for image in images]

    plain = backgrounds()
    for colour, other in (("purple", "teal"), ("teal", "purple")):
        before, after = plain.count(colour), backgrounds(negative=colour).count(colour)
        print(f"{steps} steps, {colour}: {before} -> {after} of {len(seeds)}")
        assert before >= 5 and after <= 2
        assert plain.count(colour) + plain.count(other) == len(seeds)
