"""What captions of the emoji world say, and which of them are held out.

A caption names one thing, two things and how they stand, or several alike; perhaps a size or place, a style, a ground.
What it leaves open is as usual (scenes.py), so that a model of one step need not paint a mixture. Fixed hashes send
some combinations to the test split, and training shows neither their captions nor scenes that hold them:

    concept and ground           10 %  (but for the usual grounds)
    concept and place or size    10 %
    ordered pair of concepts     10 %
    concept in the flat style     5 %
"""

import functools
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from .art import STYLES
from .concepts import article, concepts, has_plural, plural

SPLITS = ("train", "test")
SPLIT_SEED = 7
PAIRS, COUNTS = 0.25, 0.16  # captions that name two things, of all; several alike, of the others
SHARES = {"ground": 0.10, "spot": 0.10, "pair": 0.10, "style": 0.05}

GROUNDS = {  # RGB at the top and at the bottom
    "white": ((250, 250, 250),) * 2,
    "black": ((22, 22, 26),) * 2,
    "gray": ((150, 152, 156),) * 2,
    "red": ((214, 48, 49),) * 2,
    "orange": ((243, 146, 55),) * 2,
    "yellow": ((250, 214, 90),) * 2,
    "green": ((76, 175, 80),) * 2,
    "teal": ((38, 166, 154),) * 2,
    "sky blue": ((129, 199, 245),) * 2,
    "blue": ((48, 84, 200),) * 2,
    "purple": ((126, 87, 194),) * 2,
    "pink": ((248, 165, 194),) * 2,
    "pink to orange": ((248, 165, 194), (243, 146, 55)),
    "sky blue to white": ((129, 199, 245), (250, 250, 250)),
    "blue to purple": ((48, 84, 200), (126, 87, 194)),
    "yellow to green": ((250, 214, 90), (76, 175, 80)),
    "purple to black": ((126, 87, 194), (22, 22, 26)),
    "teal to blue": ((38, 166, 154), (48, 84, 200)),
}
USUAL_GROUNDS = ("white", "sky blue")  # where a caption says none: two, as two seeds should show two images
PLACES = {
    (0, 0): ("at the top left", "in the top left corner"),
    (0, 1): ("at the top",),
    (0, 2): ("at the top right", "in the top right corner"),
    (1, 0): ("on the left",),
    (1, 1): ("in the centre", "in the middle", "in the center"),
    (1, 2): ("on the right",),
    (2, 0): ("at the bottom left", "in the bottom left corner"),
    (2, 1): ("at the bottom",),
    (2, 2): ("at the bottom right", "in the bottom right corner"),
}
RELATIONS = {
    "left": ("to the left of", "left of", "and", "next to"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under"),
}
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
NUMBERS = {2: "two", 3: "three", 4: "four"}
STYLE_WORDS = dict(enumerate(STYLES))
OPENINGS = ("a picture of", "an image of", "an emoji of", "an icon of", "a drawing of", "an illustration of")
STRANGE = "xyzzy"  # stands for words that the world does not know; no caption's own word, so it becomes <unk>


@dataclass(frozen=True)
class Requirement:
    """What a caption says. concepts: one, or two that `relation` orders; count: of one concept; None: not said."""

    concepts: tuple[int, ...]
    count: int = 1
    relation: str | None = None
    place: tuple[int, int] | None = None
    size: str | None = None
    style: int | None = None
    ground: str | None = None

    @property
    def kind(self) -> str:
        return "pair" if len(self.concepts) == 2 else "count" if self.count > 1 else "one"


@dataclass(frozen=True)
class Prompt:
    text: str
    requirement: Requirement


def _held(kind: str, *key: object) -> bool:
    digest = hashlib.sha256(f"{SPLIT_SEED} {kind} {key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < SHARES[kind] * 2**32


def split_of(requirement: Requirement) -> str:
    """'train' or 'test'."""
    tests = []
    for concept in requirement.concepts:
        if requirement.ground not in (None, *USUAL_GROUNDS):
            tests.append(_held("ground", concept, requirement.ground))
        if requirement.style:
            tests.append(_held("style", concept, requirement.style))
    if requirement.place or requirement.size == "small":
        tests.append(_held("spot", requirement.concepts, requirement.place or requirement.size))
    if requirement.relation:
        tests.append(_held("pair", *_in_order(requirement)))
    return "test" if any(tests) else "train"


def _in_order(requirement: Requirement) -> tuple[int, ...]:
    """Concepts from left to right or from top to bottom."""
    is_reversed = requirement.relation in ("right", "below")
    return requirement.concepts[::-1] if is_reversed else requirement.concepts


ALL = tuple(range(len(concepts())))


@functools.cache
def countable(among: tuple[int, ...]) -> list[int]:
    """Those concepts whose label has a plural."""
    return [number for number in among if has_plural(concepts()[number].names[0])]


def draw(
    rng: random.Random, split: str | None = "train", among: Sequence[int] = ALL, pairs: float = PAIRS
) -> Requirement:
    """What a caption of that split says; None: of any split.

    among: numbers of the concepts that it may name; pairs: how often it names two.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"the splits are {' and '.join(SPLITS)}, not {split!r}")
    while True:
        requirement = _draw(rng, among, pairs)
        if split in (None, split_of(requirement)):
            return requirement


def _draw(rng: random.Random, among: Sequence[int], pairs: float) -> Requirement:
    ground = rng.choice(list(GROUNDS)) if rng.random() < 0.6 else None
    style = rng.choice((0, 1, 1)) if rng.random() < 0.36 else None
    kind = rng.random()
    if kind < pairs:
        pair = tuple(rng.sample(among, 2))
        return Requirement(pair, relation=rng.choice(list(RELATIONS)), style=style, ground=ground)
    if kind < pairs + COUNTS * (1 - pairs):
        return Requirement(
            (rng.choice(countable(tuple(among))),), count=rng.choice(list(NUMBERS)), style=style, ground=ground
        )
    one = (rng.choice(among),)
    if rng.random() < 0.35:
        return Requirement(one, place=rng.choice(list(PLACES)), style=style, ground=ground)
    size = rng.choice(("small", "large")) if rng.random() < 0.25 else None
    return Requirement(one, size=size, style=style, ground=ground)


def write(requirement: Requirement, rng: random.Random) -> str:
    """One of the wordings of a requirement; now and then with a word that the world does not know."""
    is_bare = requirement == Requirement(requirement.concepts) and rng.random() < 0.4
    names = [_name(number, rng, requirement.count) for number in requirement.concepts]
    if is_bare and len(names) == 1:
        return names[0]
    style_form = rng.choice(("before", "after", "in")) if requirement.style is not None else None
    if requirement.kind != "one" and style_form == "before":
        style_form = "after"
    style = STYLE_WORDS.get(requirement.style) if requirement.style is not None else None
    text = (
        f" {rng.choice(RELATIONS[requirement.relation])} ".join(
            _phrase(name, requirement, style if style_form == "before" else None, rng) for name in names
        )
        if requirement.relation
        else _phrase(names[0], requirement, style if style_form == "before" else None, rng)
    )
    if requirement.place:
        text += f" {rng.choice(PLACES[requirement.place])}"
    if rng.random() < 0.15:
        text = f"{rng.choice(OPENINGS)} {text}"
    if style_form == "in":
        text += f" in {style} style"
    if requirement.ground:
        text += _ground(requirement.ground, rng)
    return f"{text}, {style} style" if style_form == "after" else text


def _name(number: int, rng: random.Random, count: int) -> str:
    names = concepts()[number].names
    if count > 1:
        several = [name for name in names if has_plural(name)]
        return plural(several[0] if rng.random() < 0.7 else rng.choice(several))
    return names[0] if rng.random() < 0.55 else rng.choice(names)


def _phrase(name: str, requirement: Requirement, style: str | None, rng: random.Random) -> str:
    size = rng.choice(SIZES[requirement.size]) if requirement.size else None
    strange = STRANGE if rng.random() < 0.03 else None
    phrase = " ".join(filter(None, (size, strange, style, name)))
    return f"{NUMBERS[requirement.count]} {phrase}" if requirement.count > 1 else article(phrase)


def _ground(ground: str, rng: random.Random) -> str:
    if " to " in ground:
        return f" on a gradient from {ground}" if rng.random() < 0.5 else f" on a {ground} gradient"
    return f" {rng.choice(('on', 'with'))} {article(ground)} background" if rng.random() < 0.8 else f" on {ground}"


def vocabulary(among: Sequence[int] = ALL) -> tuple[str, ...]:
    """Every word that a caption of these concepts may hold, sorted."""
    texts = [*GROUNDS, *OPENINGS, *NUMBERS.values(), *STYLE_WORDS.values()]
    texts += [wording for table in (PLACES, RELATIONS, SIZES) for wordings in table.values() for wording in wordings]
    texts += ["a an on with background gradient from in style center"]
    for concept in (concepts()[number] for number in among):
        texts += concept.names
        texts += [plural(name) for name in concept.names if has_plural(name)]
    return tuple(sorted({word for text in texts for word in text.split()}))


def prompts(n: int, seed: int = 0, split: str = "test", among: Sequence[int] = ALL) -> list[Prompt]:
    """n different prompts, in the order of drawing: fewer are the beginning of more."""
    rng = random.Random(f"{split} {seed}")
    distinct: dict[str, Prompt] = {}
    while len(distinct) < n:
        requirement = draw(rng, split, among)
        text = write(requirement, rng)
        if STRANGE not in text:
            distinct.setdefault(text, Prompt(text, requirement))
    return list(distinct.values())
