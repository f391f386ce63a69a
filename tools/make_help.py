"""From the live node definitions: English texts, the reference in the help pages, and their pictures of the wiring.

    python run.py python tools/make_help.py [--translated]

Run it when a node's inputs, outputs or tooltips change; then translate what a test says is missing or out of date, and
say that you did: --translated. The prose of the pages, nodes/web/docs/<node id>.md, is written by hand; what lies
between the marks is not.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

from sprint_core.weights.presets import BUNDLED_NAME  # noqa: E402
from sprint_core.weights.tensorfile import WEIGHT_SUFFIXES  # noqa: E402

DOCS, ENGLISH = ROOT / "nodes" / "web" / "docs", ROOT / "locales" / "en" / "nodeDefs.json"
TRANSLATED = ROOT / "tests" / "translated.json"  # hashes of the English that the other languages say
PREFIX = "SanaSprint"
BEGIN, END = "<!-- made by tools/make_help.py -->", "<!-- end -->"

# Sockets as ComfyUI colours them, and what people usually connect to them: (node, socket).
COLOURS = {
    "MODEL": "#B39DDB", "CLIP": "#FFD500", "VAE": "#FF6E6E", "CONDITIONING": "#FFA931", "LATENT": "#FF9CF9",
    "IMAGE": "#64B5F6", "CONTROL_NET": "#6EE7B7", "SIGMAS": "#CDFFCD", "SAMPLER": "#ECB4B4",
}  # fmt: skip
SOURCES = {
    "MODEL": ("Load SANA-Sprint", "MODEL"),
    "CLIP": ("Load SANA-Sprint", "CLIP"),
    "VAE": ("Load SANA-Sprint", "VAE"),
    "CONDITIONING": ("SANA-Sprint Text Encode", "CONDITIONING"),
    "LATENT": ("Empty SANA Latent", "LATENT"),
    "IMAGE": ("Load Image", "IMAGE"),
    "CONTROL_NET": ("Load SANA ControlNet", "CONTROL_NET"),
}
TARGETS = {
    "MODEL": ("SANA-Sprint Sampler", "model"),
    "CLIP": ("SANA-Sprint Text Encode", "clip"),
    "VAE": ("VAE Decode", "vae"),
    "CONDITIONING": ("SANA-Sprint Sampler", "positive"),
    "LATENT": ("VAE Decode", "samples"),
    "IMAGE": ("SANA-Sprint ControlNet Apply", "image"),
    "CONTROL_NET": ("SANA-Sprint ControlNet Apply", "control_net"),
    "SIGMAS": ("SamplerCustom", "sigmas"),
    "SAMPLER": ("SamplerCustom", "sampler"),
}
OWN_SOURCES = {
    ("SanaSprintControlNetApply", "image"): ("Soft Edges", "IMAGE"),
    ("SanaSprintLoraLoader", "clip"): ("Load SANA-Sprint", "CLIP"),
}
OWN_TARGETS = {
    ("SanaSprintEmptyLatent", "LATENT"): ("SANA-Sprint Sampler", "latent_image"),
    ("SanaSprintControlNetApply", "negative"): None,
    ("SanaSprintLoraLoader", "CLIP"): ("SANA-Sprint Text Encode", "clip"),
}


@dataclass(frozen=True)
class Slot:
    """An input or output of a node."""

    name: str
    kind: str
    tip: str
    optional: bool = False
    detail: str = ""  # its choices, or its range and default

    @property
    def socket(self) -> bool:
        return self.kind in COLOURS


def inputs(definition: Mapping) -> list[Slot]:
    found = []
    for group in ("required", "optional"):
        for name, (kind, *rest) in definition["input"].get(group, {}).items():
            options = rest[0] if rest else {}
            found.append(Slot(name, kind, options.get("tooltip", ""), group == "optional", _detail(kind, options)))
    return found


def outputs(definition: Mapping) -> list[Slot]:
    rows = zip(definition["output_name"], definition["output"], definition["output_tooltips"])
    return [Slot(*row) for row in rows]


def _detail(kind: str, options: Mapping) -> str:
    """What a widget takes, in words."""
    if kind == "INT" and options.get("max", 0) > 2**32:
        return "a whole number"
    if kind in ("INT", "FLOAT") and "default" in options:
        return f"{options['min']:g} to {options['max']:g}, {options['default']:g} at first"
    if kind == "COMBO" and _files(options):
        return "a file or folder"
    if kind == "COMBO" and len(options["options"]) <= 4:
        return ", ".join(map(str, options["options"]))
    return {"COMBO": "a choice", "STRING": "text", "BOOLEAN": "on or off"}.get(kind, "")


def _files(options: Mapping) -> bool:
    """Whether the choices are what lies in the model folders."""
    names = [str(option) for option in options["options"]]
    return not names or any(name.startswith(BUNDLED_NAME) or name.endswith(WEIGHT_SUFFIXES) for name in names)


def texts(definition: Mapping) -> dict:
    """What a language's file says of a node."""
    row = {"display_name": definition["display_name"], "description": definition["description"]}
    if slots := inputs(definition):
        row["inputs"] = {slot.name: {"name": slot.name, "tooltip": slot.tip} for slot in slots}
    row["outputs"] = {str(i): {"name": slot.name, "tooltip": slot.tip} for i, slot in enumerate(outputs(definition))}
    return row


def leaves(tree, path: str = "") -> dict[str, str]:
    """The texts of a language's file: {'node/inputs/name/tooltip': text}."""
    if not isinstance(tree, dict):
        return {path[1:]: tree}
    return {k: v for name, branch in tree.items() for k, v in leaves(branch, f"{path}/{name}").items()}


def hashes(english: dict) -> dict[str, str]:
    digest = lambda text: hashlib.blake2b(text.encode(), digest_size=6).hexdigest()  # noqa: E731
    return {path: digest(text) for path, text in leaves(english).items() if not path.endswith("/name")}


def reference(node: str, definition: Mapping) -> str:
    """The part of a page that follows from the definition. Lists, as tables do not fit beside a graph."""
    lines = [BEGIN, "", f"![What {definition['display_name']} is connected to]({node}.png)"]
    if slots := inputs(definition):
        lines += ["", "## Inputs", ""]
        for slot in slots:
            takes = ", ".join(filter(None, (slot.kind if slot.socket else slot.detail, slot.optional * "optional")))
            lines.append(f"- **{slot.name}** ({takes}): {slot.tip}")
    lines += ["", "## Outputs", ""]
    lines += [f"- **{slot.name}**: {slot.tip}" for slot in outputs(definition)]
    return "\n".join([*lines, "", END])


def page(old: str, node: str, definition: Mapping) -> str:
    """A help page with its reference renewed."""
    head, tail = re.fullmatch(rf"(.*?){re.escape(BEGIN)}.*?{re.escape(END)}(.*)", old, re.S).groups()
    return head + reference(node, definition) + tail


# --- the picture of the wiring ------------------------------------------------------------------------

WIDTH, ROW, HEAD, GAP, SCALE = 210, 22, 26, 70, 2  # in px of the page


@dataclass
class Box:
    title: str
    left: list[tuple[str, str]]  # (socket, type) on either side
    right: list[tuple[str, str]]
    strong: bool = False

    @property
    def height(self) -> int:
        return HEAD + ROW * max(len(self.left), len(self.right), 1) + 8


def neighbours(node: str, slots: list[Slot], usual: Mapping, own: Mapping) -> Iterator[tuple[int, str, str, str]]:
    """(row, other node, its socket, type) for each socket of one side."""
    for row, slot in enumerate(slots):
        other = own.get((node, slot.name), None if slot.optional else usual[slot.kind])
        if other:
            yield row, *other, slot.kind


def wiring(node: str, definition: Mapping) -> Image.Image:
    """The node between what it is usually connected to."""
    ins = [slot for slot in inputs(definition) if slot.socket]
    outs = [slot for slot in outputs(definition) if slot.socket]
    middle = Box(definition["display_name"], [(s.name, s.kind) for s in ins], [(s.name, s.kind) for s in outs], True)
    sides: list[dict[str, Box]] = [{}, {}]
    wires = []  # (side, box, row in it, row of the node, type)
    for side, slots, usual, own in ((0, ins, SOURCES, OWN_SOURCES), (1, outs, TARGETS, OWN_TARGETS)):
        for row, title, socket, kind in neighbours(node, slots, usual, own):
            box = sides[side].setdefault(title, Box(title, [], []))
            sockets = box.left if side else box.right
            if (socket, kind) not in sockets:
                sockets.append((socket, kind))
            wires.append((side, box, sockets.index((socket, kind)), row, kind))
    columns = [list(sides[0].values()), [middle], list(sides[1].values())]
    columns = [column for column in columns if column]
    heights = [sum(box.height + 12 for box in column) - 12 for column in columns]
    size = (len(columns) * (WIDTH + GAP) - GAP + 20, max(heights) + 20)
    sheet = Image.new("RGB", [n * SCALE for n in size], "#1e1f22")
    pen = ImageDraw.Draw(sheet)
    places = {}
    for i, (column, height) in enumerate(zip(columns, heights)):
        y = (size[1] - height) // 2
        for box in column:
            places[id(box)] = (10 + i * (WIDTH + GAP), y)
            y += box.height + 12
    for side, box, row, own_row, kind in wires:
        a, b = (places[id(box)], row), (places[id(middle)], own_row)
        (start, i), (end, j) = (b, a) if side else (a, b)
        _wire(pen, start[0] + WIDTH, _height(start, i), end[0], _height(end, j), COLOURS[kind])
    for box in (box for column in columns for box in column):
        _draw(pen, box, *places[id(box)])
    return sheet


def shown(node: str, definition: Mapping) -> str:
    """What the picture follows from, kept in its file, so that a test sees when it is out of date."""
    slots = [
        (slot.name, slot.kind, slot.optional) for slot in (*inputs(definition), *outputs(definition)) if slot.socket
    ]
    return repr((definition["display_name"], slots))


def save_wiring(path: Path, node: str, definition: Mapping) -> None:
    about = PngInfo()
    about.add_text("shown", shown(node, definition))
    wiring(node, definition).quantize(64).save(path, optimize=True, pnginfo=about)


def _height(place: tuple[int, int], row: int) -> int:
    return place[1] + HEAD + ROW * row + ROW // 2 + 4


def _wire(pen: ImageDraw.ImageDraw, x0: int, y0: int, x1: int, y1: int, colour: str) -> None:
    points = []
    for i in range(33):
        t = i / 32
        ease = t * t * (3 - 2 * t)
        points.append(((x0 + (x1 - x0) * t) * SCALE, (y0 + (y1 - y0) * ease) * SCALE))
    pen.line(points, fill=colour, width=3 * SCALE // 2, joint="curve")


def _draw(pen: ImageDraw.ImageDraw, box: Box, x: int, y: int) -> None:
    font = lambda px: ImageFont.load_default(px * SCALE)  # noqa: E731
    frame = [n * SCALE for n in (x, y, x + WIDTH, y + box.height)]
    line = "#e8e8e8" if box.strong else "#55575c"
    pen.rounded_rectangle(frame, 7 * SCALE, "#353639", line, SCALE)
    pen.text(((x + 10) * SCALE, (y + 6) * SCALE), box.title, "#ffffff" if box.strong else "#b8b8b8", font(13))
    for side, sockets in enumerate((box.left, box.right)):
        for row, (name, kind) in enumerate(sockets):
            cx, cy = (x + WIDTH * side) * SCALE, _height((x, y), row) * SCALE
            pen.ellipse((cx - 5 * SCALE, cy - 5 * SCALE, cx + 5 * SCALE, cy + 5 * SCALE), COLOURS[kind])
            anchor, shift = ("rm", -12) if side else ("lm", 12)
            pen.text((cx + shift * SCALE, cy), name, "#d0d0d0", font(12), anchor=anchor)


def main() -> None:
    import run

    with run.comfyui_server() as server:
        ours = {name: node for name, node in sorted(server.object_info().items()) if name.startswith(PREFIX)}
    english = json.dumps({node: texts(definition) for node, definition in ours.items()}, indent=2, ensure_ascii=False)
    ENGLISH.write_text(english + "\n", "utf-8", newline="\n")
    if "--translated" in sys.argv[1:]:
        said = json.dumps(hashes(json.loads(english)), indent=0)
        TRANSLATED.write_text(said + "\n", "utf-8", newline="\n")
    for node, definition in ours.items():
        file = DOCS / f"{node}.md"
        old = file.read_text("utf-8") if file.is_file() else f"# {definition['display_name']}\n\n{BEGIN}{END}\n"
        file.write_text(page(old, node, definition), "utf-8", newline="\n")
        save_wiring(DOCS / f"{node}.png", node, definition)


if __name__ == "__main__":
    main()
