"""Captions say what their requirement holds, in words that the tokenizer knows; the splits do not mix."""

import random
from collections import Counter

import pytest

from sprint_core.distill.dataset.emoji_text import MAX_TOKENS, SPECIAL, prompts, tokenizer
from sprint_core.emoji import captions, scenes
from sprint_core.emoji.captions import Requirement
from sprint_core.emoji.concepts import COMMON, common, concepts, learnt

UNKNOWN = SPECIAL.index("<unk>")


def drawn(count: int, split: str | None = "train") -> list[Requirement]:
    rng = random.Random(0)
    return [captions.draw(rng, split) for _ in range(count)]


def test_every_word_is_in_the_vocabulary():
    """But for the strange ones that train <unk>; nothing is cut."""
    rng = random.Random(1)
    strange = 0
    for requirement in drawn(1500, None):
        text = captions.write(requirement, rng)
        ids = prompts().tokens(text).ids
        assert len(ids) < MAX_TOKENS
        assert (UNKNOWN in ids) == (captions.STRANGE in text), text
        strange += captions.STRANGE in text
    assert 15 < strange < 120


def test_shares_of_the_splits():
    counts = Counter(captions.split_of(requirement) for requirement in drawn(4000, None))
    assert 0.08 < counts["test"] / 4000 < 0.18


@pytest.mark.parametrize("pairs", [0.0, captions.PAIRS, 0.6, 1.0])
def test_shares_of_kinds(pairs):
    """Of all splits; several alike are as often among the others as ever."""
    rng = random.Random(2)
    kinds = Counter(captions.draw(rng, None, pairs=pairs).kind for _ in range(4000))
    assert kinds["pair"] / 4000 == pytest.approx(pairs, abs=0.03)
    assert kinds["count"] / 4000 == pytest.approx(0.16 * (1 - pairs), abs=0.03)


def test_training_shows_no_held_out_combination():
    test = drawn(300, "test")
    assert {captions.split_of(requirement) for requirement in drawn(1000)} == {"train"}
    assert {captions.split_of(requirement) for requirement in test} == {"test"}


def test_a_pair_is_held_out_in_every_wording():
    """Left and right, above and below are the same order of things."""
    for first, second in ((3, 40), (7, 9), (100, 500), (12, 13), (60, 61)):
        for one, other in (("left", "right"), ("above", "below")):
            a = captions.split_of(Requirement((first, second), relation=one))
            assert a == captions.split_of(Requirement((second, first), relation=other))


def test_prompts_are_fixed_and_fewer_are_the_beginning_of_more():
    assert captions.prompts(5) == captions.prompts(20)[:5]
    assert len({prompt.text for prompt in captions.prompts(300)}) == 300
    assert captions.prompts(5) != captions.prompts(5, seed=1)


@pytest.mark.parametrize(
    "requirement, words",
    [
        (Requirement((0,), place=(0, 0)), "top left"),
        (Requirement((0,), size="small"), ("small", "little", "tiny")),
        (Requirement((0,), style=1), "flat"),
        (Requirement((0,), ground="teal to blue"), "teal to blue"),
        (Requirement((0, 1), relation="above"), ("above", "over", "on top of")),
        (Requirement((0,), count=3), "three"),
    ],
)
def test_what_is_required_is_said(requirement, words):
    rng = random.Random(2)
    for _ in range(30):
        text = captions.write(requirement, rng)
        assert any(word in text for word in ([words] if isinstance(words, str) else words)), text


def test_a_word_stands_for_one_meaning():
    """Words of places, sizes, numbers and relations are no names of things."""
    said = {word for table in (captions.PLACES, captions.SIZES) for wordings in table.values() for word in wordings}
    names = {name for concept in captions.concepts() for name in concept.names}
    assert not said & names and not set(captions.GROUNDS) & names and not set(captions.NUMBERS.values()) & names


def test_unknown_split():
    with pytest.raises(ValueError, match="train and test"):
        captions.draw(random.Random(0), "validation")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_alike(count):
    scene = scenes.compose(Requirement((5,), count=count), random.Random(0))
    assert [thing.concept for thing in scene.things] == [5] * count


def test_captions_of_some_concepts():
    """They name these alone, in every kind of caption; the numbers of all concepts stay what they are."""
    some = common()[:40]
    drawn = [captions.draw(random.Random(seed), None, some) for seed in range(400)]
    assert {number for one in drawn for number in one.concepts} == set(some)
    assert {one.kind for one in drawn} == {"one", "pair", "count"}
    assert all(prompt.requirement.concepts[0] in some for prompt in captions.prompts(50, among=some))
    assert len(common()) == len(COMMON.read_text("utf-8").splitlines()) > 300


def test_words_of_some_concepts():
    """Each has the token that it has among all; what only others are called is unknown."""
    cat, dog = (next(n for n, c in enumerate(concepts()) if c.label == label) for label in ("cat", "dog"))
    some, every = tokenizer((cat, dog)), tokenizer()
    assert some.encode("a cat left of two dogs, a red circle") == every.encode("a cat left of two dogs, a red circle")
    assert list(some.unknown("a cat on a teapot of gold")) == ["teapot", "gold"]
    assert not every.unknown("a cat on a teapot of gold")
    assert some.words < every.words == every.size


@pytest.mark.parametrize("numbers", ["cat", [1], [0, 5000], [0, -1], [0.5, 1], None])
def test_concepts_that_are_none_are_refused(numbers):
    with pytest.raises(ValueError, match="the concepts are"):
        learnt({"concepts": numbers})


def test_concepts_of_a_file():
    assert learnt({"concepts": [3, 5]}) == (3, 5) and learnt({}) == captions.ALL
