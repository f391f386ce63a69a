"""What captions of the small world say (see scenes.py), and which of them are held out.

A caption says part of what its scene holds, in few words, and `parse` reads any caption back, so the judge (judge.py)
needs the text alone. The *combination* that a caption names, without its size, background and wording, decides the
split: a stable hash sends about 15 % of the combinations to the test split, and training shows neither those captions
nor a scene whose full description is such a combination:

    one thing       shape, colour and place, or as many of them as are named
    things alike    count, shape and colour
    two things      both shapes and colours, whatever the relation; with a colour unsaid, the relation too

Captions that name nothing but shapes and counts ("a circle", "two crosses") are too few to hold out: all are train.
"""

import hashlib
import random
import re
from dataclasses import dataclass, replace

from .scenes import BACKGROUNDS, COLOURS, SHAPES, Scene

# Each meaning's wordings, written equally often.
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
NUMBERS = {1: "a", 2: "two", 3: "three"}
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
PLACES = {
    (0, 0): ("at the top left", "in the top left corner", "in the upper left corner"),
    (0, 1): ("at the top",),
    (0, 2): ("at the top right", "in the top right corner", "in the upper right corner"),
    (1, 0): ("on the left", "on the left side"),
    (1, 1): ("in the centre", "in the middle"),
    (1, 2): ("on the right", "on the right side"),
    (2, 0): ("at the bottom left", "in the bottom left corner", "in the lower left corner"),
    (2, 1): ("at the bottom",),
    (2, 2): ("at the bottom right", "in the bottom right corner", "in the lower right corner"),
}
BACKDROPS = {
    name: (f"a {name} background", *([f"a gradient from {name}"] if " to " in name else [])) for name in BACKGROUNDS
}
OPENINGS = {"one": ("a picture of", "there is"), "many": ("a picture of", "there are")}

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's tags
SPLITS = ("train", "test")
TEST_SHARE, SPLIT_SEED = 0.15, 2505  # a seed whose share is even over the categories, shapes and colours


@dataclass(frozen=True)
class RequiredThing:
    """What a caption says of one thing, or of `count` things alike; None is unsaid."""

    shape: str
    colour: str | None = None
    size: str | None = None
    place: tuple[int, int] | None = None
    count: int = 1


@dataclass(frozen=True)
class Requirement:
    """All that a caption says. `relation` is None, 'left' or 'above': where the first thing is from the second."""

    things: tuple[RequiredThing, ...]
    relation: str | None = None
    background: str | None = None


def words(text: str) -> list[str]:
    """The words of a text as the vocabulary has them: lower case, no punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def _meanings(table: dict, before: str = "", after: str = "") -> dict:
    """Wording to meaning, of a table of meaning to wordings."""
    return {before + wording + after: meaning for meaning, wordings in table.items() for wording in wordings}


SIZE_OF = _meanings(SIZE_WORDS)
PLACE_OF = _meanings(PLACES)
RELATION_OF = _meanings(RELATIONS)
SHAPE_OF = {word: (shape, word != shape) for shape, plural in SHAPES.items() for word in (shape, plural)}
COUNT_OF = {word: count for count, word in NUMBERS.items()}
BEHIND_OF = _meanings(BACKDROPS, after=" with")
ON_OF = _meanings(BACKDROPS, "on ") | _meanings(BACKDROPS, "with ")
OPENING_OF = _meanings(OPENINGS)
_TABLES = (SIZE_OF, PLACE_OF, RELATION_OF, SHAPE_OF, COUNT_OF, BEHIND_OF, ON_OF, OPENING_OF, COLOURS)
VOCABULARY = tuple(sorted({"and"} | {word for table in _TABLES for text in table for word in words(text)}))


def _any(table: dict) -> str:
    return f"({'|'.join(sorted(table, key=len, reverse=True))})"


_THING = f"{_any(COUNT_OF)}(?: {_any(SIZE_OF)})?(?: {_any(COLOURS)})? {_any(SHAPE_OF)}"
_CAPTION = re.compile(
    f"(?:{_any(BEHIND_OF)} |{_any(OPENING_OF)} )?{_THING}"
    f"(?: {_any(PLACE_OF)}| {_any(RELATION_OF | {'and': None})} {_THING})?(?: {_any(ON_OF)})?"
)


def _required_thing(text: str, number: str, size: str | None, colour: str | None, shape_word: str) -> RequiredThing:
    count, (shape, plural) = COUNT_OF[number], SHAPE_OF[shape_word]
    if plural != (count > 1):
        raise ValueError(f"{number!r} does not agree with {shape_word!r} in {text!r}")
    return RequiredThing(shape, colour, SIZE_OF.get(size), None, count)


def parse(text: str) -> Requirement:
    """What a caption says; capitals and punctuation do not matter. Raises ValueError where it is no caption."""
    match = _CAPTION.fullmatch(" ".join(words(text)))
    if match is None:
        raise ValueError(f"not a caption of this world: {text!r}; one is 'a red circle to the left of a blue square'")
    behind, _, *first, place, joint = match.groups()[:8]
    second, on = match.groups()[8:12], match.group(13)
    things = [replace(_required_thing(text, *first), place=PLACE_OF.get(place))]
    if joint:
        things.append(_required_thing(text, *second))
    if (behind and on) or (max(thing.count for thing in things) > 1 and (joint or place)):
        raise ValueError(f"a caption has one background, and several things alike stand alone: {text!r}")
    relation = RELATION_OF.get(joint)
    if relation in ("right", "below"):
        things, relation = things[::-1], {"right": "left", "below": "above"}[relation]
    return Requirement(tuple(things), relation, BEHIND_OF.get(behind) or ON_OF.get(on))


def write(requirement: Requirement, rng: random.Random) -> str:
    """One of the wordings of a requirement, such that `parse` gives it back."""
    things, relation = list(requirement.things), requirement.relation
    if relation and rng.random() < 0.5:
        things, relation = things[::-1], {"left": "right", "above": "below"}[relation]
    phrases = []
    for thing in things:
        name = thing.shape if thing.count == 1 else SHAPES[thing.shape]
        size = thing.size and rng.choice(SIZE_WORDS[thing.size])
        phrases.append(" ".join(filter(None, (NUMBERS[thing.count], size, thing.colour, name))))
    text = f" {rng.choice(RELATIONS[relation]) if relation else 'and'} ".join(phrases)
    if things[0].place:
        text += " " + rng.choice(PLACES[things[0].place])
    behind = requirement.background and rng.choice(BACKDROPS[requirement.background])
    form = rng.random()
    if behind and form < 0.25:
        return f"{behind} with {text}"
    if form > 0.75:
        text = f"{rng.choice(OPENINGS['one' if things[0].count == 1 else 'many'])} {text}"
    return f"{text} {rng.choice(('on', 'with'))} {behind}" if behind else text


# --- of a scene, and of which split ------------------------------------------------------------------


def describe(scene: Scene) -> Requirement:
    """All that a caption can say of a scene, but for a relation."""
    first = scene.things[0]
    if len(scene.things) == 1:
        things = (RequiredThing(first.shape, first.colour, first.size, (first.row, first.column)),)
    elif len({(thing.shape, thing.colour) for thing in scene.things}) == 1:
        things = (RequiredThing(first.shape, first.colour, first.size, count=len(scene.things)),)
    else:
        things = tuple(RequiredThing(thing.shape, thing.colour, thing.size) for thing in scene.things)
    return Requirement(things, None, scene.background)


def outline(scene: Scene) -> Requirement:
    """What the edges of a scene say: shapes, sizes and places, no colours."""
    things = tuple(RequiredThing(thing.shape, None, thing.size, (thing.row, thing.column)) for thing in scene.things)
    return Requirement(things)


def category(requirement: Requirement) -> str:
    """Which of GenEval's six kinds of prompt it is."""
    coloured = all(thing.colour for thing in requirement.things)
    if requirement.things[0].count > 1:
        return "counting"
    if len(requirement.things) == 1:
        return "colors" if coloured else "single_object"
    return "position" if requirement.relation else "color_attr" if coloured else "two_object"


def combination(requirement: Requirement) -> str:
    """What the split is decided by, as text; see the head of this file."""
    names = [f"{thing.count} {thing.colour} {thing.shape} {thing.place}" for thing in requirement.things]
    relation = requirement.relation
    if relation is None or all(thing.colour for thing in requirement.things):
        relation, names = None, sorted(names)
    return f"{relation}: {', '.join(names)}"


def split_of(requirement: Requirement) -> str:
    """'train' or 'test', by the combination alone."""
    if not (requirement.relation or any(thing.colour or thing.place for thing in requirement.things)):
        return "train"
    digest = hashlib.sha256(f"{SPLIT_SEED} {combination(requirement)}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32 else "train"
