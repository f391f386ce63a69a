"""The list of bugs that the tests have to notice (tools/mutate.py) fits the code; running it takes half an hour."""

import dataclasses
import re

import pytest

from tools import mutate


@pytest.fixture
def one() -> mutate.Mutation:
    return mutate.read_lists()[0]


def test_every_bug_fits_the_code():
    assert not mutate.problems(mutate.read_lists())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"before": "no such line"}, "stands 0 times"),
        ({"before": " "}, r"stands \d+ times"),
        ({"after": "(:"}, "invalid syntax"),
        ({"file": "sprint_core/gone.py"}, "No such file"),
        ({"tests": ("tests/gone.py",)}, "no tests/gone.py"),
        ({"tests": ()}, "no tests"),
    ],
)
def test_what_does_not_fit_is_named(one, change, words):
    (problem,) = mutate.problems([dataclasses.replace(one, **change)])
    assert problem.startswith(f"{one.id}: ") and re.search(words, problem)


def test_a_bug_listed_twice_or_without_effect_is_named(one):
    assert mutate.problems([one, one]) == [f"{one.id}: twice"]
    assert mutate.problems([dataclasses.replace(one, after=one.before)]) == [f"{one.id}: changes nothing"]
