"""Scenes show what is required, and their images are what an independent painter makes of them."""

import random

import numpy as np
import pytest
import torch

from sprint_core.emoji import captions, scenes, templates
from sprint_core.emoji.art import SPRITE_PX, Art
from sprint_core.emoji.captions import Requirement


@pytest.fixture(scope="module")
def art() -> Art:
    return templates.load().art()


def centre(thing: scenes.Thing) -> tuple[float, float]:
    return thing.x_px + thing.size_px / 2, thing.y_px + thing.size_px / 2


@pytest.mark.parametrize("relation", list(captions.RELATIONS))
def test_relations(relation):
    for seed in range(20):
        first, second = scenes.compose(Requirement((1, 2), relation=relation), random.Random(seed)).things
        (x, y), (u, v) = centre(first), centre(second)
        assert {"left": x < u, "right": x > u, "above": y < v, "below": y > v}[relation]
        assert abs(x - u) + abs(y - v) > scenes.SMALL_PX


@pytest.mark.parametrize("place", list(captions.PLACES))
def test_places(place):
    for seed in range(10):
        (thing,) = scenes.compose(Requirement((1,), place=place), random.Random(seed)).things
        x, y = centre(thing)
        assert (y * 3 // scenes.CANVAS_PX, x * 3 // scenes.CANVAS_PX) == place and thing.size_px == scenes.SMALL_PX


def test_what_is_not_said_is_as_usual():
    found = [scenes.compose(Requirement((1,)), random.Random(seed)) for seed in range(40)]
    assert {scene.ground for scene in found} == set(captions.USUAL_GROUNDS)
    assert {(thing.style, thing.size_px) for scene in found for thing in scene.things} == {(0, scenes.LARGE_PX)}


def test_everything_lies_on_the_canvas():
    rng = random.Random(3)
    for seed in range(500):
        requirement = captions.draw(rng, None)
        for compose in (scenes.compose, scenes.compose_free):
            for thing in compose(requirement, random.Random(seed)).things:
                assert 0 <= thing.x_px <= scenes.CANVAS_PX - thing.size_px
                assert 0 <= thing.y_px <= scenes.CANVAS_PX - thing.size_px


def test_free_things_do_not_overlap():
    rng = random.Random(4)
    for seed in range(300):
        things = scenes.compose_free(captions.draw(rng, None), random.Random(seed)).things
        for i, a in enumerate(things):
            for b in things[:i]:
                reach = (a.size_px + b.size_px) / 2
                (x, y), (u, v) = centre(a), centre(b)
                assert max(abs(x - u), abs(y - v)) >= reach - 2 * scenes.JITTER_PX


def test_the_same_seed_gives_the_same_scene_and_caption():
    assert scenes.scene_and_caption(7) == scenes.scene_and_caption(7) != scenes.scene_and_caption(8)


def test_paint_is_alpha_compositing(art):
    """Against numpy, pixel by pixel: ground, then each thing over it, premultiplied; half a level of rounding."""
    drawn = [scenes.scene_and_caption(seed)[0] for seed in range(6)]
    painted = scenes.paint(scenes.pack(drawn), art)
    for scene, image in zip(drawn, painted, strict=True):
        canvas = scenes.backdrop(scene.ground).double().numpy().copy()
        for thing in scene.things:
            coarse = templates.load().thumbnails[thing.style, thing.concept][None]
            sprite = torch.nn.functional.interpolate(coarse, (SPRITE_PX,) * 2, mode="bilinear").mul(255).round()
            small = torch.nn.functional.interpolate(sprite, (thing.size_px,) * 2, mode="bilinear", antialias=True)
            sprite = small[0].double().numpy()
            rows, columns = (slice(start, start + thing.size_px) for start in (thing.y_px, thing.x_px))
            canvas[:, rows, columns] = canvas[:, rows, columns] * (1 - sprite[3] / 255) + sprite[:3]
        assert np.abs(canvas - image.numpy()).max() <= 0.51


def test_gradients_run_from_top_to_bottom():
    ground = scenes.backdrop("pink to orange")
    top, bottom = captions.GROUNDS["pink to orange"]
    assert ground[:, 0, 9].tolist() == list(top) and ground[:, -1, 200].tolist() == list(bottom)
    assert torch.equal(ground[:, :, 0], ground[:, :, 255])


def test_a_sprite_of_its_own_size_is_not_resampled():
    style, concept = torch.tensor([0, 1]), torch.tensor([3, 4])
    sprites = torch.randint(256, (2, 5, 4, SPRITE_PX, SPRITE_PX), dtype=torch.uint8)
    art = Art(sprites, torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(art.resized(style, concept, SPRITE_PX), sprites[style, concept].float())


def test_art_of_thumbnails_takes_no_memory_of_its_own(art):
    """Enlarged all at once they take 0.8 GiB, and several times as much on the way."""
    assert art.sprites.data_ptr() == templates.load().thumbnails.data_ptr()
    assert art.to(torch.device("cpu")).resized(torch.tensor([0]), torch.tensor([3]), 60).shape == (1, 4, 60, 60)
