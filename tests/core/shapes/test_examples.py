"""Scenes with captions, and prompts: of their split and category, as usual in what is not said."""

import pytest

from sprint_core.shapes import examples
from sprint_core.shapes.captions import CATEGORIES, PLACES, SPLITS, category, describe, parse, split_of
from sprint_core.shapes.examples import another_caption, prompts, scene_and_caption
from sprint_core.shapes.judge import judge
from sprint_core.shapes.scenes import render


def test_same_seed_same_scene_and_caption(drawn):
    for split in SPLITS:
        assert [scene_and_caption(seed, split) for seed in range(50)] == drawn[split][:50]
    assert scene_and_caption(1, "test") != scene_and_caption(1, "train")


def test_other_captions_of_a_scene(drawn):
    """As true as its first one, of the training split, the same for the same seed, and many."""
    scene = next(scene for scene, _ in drawn["train"] if category(describe(scene)) == "color_attr")
    texts = [another_caption(scene, seed) for seed in range(40)]
    assert len(set(texts)) > 20 and texts == [another_caption(scene, seed) for seed in range(40)]
    assert all(judge(render(scene), text) for text in texts)
    assert {split_of(parse(text)) for text in texts} == {"train"}


@pytest.mark.parametrize("name", CATEGORIES)
@pytest.mark.parametrize("split", SPLITS)
def test_prompts(name, split):
    found = prompts(name, 50, seed=3, split=split)
    assert len({prompt.text for prompt in found}) == 50
    assert found[:20] == prompts(name, 20, seed=3, split=split) != prompts(name, 20, seed=4, split=split)
    for prompt in found:
        assert prompt.category == category(prompt.requirement) == name
        assert parse(prompt.text) == prompt.requirement and split_of(prompt.requirement) == split


def test_what_captions_leave_open():
    """Which of two backgrounds: all else is as usual where it is not named."""
    for scene, text in [scene_and_caption(seed) for seed in range(400)]:
        said, cells = parse(text), [(thing.row, thing.column) for thing in scene.things]
        if len(cells) == 1:
            assert cells[0] == (said.things[0].place or (1, 1))
            assert scene.things[0].size == (said.things[0].size or "large")
        elif said.things[0].count == 3:
            assert cells == [(0, 1), (2, 0), (2, 2)]
        else:
            assert cells == ([(0, 1), (2, 1)] if said.relation == "above" else [(1, 0), (1, 2)])
        named = [(thing.shape, thing.colour or "white") for thing in said.things for _ in range(thing.count)]
        assert named == [(thing.shape, thing.colour) for thing in scene.things]
        assert scene.background in ([said.background] if said.background else ["teal", "purple"])


def test_free_scenes_stand_anywhere():
    drawn = [scene_and_caption(seed, free=True) for seed in range(300)]
    assert all(judge(render(scene), text) for scene, text in drawn)
    assert {tuple((t.row, t.column) for t in scene.things) for scene, _ in drawn} == {
        *[(place,) for place in PLACES],
        *examples.PAIRS,
        *examples.TRIPLES,
    }
    scene = next(s for s, _ in drawn if len(s.things) == 1 and (s.things[0].row, s.things[0].column) == (0, 0))
    assert {parse(another_caption(scene, seed, free=True)).things[0].place for seed in range(20)} == {None, (0, 0)}
    assert [p.scene for p in prompts("colors", 9, free=True)] != [p.scene for p in prompts("colors", 9)]


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="categories"):
        prompts("colours", 1)
    with pytest.raises(ValueError, match="splits"):
        scene_and_caption(0, "validation")
    monkeypatch.setattr(examples, "STALE_DRAWS", 20)
    with pytest.raises(ValueError, match="different test prompts, not 100000"):
        prompts("single_object", 100_000)
