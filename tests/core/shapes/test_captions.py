"""Captions: true of their scenes, read back, and held out by what they name."""

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations

import pytest

from sprint_core.shapes.captions import (
    PLACES,
    VOCABULARY,
    RequiredThing,
    Requirement,
    combination,
    describe,
    parse,
    split_of,
    words,
    write,
)
from sprint_core.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES


def test_captions_stay_within_the_vocabulary(drawn):
    used = Counter()
    for pairs in drawn.values():
        for _, text in pairs:
            assert text == " ".join(words(text)) and len(words(text)) <= 20
            used.update(words(text))
    assert set(used) == set(VOCABULARY) and len(VOCABULARY) < 80


def test_captions_are_true_and_read_back(drawn):
    """Everything a caption says agrees with the scene's facts, not with pixels."""
    for scene, text in drawn["train"][:1000] + drawn["test"][:1000]:
        requirement = parse(text)
        assert requirement.background in (None, scene.background)
        assert sum(wanted.count for wanted in requirement.things) == len(scene.things)
        required = [thing for thing in requirement.things for _ in range(thing.count)]
        agreeing = [
            order
            for order in permutations(scene.things)
            if all(
                need.shape == thing.shape
                and need.colour in (None, thing.colour)
                and need.size in (None, thing.size)
                and need.place in (None, (thing.row, thing.column))
                for need, thing in zip(required, order, strict=True)
            )
        ]
        assert agreeing
        if requirement.relation:
            first, second = agreeing[0]
            axis = "column" if requirement.relation == "left" else "row"
            assert getattr(first, axis) < getattr(second, axis)


def test_every_wording_reads_back():
    rng = random.Random(0)
    red, big, blue = (
        RequiredThing("circle", "red"),
        RequiredThing("cross", None, "large"),
        RequiredThing("square", "blue"),
    )
    cases = [Requirement((replace(big, place=place),), None, name) for place in PLACES for name in BACKGROUNDS]
    cases += [Requirement((red, blue), relation) for relation in (None, "left", "above")]
    cases += [Requirement((replace(red, count=count),), None, "teal") for count in (2, 3)]
    for case in cases:
        texts = {write(case, rng) for _ in range(40)}
        assert len(texts) >= 3
        assert all(parse(text) == case for text in texts)


def test_punctuation_and_capitals_do_not_matter():
    wanted = parse("a red circle at the top left on a grey background")
    assert parse("A red circle, at the top-left, on a grey background.") == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red dog",
        "a pink circle",
        "two circle",
        "a circles",
        "red circle",
        "a red circle a blue square",
        "two circles at the top",
        "two circles and a square",
        "a grey background with a circle on a teal background",
        "a circle to the left of",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError):
        parse(text)


def test_splits_are_disjoint(drawn):
    said = {split: {combination(parse(text)) for _, text in pairs} for split, pairs in drawn.items()}
    assert not said["train"] & said["test"]
    assert all(split_of(parse(text)) == split for split, pairs in drawn.items() for _, text in pairs)
    assert all(split_of(describe(scene)) == "train" for scene, _ in drawn["train"])


def test_wording_size_background_and_side_do_not_move_the_split():
    """'left of' and 'right of' with the things swapped say the same, as 'and' does either way round."""
    a, b = RequiredThing("circle", "red"), RequiredThing("square", "blue")
    same = {split_of(Requirement(pair, r)) for pair in ((a, b), (b, a)) for r in (None, "left", "above")}
    assert len(same) == 1
    for colour in COLOURS:
        sized = [
            split_of(parse(f"a {size}{colour} circle{on}"))
            for size in ("", "big ")
            for on in ("", " on a teal background")
        ]
        assert len(set(sized)) == 1
    assert parse("a red cross under a square") == parse("a square above a red cross")


FAMILIES = {
    "shape and place": [(RequiredThing(s, None, None, p),) for s in SHAPES for p in PLACES],
    "shape and colour": [(RequiredThing(s, c),) for s in SHAPES for c in COLOURS],
    "shape, colour and place": [(RequiredThing(s, c, None, p),) for s in SHAPES for c in COLOURS for p in PLACES],
    "count, shape and colour": [(RequiredThing(s, c, count=n),) for s in SHAPES for c in COLOURS for n in (2, 3)],
    "two shapes, one colour": [
        (RequiredThing(a, c), RequiredThing(b)) for a, b in permutations(SHAPES, 2) for c in COLOURS
    ],
    "two shapes, two colours": [
        (RequiredThing(a, c), RequiredThing(b, d))
        for a, b in combinations(SHAPES, 2)
        for c, d in permutations(COLOURS, 2)
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seventh_is_held_out_of_every_family(family):
    """Of every family of combinations about 15 %, and some of each shape and colour."""
    held_out = [things for things in FAMILIES[family] if split_of(Requirement(things)) == "test"]
    assert 0.09 <= len(held_out) / len(FAMILIES[family]) <= 0.26
    assert {thing.shape for things in held_out for thing in things} == set(SHAPES)
    colours = {thing.colour for things in held_out for thing in things} - {None}
    assert family == "shape and place" or colours == set(COLOURS)


def test_captions_of_shapes_alone_are_for_training():
    texts = ("a circle", "a big cross on a teal background", "two triangles", "a circle and a square")
    assert {split_of(parse(text)) for text in texts} == {"train"}
