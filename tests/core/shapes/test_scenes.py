"""Pictures of scenes: the same bytes, true areas, things apart, colours far apart."""

import time
from itertools import combinations

import numpy as np
import pytest
from drawings import picture

from sprint_core.shapes import scenes
from sprint_core.shapes.scenes import BACKGROUNDS, COLOURS, render, render_batch


def test_a_batch_is_its_pictures(drawn):
    first = [scene for scene, _ in drawn["train"][:20]]
    batch = render_batch(first)
    assert batch.shape == (20, 256, 256, 3) and batch.dtype == np.uint8
    assert all((render(scene) == image).all() for scene, image in zip(first, batch, strict=True))


def test_edges_are_anti_aliased():
    """The area of every shape is right to 0.5 %, and a circle's edge has many greys."""
    exact = {"circle": np.pi, "square": 1.8**2, "triangle": 1.8, "cross": 4 * (2 * 0.4 - 0.4**2)}
    for shape, area in exact.items():
        for size, radius in scenes.RADIUS_PX.items():
            cover = (160 - picture((shape, "black", 0, 2, size)).astype(float)[..., 0]) / (160 - 15)
            assert cover.sum() == pytest.approx(area * radius**2, rel=5e-3)
    assert len(np.unique(picture(("circle", "black", 0, 0)))) > 15


def test_things_never_come_near(drawn):
    for scene, _ in drawn["train"][:500] + drawn["test"][:500]:
        for a, b in combinations(scene.things, 2):
            gap = max(
                abs(scenes.centre_px(a.size, i) - scenes.centre_px(b.size, j))
                for i, j in ((a.row, b.row), (a.column, b.column))
            )
            assert gap - scenes.RADIUS_PX[a.size] - scenes.RADIUS_PX[b.size] >= 16


def test_colours_are_far_apart():
    things = np.array(list(COLOURS.values()), float)
    for a, b in combinations(things, 2):
        assert np.linalg.norm(a - b) > 150
    for name in BACKGROUNDS:
        column = scenes.backdrop(name, 256)[:, 0]
        assert np.linalg.norm(column[:, None] - things, axis=-1).min() > 108


def test_rendering_is_fast(drawn):
    some = [scene for scene, _ in drawn["train"][:200]]
    render_batch(some)
    start = time.process_time()
    render_batch(some)
    assert (time.process_time() - start) / 200 < 2e-3
