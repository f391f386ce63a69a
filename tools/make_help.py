"""From the live node definitions: English texts, the reference in the help pages, their images of the nodes, and the
list of nodes that ComfyUI-Manager finds the pack by.

    python run.py python tools/make_help.py [--translated]

Run it when a node's inputs, outputs or tooltips change; then translate what a test says is missing or out of date, and
say that you did: --translated. The prose of the pages, nodes/web/docs/<node id>.md, is written by hand; what lies
between the marks is not. Pages in other languages, nodes/web/docs/<node id>/<language>.md, take names and tooltips from
locales/. Needs Chromium, which photographs each node in ComfyUI's own page.
"""

import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

from editor import graph_clip, launch_chromium, open_editor, plain_canvas  # noqa: E402

from launcher import setup  # noqa: E402
from launcher.browser import chromium  # noqa: E402
from launcher.client import Server  # noqa: E402
from launcher.prompt import DYNAMIC_COMBO, WIDGET_TYPES  # noqa: E402
from sprint_core.weights.presets import BUNDLED_NAME  # noqa: E402
from sprint_core.weights.tensorfile import WEIGHT_SUFFIXES  # noqa: E402
from tools.help_words import WORDS, Words  # noqa: E402

DOCS, ENGLISH = ROOT / "nodes" / "web" / "docs", ROOT / "locales" / "en" / "nodeDefs.json"
NODE_LIST = ROOT / "node_list.json"
TRANSLATED = ROOT / "tests" / "translated.json"  # hashes of the English that the other languages say
PREFIX = "SanaSprint"
BEGIN, END = "<!-- made by tools/make_help.py -->", "<!-- end -->"

SCALE, MARGIN_PX = 2, 12  # of the images: pixels of the file per pixel of the page, and what lies around the node
TALLEST_PX = 1200  # of an image in full; that of a taller node has one pixel of the file per pixel of the page
SETTLE_MS = 1500  # until text boxes, which lie over the canvas, have found their places
VISIBLE = ("default", "multiline", "advanced", "control_after_generate")  # options of an input that an image shows
LORA = "lora.safetensors"  # an empty file, so that the node has one to choose
# One node in the middle of an empty canvas, wide enough for its title.
ALONE = """name => {
    app.graph.clear();
    const node = LiteGraph.createNode(name);
    node.id = window.lastShown = (window.lastShown ?? 0) + 1; // a second node of an id takes the first one's values
    app.graph.add(node);
    node.setSize([Math.max(node.size[0], 270), node.size[1]]);
    node.pos = [0, 0];
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [(innerWidth - node.size[0]) / 2, (innerHeight - node.size[1]) / 2];
    app.canvas.background_image = app.canvas._pattern = null;
    app.graph.setDirtyCanvas(true, true);
}"""


@dataclass(frozen=True)
class Slot:
    """An input or output of a node."""

    name: str
    kind: str
    tip: str
    optional: bool = False
    detail: str = ""  # its choices, or its range and default
    choice: str = ""  # of a dynamic combo, with which alone it is there: "schedule custom"

    @property
    def key(self) -> str:
        """What a language's file calls it."""
        return f"{self.choice.split()[0]}_{self.name}" if self.choice else self.name

    @property
    def socket(self) -> bool:
        return self.kind not in WIDGET_TYPES


def specifications(groups: Mapping, choice: str = "") -> Iterator[tuple[str, str, dict, bool, str]]:
    """(name, kind, options, whether optional, choice) of each input, those of a dynamic combo's choices after it."""
    for group in ("required", "optional"):
        for name, (kind, *rest) in groups.get(group, {}).items():
            options = rest[0] if rest else {}
            yield name, kind, options, group == "optional" and not choice, choice
            if kind == DYNAMIC_COMBO:
                for option in options["options"]:
                    yield from specifications(option["inputs"], f"{name} {option['key']}")


def inputs(definition: Mapping, words: Words = WORDS["en"]) -> list[Slot]:
    return [
        Slot(name, kind, options.get("tooltip", ""), optional, _detail(kind, options, words), choice)
        for name, kind, options, optional, choice in specifications(definition["input"])
    ]


def outputs(definition: Mapping) -> list[Slot]:
    rows = zip(definition["output_name"], definition["output"], definition["output_tooltips"], strict=True)
    return [Slot(*row) for row in rows]


def _detail(kind: str, options: Mapping, words: Words) -> str:
    """What a widget takes, in words."""
    if kind == "INT" and options.get("max", 0) > 2**32:
        return words.whole_number
    if kind in ("INT", "FLOAT") and "default" in options:
        return words.span.format(options["min"], options["max"], options["default"])
    if kind == "COMBO" and is_file(options):
        return words.file
    if kind in ("COMBO", DYNAMIC_COMBO) and len(options["options"]) <= 4:
        return words.comma.join(keys(options))
    choice = words.choice
    return {DYNAMIC_COMBO: choice, "COMBO": choice, "STRING": words.text, "BOOLEAN": words.switch}.get(kind, "")


def keys(options: Mapping) -> list[str]:
    """The choices of a combo, plain or dynamic."""
    return [str(option["key"] if isinstance(option, Mapping) else option) for option in options["options"]]


def is_file(options: Mapping) -> bool:
    """Whether the choices are what lies in the model folders."""
    names = keys(options)
    return not names or any(name.startswith(BUNDLED_NAME) or name.endswith(WEIGHT_SUFFIXES) for name in names)


def texts(definition: Mapping) -> dict:
    """What a language's file says of a node."""
    row = {"display_name": definition["display_name"], "description": definition["description"]}
    if slots := inputs(definition):
        row["inputs"] = {slot.key: {"name": slot.name, "tooltip": slot.tip} for slot in slots}
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


def reference(node: str, definition: Mapping, language: str = "en") -> str:
    """The part of a page that follows from the definition. Lists, as tables do not fit beside a graph."""
    words, said = WORDS[language], translation(language)[node]
    lines = [BEGIN, "", f"![{said['display_name']}]({node}.png)"]
    if slots := inputs(definition, words):
        lines += ["", f"## {words.inputs}", ""]
        for slot in slots:
            kind = slot.kind if slot.socket else slot.detail
            choice = slot.choice and words.along_with.format(*slot.choice.split())
            takes = words.comma.join(filter(None, (kind, slot.optional * words.optional, choice)))
            takes = words.brackets.format(takes)
            lines.append(f"- {_named(slot.name, said['inputs'][slot.key], takes, words)}")
    lines += ["", f"## {words.outputs}", ""]
    for i, slot in enumerate(outputs(definition)):
        lines.append(f"- {_named(slot.name, said['outputs'][str(i)], '', words)}")
    return "\n".join([*lines, "", END])


def _named(name: str, said: Mapping, takes: str, words: Words) -> str:
    """One input or output: as the node shows it, and as the graph calls it where that is something else."""
    own = "" if said["name"] == name else f" `{name}`"
    return f"**{said['name']}**{own}{takes}{words.colon}{said['tooltip']}"


def translation(language: str) -> dict:
    return json.loads((ENGLISH.parents[1] / language / ENGLISH.name).read_text("utf-8"))


def page(old: str, node: str, definition: Mapping, language: str = "en") -> str:
    """A help page with its reference renewed."""
    head, rest = old.split(BEGIN)
    return head + reference(node, definition, language) + rest.split(END)[1]


def page_file(node: str, language: str) -> Path:
    """Where ComfyUI's page looks for it; the English one is also what every other language shows."""
    return DOCS / f"{node}.md" if language == "en" else DOCS / node / f"{language}.md"


def shown(definition: Mapping) -> str:
    """What the image follows from, kept in its file, so that a test sees when it is out of date.

    Not the names of model files: these are the user's.
    """
    rows = []
    for name, kind, options, optional, choice in specifications(definition["input"]):
        if choice:
            continue
        rows.append((name, kind, "optional" if optional else "required", *(options.get(key) for key in VISIBLE)))
        if kind in ("COMBO", DYNAMIC_COMBO) and not is_file(options):
            rows.append(keys(options)[0])  # what it stands at where no default is given
    return repr((definition["display_name"], rows, [(slot.name, slot.kind) for slot in outputs(definition)]))


def photograph(page: Page, node: str) -> Image.Image:
    """The node alone, as ComfyUI's page draws it."""
    page.evaluate(ALONE, node)
    page.wait_for_timeout(SETTLE_MS)
    if page.evaluate("app.graph.nodes.map(node => node.type)") != [node]:  # the page's first graph may come late
        return photograph(page, node)
    data = page.screenshot(clip=graph_clip(page, MARGIN_PX))
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.reduce(SCALE) if image.height > TALLEST_PX else image


def photograph_all(server: Server, definitions: Mapping[str, Mapping]) -> None:
    """The images of the help pages, DOCS/<node id>.png."""
    path = chromium() or sys.exit("no Chromium or Chrome found")
    lora = server.base / "models" / "loras" / LORA
    lora.parent.mkdir(exist_ok=True)
    lora.touch()
    with sync_playwright() as playwright, plain_canvas(server):
        browser = launch_chromium(playwright, path)
        page = browser.new_page(viewport={"width": 1200, "height": 1300}, device_scale_factor=SCALE)
        open_editor(page, server)
        for node, definition in definitions.items():
            text = PngInfo()
            text.add_text("shown", shown(definition))
            photograph(page, node).save(DOCS / f"{node}.png", optimize=True, pnginfo=text)
        browser.close()
    lora.unlink()


def node_list(definitions: Mapping[str, Mapping]) -> dict[str, str]:
    """What ComfyUI-Manager reads of nodes that it cannot find in the code, as of all of today's API: id -> name."""
    return {node: definition["display_name"] for node, definition in sorted(definitions.items())}


def main() -> None:
    with setup.comfyui_server() as server:
        ours = {name: node for name, node in sorted(server.object_info().items()) if name.startswith(PREFIX)}
        photograph_all(server, ours)
    english = json.dumps({node: texts(definition) for node, definition in ours.items()}, indent=2, ensure_ascii=False)
    ENGLISH.write_text(english + "\n", "utf-8", newline="\n")
    NODE_LIST.write_text(json.dumps(node_list(ours), indent=2) + "\n", "utf-8", newline="\n")
    if "--translated" in sys.argv[1:]:
        digests = json.dumps(hashes(json.loads(english)), indent=0)
        TRANSLATED.write_text(digests + "\n", "utf-8", newline="\n")
    for node, definition in ours.items():
        for language in WORDS:
            file = page_file(node, language)
            if language != "en" and not file.is_file():
                continue  # the editor shows the English one
            old = file.read_text("utf-8") if file.is_file() else f"# {definition['display_name']}\n\n{BEGIN}{END}\n"
            file.write_text(page(old, node, definition, language), "utf-8", newline="\n")


if __name__ == "__main__":
    main()
