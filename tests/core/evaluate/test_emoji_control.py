"""What a ControlNet of emoji is measured by: drawings of scenes, how far an image keeps to one, and what is named."""

import dataclasses
import json
import random

import pytest
import standin
import torch
from PIL import Image

from sprint_core.distill.runs import emoji_control as training
from sprint_core.emoji import captions, concepts, judge, scenes, templates
from sprint_core.emoji.art import SPRITE_PX, Art
from sprint_core.evaluate import __main__ as evaluate
from sprint_core.evaluate import emoji_control
from sprint_core.images import edges
from sprint_core.models.controlnet import AUTHORS
from sprint_core.weights import checkpoint

COUNT = 12


@pytest.fixture(scope="module")
def drawn():
    return emoji_control.draw(COUNT, 0, templates.load().art(), concepts.common())


def test_scenes_are_held_out_and_say_no_place(drawn):
    assert len(drawn) == COUNT and not any(captions.STRANGE in prompt.text for prompt in drawn.prompts)
    for prompt, scene in zip(drawn.prompts, drawn.scenes, strict=True):
        requirement = prompt.requirement
        assert requirement.place is None and requirement.size is None
        assert {thing.concept for thing in scene.things} == set(requirement.concepts) <= set(concepts.common())


def test_silhouettes_are_what_things_cover():
    """A sprite that is half there, over any ground."""
    sprites = torch.zeros(1, 2, 4, SPRITE_PX, SPRITE_PX, dtype=torch.uint8)
    sprites[0, 0] = torch.tensor([60, 30, 10, 102])[:, None, None]  # premultiplied, of alpha 0.4
    art = Art(sprites, torch.ones(1, 2, dtype=torch.bool))
    for ground in ("teal", "purple to black"):
        scene = scenes.Scene((scenes.Thing(0, 0, 100, 20, 40),), ground)
        covered = scenes.silhouettes(scenes.pack([scene]), art)[0]
        expected = torch.zeros(256, 256)
        expected[40:140, 20:120] = 0.4
        torch.testing.assert_close(covered, expected, atol=0.01, rtol=0)


def test_truth_agrees_and_others_do_not(drawn):
    images = drawn.images.movedim(1, -1)
    assert emoji_control.agreements(images, drawn).mean() > 0.8
    assert emoji_control.agreements(images.roll(1, 0), drawn).mean() < 0.4
    assert judge.named_where_drawn(images, drawn.scenes).all()
    assert judge.named_where_drawn(images.roll(1, 0), drawn.scenes).float().mean() < 0.1


def test_agreement_is_what_both_cover_over_what_either_does(drawn):
    """Of squares on a plain ground, 100 px a side, one 50 px to the right of the other: a third."""
    image = torch.full((1, 256, 256, 3), 250, dtype=torch.uint8)
    image[0, 60:160, 100:200] = torch.tensor([200, 30, 30], dtype=torch.uint8)
    covered = torch.zeros(1, 256, 256)
    covered[0, 60:160, 50:150] = 1.0
    one = dataclasses.replace(drawn, prompts=drawn.prompts[:1], scenes=drawn.scenes[:1], covered=covered)
    assert emoji_control.agreements(image, one).item() == pytest.approx(1 / 3)


def test_every_thing_has_to_be_the_one(drawn):
    """With one of two things exchanged in what is asked for, the image is wrong."""
    pairs = [i for i, scene in enumerate(drawn.scenes) if len(scene.things) == 2 and scene.things[0] != scene.things[1]]
    i = pairs[0]
    image, scene = drawn.images[i : i + 1], drawn.scenes[i]
    assert judge.named_where_drawn(image, [scene]).tolist() == [True]
    swapped = dataclasses.replace(scene.things[0], concept=(scene.things[0].concept + 1) % len(concepts.concepts()))
    other = dataclasses.replace(scene, things=(swapped, scene.things[1]))
    assert judge.named_where_drawn(image, [other]).tolist() == [False]


def test_a_hand_strays_a_little(drawn):
    exact = drawn.drawings("scribble").movedim(-1, 1)
    by_hand = [
        edges.wobbled(exact, torch.Generator().manual_seed(seed), px) for seed, px in ((0, 0.0), (0, 3.0), (1, 3.0))
    ]
    torch.testing.assert_close(by_hand[0], exact, atol=1e-3, rtol=0)
    assert (by_hand[1] - exact).abs().mean() > 0.01 and not torch.equal(by_hand[1], by_hand[2])
    near = torch.nn.functional.max_pool2d(exact, 25, 1, 12)  # four standard deviations
    assert (by_hand[1] * (near == 0)).max() == 0
    assert torch.equal(drawn.drawings("hand"), drawn.drawings("hand"))


def test_a_hand_draws_outlines_alone(drawn):
    """Nothing deep inside of things, nothing far outside."""
    outlines, covered = drawn.drawings("hand")[..., 0], drawn.covered[:, None]
    inside = -torch.nn.functional.max_pool2d(-(covered > 0.9).float(), 41, 1, 20)[:, 0]
    near = torch.nn.functional.max_pool2d((covered > 0.1).float(), 41, 1, 20)[:, 0]
    assert inside.sum() > 1000 and (outlines * inside).sum() < 0.02 * inside.sum()
    assert (outlines * (near == 0)).sum() == 0 and outlines.mean() > 0.02


def test_what_a_hand_drew_agrees_less_with_the_scene(drawn):
    """Than with its outlines: the ceiling of who follows these."""
    outlines, images = drawn.drawings("hand")[..., 0], drawn.strayed()
    hand = torch.Generator().manual_seed(COUNT)
    covered = edges.wobbled(drawn.covered[:, None], hand, emoji_control.HAND_PX)[:, 0]
    followed = dataclasses.replace(drawn, covered=covered)
    least = emoji_control.agreements(drawn.images.movedim(1, -1), drawn).mean() - 0.015
    assert emoji_control.agreements(images, followed).mean() > least
    assert emoji_control.agreements(images, drawn).mean() < least
    inside = -torch.nn.functional.max_pool2d(-(judge.covered(images).float()), 31, 1, 15)
    assert inside.sum() > 1000 and (outlines * inside).sum() < 0.02 * inside.sum()
    assert judge.named_where_drawn(images, drawn.scenes).float().mean() > 0.9


def test_training_shows_four_kinds_of_drawings(drawn):
    images, covered = drawn.images[:4].repeat_interleave(4, 0)[:8], drawn.covered[:4].repeat_interleave(4, 0)[:8]
    hints = training.control_images(images, covered, seed=3)
    assert torch.equal(hints, training.control_images(images, covered, seed=3))
    assert not torch.equal(hints[2:4], training.control_images(images, covered, seed=4)[2:4])
    exact = [edges.detect(images[:1].movedim(1, -1) / 255.0, scribble=scribble) for scribble in (False, True)]
    for i, expected in enumerate(exact):
        torch.testing.assert_close(hints[i] / 255.0, expected[0].movedim(-1, 0), atol=0.01, rtol=0)
    strokes = [exact[1], edges.detect(covered[:1, ..., None].expand(-1, -1, -1, 3), scribble=True)]
    for i, stroke in zip((2, 3), strokes, strict=True):  # by a hand: near its own, and not near the other
        near, other = (torch.nn.functional.max_pool2d(x[..., 0], 25, 1, 12) for x in (stroke, strokes[i - 3]))
        ink = hints[i, 0] / 255.0
        assert (ink * (near[0] == 0)).sum() == 0 and (ink * (other[0] == 0)).sum() > 0.01 * ink.sum()


def test_command_line(emoji_model, tmp_path, capsys):
    path = tmp_path / "control.safetensors"
    checkpoint.save(path, [standin.control(AUTHORS)], {})
    argv = ["--model", str(emoji_model), "--control", str(path), "--steps", "1", "--prompts", "3"]
    assert evaluate.main([*argv, "--grid", str(tmp_path / "grid.png")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ways = {"soft 1", "scribble 1", "hand 1", "without 1", "ceiling", "ceiling, hand"}
    assert set(result["agreement"]) == set(result["names"]) == ways and result["art"] == "thumbnails"
    assert Image.open(tmp_path / "grid.png").width == (len(emoji_control.KINDS) + len(ways)) * 128


def test_the_bundled_control_net_steers(capsys):
    """Its images keep to a drawing far better than those without one."""
    assert evaluate.main(["--control", "demo", "--steps", "2", "--prompts", "6"]) == 0
    agreement = json.loads(capsys.readouterr().out.splitlines()[-1])["agreement"]
    assert agreement["soft 2"] >= agreement["without 2"] + 0.15


def test_draw_repeats_itself():
    art, seed = templates.load().art(), random.Random(1).randrange(99)
    one, two = (emoji_control.draw(3, seed, art, concepts.common()) for _ in range(2))
    assert one.prompts == two.prompts and torch.equal(one.images, two.images)
