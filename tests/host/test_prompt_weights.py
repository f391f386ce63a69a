"""Weights in prompts, tried on many: each token has the weight of the characters it came from."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sprint_core.text.formats import text_preset

NAME = "gemma2_2b"
COMMON = st.sampled_from("aB :.,İΣß é🐞猫\n\t")
ANY = st.characters(exclude_categories=["Cs"], exclude_characters="()\\\0\1\2")
PLAIN = st.text(st.one_of(COMMON, ANY), min_size=1, max_size=8)
WEIGHTS = st.one_of(st.none(), st.floats(-4, 4).map(lambda weight: round(weight, 3)))
PARTS = st.lists(st.tuples(PLAIN, WEIGHTS), max_size=6)


@pytest.fixture(scope="module")
def split_weights(host):
    return host.pack("nodes.adapters.clip").split_weights


@given(PARTS)
@example([("İ", None), ("a red", 1.3), ("  İstanbul", None)])
@settings(max_examples=150)
def test_marks_are_taken_out_and_weigh_their_characters(split_weights, clip, parts):
    """The marks of each part, in upper and in lower case; the stand-in's tokens are bytes."""
    prompt = "".join(text if weight is None else f"({text}:{weight!r})" for text, weight in parts)
    text, weights = split_weights(prompt)
    assert text == "".join(text for text, _ in parts)
    assert weights == [1.0 if weight is None else weight for text, weight in parts for _ in text]
    for lower in (False, True):
        preset = dataclasses.replace(text_preset(), lower=lower)
        pairs = clip.tokenizer.tokenize_with_weights(prompt, sana_preset=preset)[NAME][0]
        plain = clip.tokenizer.tokenize_with_weights(text, sana_preset=preset)[NAME][0]
        assert [i for i, _ in pairs] == [i for i, _ in plain]
        kept = range(len(text) - len(text.lstrip()), len(text.rstrip()))
        expected = [weights[i] for i in kept for _ in (text[i].lower() if lower else text[i]).encode()]
        before = len(pairs) - len(expected)
        assert [weight for _, weight in pairs] == [1.0] * before + expected


@given(st.text(st.sampled_from("a(b):1.é\\ -nif"), max_size=30))
@settings(max_examples=100)
def test_any_brackets_are_read(split_weights, clip, prompt):
    """Unbalanced, nested, escaped and without a number: a text that is in the prompt, with as many weights."""
    text, weights = split_weights(prompt)
    assert len(text) == len(weights)
    letters = iter(prompt)
    assert all(char in letters for char in text)  # in this order
    pairs = clip.tokenize(prompt)[NAME][0]
    assert all(isinstance(weight, float) for _, weight in pairs)


def test_nested_weights_multiply_as_in_comfyui(split_weights):
    text, weights = split_weights("a ((b) c:0.5) (d)")
    assert text == "a b c d"
    assert weights == pytest.approx([1, 1, 0.55, 0.5, 0.5, 1, 1.1])


def test_a_weight_that_is_no_number_is_refused(node, clip):
    for weight in ("nan", "inf", "1e999"):
        with pytest.raises(ValueError, match=r"write weights as \(word:1\.2\)"):
            node("CLIPTextEncode", clip=clip, text=f"a (red:{weight}) circle")


def test_brackets_without_end_are_refused(node, clip):
    """ComfyUI's own reading of them calls itself until Python ends it."""
    with pytest.raises(ValueError, match="5000 brackets in one another in the prompt, 100 are"):
        node("CLIPTextEncode", clip=clip, text="(" * 5000 + "a" + ")" * 5000)
    deep = node("CLIPTextEncode", clip=clip, text="(" * 100 + "a" + ")" * 100)[0][0]
    assert torch.isfinite(deep).all()
