"""The list of bugs that the tests have to notice (tools/mutate.py) fits the code; running all takes eight minutes."""

import dataclasses
import re
import subprocess
import sys

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
        ({"tests": ("tests/core/test_mutations.py::test_gone",)}, "no tests/core/test_mutations.py::test_gone"),
        ({"tests": ()}, "no tests"),
    ],
)
def test_what_does_not_fit_is_named(one, change, words):
    (problem,) = mutate.problems([dataclasses.replace(one, **change)])
    assert problem.startswith(f"{one.id}: ") and re.search(words, problem)


def test_a_bug_listed_twice_or_without_effect_is_named(one):
    assert mutate.problems([one, one]) == [f"{one.id}: twice"]
    assert mutate.problems([dataclasses.replace(one, after=one.before)]) == [f"{one.id}: changes nothing"]


def test_a_bug_survives_where_no_test_looks(tmp_path):
    (tmp_path / "thing.py").write_text("def double(x):\n    return 2 * x\n")
    test = tmp_path / "test_thing.py"
    test.write_text(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n\ndef test_it():\n    import thing\n")
    with open(test, "a") as file:
        file.write("    assert thing.double(2) == 4\n")
    code = f"""
from pathlib import Path
from tools import mutate
thing, folder = {str(tmp_path / "thing.py")!r}, Path({str(tmp_path)!r})
bugs = [mutate.Mutation(after, thing, "2 * x", after, ({str(test)!r},)) for after in ("x + 2", "3 * x", "(")]
mutate.check_baseline(bugs, 1, folder)
print(mutate.survivors(bugs, 2, folder))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=mutate.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['x + 2']", done.stdout
    assert (tmp_path / "thing.py").read_text().endswith("2 * x\n")
