"""The concepts of the emoji world: what can be painted, and the names that people type for it.

concepts.json holds them in a fixed order, so that a number means the same concept for ever; `select` made it from
emojibase (labels and tags, MIT). Left out is what 32-fold compressed latents cannot tell apart or what needs
letters: people, most faces, flags, clocks at each hour, phases of the moon, symbols.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("concepts.json")
COMMON = TABLE.with_name("common.txt")  # labels, one a line

# Subgroups and labels of emojibase that are taken beside groups 3 to 7 (nature, food, travel, activities, objects).
GROUPS = {3, 4, 5, 6, 7}
SUBGROUPS = {11, 13, 14}  # costumes (ghost, robot), monkeys, hearts
LABELS = {
    "grinning face", "face with tears of joy", "winking face", "smiling face with halo", "smiling face with heart-eyes",
    "face blowing a kiss", "zany face", "thinking face", "sleeping face", "face with medical mask", "nauseated face",
    "hot face", "cold face", "exploding head", "cowboy hat face", "partying face", "smiling face with sunglasses",
    "nerd face", "crying face", "loudly crying face", "angry face", "smiling face with horns", "skull", "grinning cat",
    "collision", "hundred points", "thought balloon", "speech balloon", "waving hand", "victory hand", "thumbs up",
    "thumbs down", "clapping hands", "flexed biceps", "foot", "ear", "nose", "brain", "tooth", "bone", "eye", "eyes",
    "mouth", "tongue", "Santa Claus", "chequered flag", "triangular flag",
}  # fmt: skip
WITHOUT = re.compile(
    r"o’clock|-thirty|^oncoming |gibbous|quarter moon|waxing|waning|new moon|^speaker|bell with slash|muted"
    r"|hourglass not done|^globe showing A|sun behind (small|large)|umbrella (with|on)|mailbox|^envelope with|incoming"
    r"|^(in|out)box tray|^locked with|clinking glasses|camera with flash|tilted right|folder|heart decoration"
    r"|heart exclamation|beating heart|growing heart|mending|airplane (departure|arrival)|trolleybus"
    r"|^minibus|(yen|euro|pound) banknote|chart increasing with|low battery|mobile phone with|guide dog"
    r"|front-facing|love hotel|Japanese post office|hotel$|tram car|light rail|^metro|railway car|suspension"
    r"|mountain (railway|cable)"
    r"|page with curl|(green|orange) book|dvd|linked|landslide|two-hump|tear-off|softball|unlocked|heart with ribbon"
    r"|tropical fish|cityscape at dusk|sunrise$|bridge at night|foggy|chains$|red envelope|black bird|hammer and pick"
    r"|snowman without|old key|sparkler|confetti|admission|wood$|motor boat|lady beetle face|brown mushroom"
    r"|coin suit|heart suit|diamond suit|spade suit|club suit|bullet train|department|derelict|tanabata|moon viewing"
    r"|Japanese dolls|pine decoration|rolled-up|bookmark tabs|notebook with|wheelchair|bus stop|level slider|prayer"
    r"|identification|placard|hamsa|funeral|cigarette|coffin"
    r"|orca|leafless|root vegetable|trombone|^harp|treasure chest|shovel|phoenix|broken chain|^lime$"
)
# What people type beside labels and tags.
ALIASES: Mapping[str, Sequence[str]] = {
    "pizza": ("slice of pizza", "pizza slice"),
    "cheese wedge": ("cheese", "piece of cheese", "wedge of cheese"),
    "watermelon": ("slice of watermelon", "watermelon slice"),
    "shortcake": ("slice of cake", "piece of cake", "cake slice"),
    "birthday cake": ("cake",),
    "pie": ("slice of pie",),
    "bread": ("loaf of bread",),
    "hot beverage": ("coffee", "cup of coffee", "cup of tea", "tea"),
    "glass of milk": ("milk",),
    "beer mug": ("beer", "glass of beer", "pint of beer"),
    "wine glass": ("wine", "glass of wine"),
    "bottle with popping cork": ("champagne", "bottle of champagne"),
    "french fries": ("fries",),
    "hamburger": ("burger", "cheeseburger"),
    "doughnut": ("donut",),
    "red apple": ("apple",),
    "ear of corn": ("corn",),
    "soft ice cream": ("ice cream cone",),
    "steaming bowl": ("bowl of noodles", "ramen"),
    "cooked rice": ("bowl of rice", "rice"),
    "automobile": ("car", "red car"),
    "fire engine": ("fire truck",),
    "sport utility vehicle": ("suv", "blue car"),
    "articulated lorry": ("truck", "lorry"),
    "bicycle": ("bike",),
    "airplane": ("plane", "aeroplane"),
    "flying saucer": ("ufo",),
    "locomotive": ("steam train",),
    "dog face": ("puppy", "face of a dog"),
    "cat face": ("kitten", "face of a cat"),
    "T-Rex": ("dinosaur", "tyrannosaurus"),
    "honeybee": ("bee",),
    "lady beetle": ("ladybug", "ladybird"),
    "baby chick": ("chick",),
    "evergreen tree": ("pine tree", "fir tree"),
    "deciduous tree": ("tree",),
    "seedling": ("sprout",),
    "cherry blossom": ("flower",),
    "television": ("tv",),
    "laptop": ("computer",),
    "mobile phone": ("phone", "smartphone"),
    "light bulb": ("lamp", "bulb"),
    "closed book": ("book",),
    "gem stone": ("diamond", "gem"),
    "soccer ball": ("football", "ball"),
    "wrapped gift": ("gift", "present"),
    "grinning face": ("smiley", "smiley face", "happy face"),
    "red heart": ("heart",),
    "alien monster": ("space invader",),
    "jack-o-lantern": ("pumpkin", "halloween pumpkin"),
    "glowing star": ("shiny star",),
    "high voltage": ("lightning bolt", "lightning"),
    "droplet": ("water drop",),
    "water wave": ("wave",),
    "couch and lamp": ("sofa", "couch"),
    "camping": ("tent in the forest",),
    "house": ("home",),
    "snow-capped mountain": ("snowy mountain",),
    "sailboat": ("boat",),
    "ship": ("cruise ship",),
    "wrench": ("spanner",),
    "trophy": ("cup", "gold cup"),
    "crown": ("king's crown",),
    "chicken": ("hen",),
    "honey pot": ("honey", "jar of honey"),
    "fish": ("blue fish",),
    "skull": ("human skull",),
}
# Words that captions use for something else than a name.
RESERVED = frozenset(
    [
        "sky",
        "teal",
        "cyan",
        "red",
        "orange",
        "yellow",
        "green",
        "blue",
        "purple",
        "pink",
        "white",
        "black",
        "gray",
        "grey",
        "brown",
        "medium",
        "small",
        "large",
        "big",
        "little",
        "top",
        "bottom",
        "left",
        "right",
        "centre",
        "middle",
        "corner",
        "above",
        "below",
        "over",
        "under",
        "two",
        "three",
        "four",
        "one",
        "many",
        "yes",
        "no",
        "play",
        "style",
        "flat",
        "background",
        "gradient",
        "picture",
        "image",
        "icon",
        "emoji",
        "drawing",
        "painting",
        "media",
        "super",
        "test",
    ]
)
WORDS = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Concept:
    """hexcode: of the emoji. names: in lower case, the label first; each names this concept alone."""

    hexcode: str
    label: str
    names: tuple[str, ...]
    group: int


@functools.cache
def common() -> tuple[int, ...]:
    """Numbers of the concepts that people ask for most and that are easy to tell apart: a world for a small budget."""
    labels = COMMON.read_text("utf-8").splitlines()
    return tuple(sorted(number for number, concept in enumerate(concepts()) if concept.label in labels))


@functools.cache
def concepts() -> tuple[Concept, ...]:
    """All concepts, in the order of their numbers."""
    rows = json.loads(TABLE.read_text("utf-8"))
    return tuple(Concept(row["hexcode"], row["label"], tuple(row["names"]), row["group"]) for row in rows)


@functools.cache
def _numbers() -> dict[str, int]:
    return {name: number for number, concept in enumerate(concepts()) for name in concept.names}


def number_of(name: str) -> int:
    """The number of the concept that has this name. Raises ValueError."""
    if name not in _numbers():
        raise ValueError(f"no concept is called {name!r}")
    return _numbers()[name]


def learnt(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of the concepts that a transformer of these settings learnt: all where they do not say.

    Raises ValueError for what is no list of such numbers.
    """
    numbers = settings.get("concepts", list(range(len(concepts()))))
    is_good = isinstance(numbers, list) and all(isinstance(n, int) and 0 <= n < len(concepts()) for n in numbers)
    if not is_good or len(numbers) < 2:
        raise ValueError(f"its settings cannot be used: the concepts are {str(numbers)[:80]}")
    return tuple(numbers)


def _head_and_rest(name: str) -> tuple[str, str]:
    """Such as "slice", " of pizza"."""
    head, *rest = re.split(r"(?= (?:of|with|on|in|and|from|without) )", name, maxsplit=1)
    return head, "".join(rest)


def is_plural(name: str) -> bool:
    """Whether a name is a plural already (grapes, french fries), which takes no article and no number."""
    head = _head_and_rest(name)[0]
    return head.endswith("s") and not head.endswith(("ss", "us", "is"))


def has_plural(name: str) -> bool:
    """Whether captions count things of this name; not where one of its words may be a plural already."""
    return not (is_plural(name) or (name.endswith("s") and not name.endswith(("ss", "us", "is"))))


def article(name: str) -> str:
    """The name with its article; plurals have none."""
    if is_plural(name):
        return name
    return f"an {name}" if name[0] in "aeiou" and not name.startswith(("uni", "ufo", "euro")) else f"a {name}"


IRREGULAR = {
    "mouse": "mice", "tooth": "teeth", "foot": "feet", "goose": "geese", "ox": "oxen", "wolf": "wolves",
    "leaf": "leaves", "knife": "knives", "loaf": "loaves", "scarf": "scarves", "child": "children", "fish": "fish",
    "sheep": "sheep", "deer": "deer", "man": "men", "woman": "women", "sushi": "sushi", "die": "dice",
}  # fmt: skip


def plural(name: str) -> str:
    """Of a singular name: "cat" -> "cats", "slice of pizza" -> "slices of pizza"."""
    head, rest = _head_and_rest(name)
    *before, noun = head.split(" ")
    if noun in IRREGULAR:
        noun = IRREGULAR[noun]
    elif noun.endswith(("s", "x", "ch", "sh", "z")):
        noun += "es"
    elif noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        noun = noun[:-1] + "ies"
    else:
        noun += "s"
    return " ".join([*before, noun]) + rest


def plain(text: str) -> str:
    """Lower-case words of letters and digits, one blank apart: what the tokenizer sees."""
    return " ".join(WORDS.findall(text.lower().replace("’", "").replace("ñ", "n")))


def select(data: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of concepts.json from emojibase's en/data.json."""
    chosen = [entry for entry in data if _is_wanted(entry)]
    own = {plain(entry["label"]) for entry in chosen}
    words = {word for label in own for word in label.split()}
    aliases = {plain(alias): label for label, several in ALIASES.items() for alias in several}
    tags = Counter(tag for entry in chosen for tag in {plain(tag) for tag in entry.get("tags", ())})
    rows = []
    for entry in chosen:
        names = [plain(entry["label"]), *(plain(alias) for alias in ALIASES.get(entry["label"], ()))]
        for tag in map(plain, entry.get("tags", ())):
            taken = (
                tag in own or tag in aliases or tags[tag] > 1 or tag in RESERVED or tag in words - set(names[0].split())
            )
            if not taken and tag not in names and _is_name(tag, entry["label"]):
                names.append(tag)
        row = {"hexcode": entry["hexcode"].lower(), "label": entry["label"], "names": names, "group": entry["group"]}
        rows.append(row)
    return rows


def _is_wanted(entry: Mapping[str, Any]) -> bool:
    label = entry["label"]
    if label in LABELS:
        return True
    inside = entry.get("group") in GROUPS or entry.get("subgroup") in SUBGROUPS
    return inside and WITHOUT.search(label) is None


def _is_name(tag: str, label: str) -> bool:
    """Whether a tag reads like a name: a longer form of the label's own words, or a single noun-like word."""
    return (
        bool(tag) and len(tag) > 2 and (set(plain(label).split()) & set(tag.split()) != set() or len(tag.split()) == 1)
    )
