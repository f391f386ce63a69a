"""Lay out the templates in workflows/ and write what they and the subgraphs say, by tools/template_plans.py.

    python run.py python tools/make_templates.py

The same input gives the same files. Each graph goes strictly from left to right: every link ends in a column to the
right of the one where it begins. A node gets as much room as it takes once its notice has made it taller.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT)]

from tools.template_plans import HUB, LIVE, PLANS, PROMPTS, SUBGRAPHS, TITLE_PREFIX, File, Live, Plan  # noqa: E402

WORKFLOWS = ROOT / "workflows"
CANVAS, PROMPT = "SanaSprintLiveCanvas", "SanaSprintTextEncode"
STRENGTH = 8  # its place among a canvas's values
# Width, height as saved, and height once it has run: of the taller of the two renderers (tools/make_sheet.py says).
# Where files are chosen, the longest name of a published one fits.
SIZES_PX = {
    "SanaSprintLoader": (340, 154, 154),
    "SanaSprintModelLoader": (440, 166, 166),
    "SanaSprintTextEncoderLoader": (440, 140, 140),
    "SanaSprintVAELoader": (440, 138, 138),
    "SanaSprintControlNetLoader": (340, 170, 170),
    "CheckpointLoaderSimple": (440, 126, 126),
    "SanaSprintTextEncode": (400, 260, 260),
    "CLIPTextEncode": (400, 160, 160),
    "SanaSprintEmptyLatent": (400, 160, 200),
    "ConditioningZeroOut": (300, 40, 40),
    "SanaSprintSampler": (340, 280, 330),
    "SanaSprintLiveCanvas": (760, 960, 960),
    "KSampler": (340, 270, 270),
    "VAEDecode": (225, 60, 60),
    "VAEEncode": (225, 60, 60),
    "VAEDecodeTiled": (300, 160, 160),
    "VAEEncodeTiled": (300, 160, 160),
    "SaveImage": (440, 480, 500),
    "PreviewImage": (300, 320, 340),
    "SolidMask": (300, 120, 120),
    "MaskComposite": (300, 140, 140),
    "SetLatentNoiseMask": (260, 60, 60),
    "ImageScaleBy": (300, 90, 90),
    "ImageStitch": (280, 160, 160),
    "ImageFromBatch": (260, 100, 100),
    "SanaSprintSoftEdges": (300, 130, 190),
    "SanaSprintControlNetApply": (300, 200, 250),
}
LEFT_PX, TOP_PX, TITLE_PX = 40, 160, 30
COLUMN_GAP_PX, ROW_GAP_PX, GROUP_GAP_PX, GROUP_PAD_PX, GROUP_TITLE_PX = 60, 30, 60, 20, 44
NOTE_PX, LINE_PX, BLANK_PX, LETTERS = 440, 20, 9, 60  # a note: its width, heights of its lines, letters in one
NARROW_NOTE_PX = 340  # of one below the first group, which is as wide
NOTE_COLOURS = {"color": "#222", "bgcolor": "#000"}
GROUP_COLOUR = "#3f789e"


def links(files: list[File]) -> str:
    """Where to get the files, where they go, which of them get another name there, and which ComfyUI does not fetch."""
    by_folder: dict[str, list[File]] = {}
    for file in files:
        by_folder.setdefault(file.folder, []).append(file)
    lines = ["", "", "### Model links", ""]
    for folder, members in by_folder.items():
        lines += [f"- {folder}: [{file.name}]({file.url})" for file in members]
    for file in files:
        if file.name != file.published_as:
            saved = f"A browser saves the file of {file.folder} as *{file.published_as}*"
            lines += ["", f"{saved}: rename it to **{file.name}**."]
        if not file.url.startswith(HUB):
            lines += ["", f"ComfyUI does not offer to download **{file.name}**: save it by its link."]
    lines += ["", "### Where they go", "", "```", "ComfyUI/", "└── models/"]
    for i, (folder, members) in enumerate(by_folder.items()):
        last = i == len(by_folder) - 1
        lines.append(f"    {'└' if last else '├'}── {folder}/")
        lines += [f"    {' ' if last else '│'}   └── {file.name}" for file in members]
    return "\n".join([*lines, "```"])


def note_height_px(text: str) -> int:
    """Room for a note's text, whose long lines wrap."""
    lines = [line.split("](")[0] for line in text.splitlines()]
    return 70 + sum(LINE_PX * (1 + len(line) // LETTERS) if line else BLANK_PX for line in lines)


def speak(node: dict, plan: Plan) -> None:
    """Title, prompt, files and values of a node."""
    if title := plan.titles.get(node["id"]):
        node["title"] = title
    elif node["id"] != plan.note:
        node.pop("title", None)
    if key := plan.prompts.get(node["id"]):
        node["widgets_values"][0] = PROMPTS[key]
    if file := plan.files.get(node["id"]):
        node["widgets_values"][0] = file.name
        node["properties"]["models"] = [{"name": file.name, "url": file.url, "directory": file.folder}]
    if values := plan.values.get(node["id"]):
        node["widgets_values"][1 : 1 + len(values)] = values


def write_note(node: dict, plan: Plan) -> None:
    text = plan.text + (links(list(plan.files.values())) if plan.files else "")
    width = NARROW_NOTE_PX if plan.is_note_below else NOTE_PX
    node.update(NOTE_COLOURS, title="Read me", widgets_values=[text])
    node["pos"], node["size"] = [LEFT_PX, TOP_PX], [width, note_height_px(text)]


def place(ui: dict, plan: Plan) -> None:
    """Positions and sizes of all nodes, and the groups around them. Rows are aligned within a group."""
    nodes = {node["id"]: node for node in ui["nodes"]}
    ui["groups"], x = [], LEFT_PX + (0 if plan.is_note_below else NOTE_PX + GROUP_GAP_PX)
    for number, (title, columns) in enumerate(plan.groups, 1):
        sizes = [[SIZES_PX[nodes[i]["type"]] for i in column] for column in columns]
        rows = max(map(len, columns))
        heights = [max(column[row][2] for column in sizes if row < len(column)) for row in range(rows)]
        left = x
        for column, column_sizes in zip(columns, sizes, strict=True):
            y = TOP_PX
            for row, (i, (width, height, _)) in enumerate(zip(column, column_sizes, strict=True)):
                nodes[i]["pos"], nodes[i]["size"] = [x, y], [width, height]
                y += heights[row] + TITLE_PX + ROW_GAP_PX
            x += max(width for width, *_ in column_sizes) + COLUMN_GAP_PX
        top = TOP_PX - TITLE_PX - GROUP_TITLE_PX
        bottom = TOP_PX + sum(heights) + (rows - 1) * (TITLE_PX + ROW_GAP_PX)
        box = [left - GROUP_PAD_PX, top, x - COLUMN_GAP_PX - left + 2 * GROUP_PAD_PX, bottom - top + GROUP_PAD_PX]
        ui["groups"].append(
            {"id": number, "title": title, "bounding": box, "color": GROUP_COLOUR, "font_size": 24, "flags": {}}
        )
        x += GROUP_GAP_PX + 2 * GROUP_PAD_PX - COLUMN_GAP_PX
    if plan.is_note_below:
        _, top, _, height = ui["groups"][0]["bounding"]
        nodes[plan.note]["pos"][1] = top + height + ROW_GAP_PX + TITLE_PX


def lay_out(ui: dict, plan: Plan) -> None:
    placed = [i for _, columns in plan.groups for column in columns for i in column]
    assert sorted([*placed, plan.note]) == sorted(node["id"] for node in ui["nodes"]), "each node has one place"
    for node in ui["nodes"]:
        if node["id"] == plan.note:
            write_note(node, plan)
        else:
            speak(node, plan)
    place(ui, plan)


def draw(ui: dict, live: Live) -> None:
    """Prompt, seed, strength and drawing of a live canvas."""
    (canvas,) = (node for node in ui["nodes"] if node["type"] == CANVAS)
    values = canvas["widgets_values"]
    values[0], values[1], values[STRENGTH], values[-1] = PROMPTS[live.prompt], live.seed, live.strength, live.drawing


def prompt_subgraph(ui: dict, text: str) -> None:
    """Within it, and where it shows its prompt."""
    (inner,) = (node for graph in ui["definitions"]["subgraphs"] for node in graph["nodes"] if node["type"] == PROMPT)
    for node in (inner, ui["nodes"][0]):
        node["widgets_values"][0] = text


def main() -> None:
    jobs: list[tuple[Path, Callable[[dict, Any], None], Any]]
    jobs = [(WORKFLOWS / f"{TITLE_PREFIX}{name}.json", lay_out, plan) for name, plan in PLANS.items()]
    jobs += [(WORKFLOWS / f"{TITLE_PREFIX}{name}.json", draw, live) for name, live in LIVE.items()]
    jobs += [(ROOT / "subgraphs" / f"{name}.json", prompt_subgraph, PROMPTS[key]) for name, key in SUBGRAPHS.items()]
    for path, change, what in jobs:
        ui = json.loads(path.read_text(encoding="utf-8"))
        change(ui, what)
        path.write_text(json.dumps(ui, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
