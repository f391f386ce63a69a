"""Names of concepts: each means one thing, with the articles and plurals that people write."""

import pytest

from sprint_core.emoji import concepts


def test_each_name_means_one_concept():
    owners: dict[str, str] = {}
    for concept in concepts.concepts():
        assert concept.names[0] == concepts.plain(concept.label)
        for name in concept.names:
            assert owners.setdefault(name, concept.label) == concept.label
            assert name == concepts.plain(name) and name


@pytest.mark.parametrize("name", ["pizza", "slice of pizza", "cat", "dog", "red apple", "car", "house", "robot"])
def test_what_people_type_is_there(name):
    assert name in concepts.concepts()[concepts.number_of(name)].names


def test_a_name_of_nothing():
    with pytest.raises(ValueError, match="no concept is called 'sprocket'"):
        concepts.number_of("sprocket")


@pytest.mark.parametrize(
    "name, article, plural",
    [
        ("cat", "a cat", "cats"),
        ("owl", "an owl", "owls"),
        ("unicorn", "a unicorn", "unicorns"),
        ("ufo", "a ufo", "ufos"),
        ("fox", "a fox", "foxes"),
        ("mouse", "a mouse", "mice"),
        ("computer mouse", "a computer mouse", "computer mice"),
        ("strawberry", "a strawberry", "strawberries"),
        ("donkey", "a donkey", "donkeys"),
        ("slice of pizza", "a slice of pizza", "slices of pizza"),
        ("smiling face with horns", "a smiling face with horns", "smiling faces with horns"),
        ("cactus", "a cactus", "cactuses"),
    ],
)
def test_articles_and_plurals(name, article, plural):
    assert (concepts.article(name), concepts.plural(name)) == (article, plural)


@pytest.mark.parametrize("name", ["grapes", "french fries", "glasses"])
def test_plurals_take_no_article(name):
    assert concepts.is_plural(name) and concepts.article(name) == name


def test_selecting_from_emojibase():
    """People, flags and what needs letters are left out; a tag that several concepts have is no name of any."""
    data = [
        {"label": "dog", "hexcode": "1F415", "group": 3, "subgroup": 34, "tags": ["animal", "pet", "hound"]},
        {"label": "cat", "hexcode": "1F408", "group": 3, "subgroup": 34, "tags": ["animal", "pet", "dog"]},
        {"label": "pizza", "hexcode": "1F355", "group": 4, "subgroup": 44, "tags": ["cheese", "large"]},
        {"label": "person", "hexcode": "1F9D1", "group": 1, "subgroup": 23, "tags": []},
        {"label": "three o’clock", "hexcode": "1F552", "group": 5, "subgroup": 58, "tags": []},
    ]
    rows = {row["label"]: row["names"] for row in concepts.select(data)}
    assert list(rows) == ["dog", "cat", "pizza"]
    assert rows["dog"] == ["dog", "hound"] and rows["cat"] == ["cat"]
    assert rows["pizza"] == ["pizza", "slice of pizza", "pizza slice"]  # cheese is an alias of another
