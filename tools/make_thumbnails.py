"""Run every workflow in a real ComfyUI and write its thumbnail, workflows/<name>.jpg.

Those of models that are not at hand show their graph instead.

    python run.py python tools/make_thumbnails.py [NAME ...]

Without names, of all. Not a test: run it when a workflow or the bundled model changes, and look at the images.
"""

import io
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

from launcher import setup  # noqa: E402
from tools.make_help import ENGLISH  # noqa: E402

SIDE_PX = 512
NAMES = {name: node["display_name"] for name, node in json.loads(ENGLISH.read_text(encoding="utf-8")).items()}
COLOURS = {  # of links, as ComfyUI has them
    "MODEL": "#B39DDB", "CLIP": "#FFD500", "VAE": "#FF6E6E", "CONDITIONING": "#FFA931", "LATENT": "#FF9CF9",
    "IMAGE": "#64B5F6", "CONTROL_NET": "#6EE7B7", "SIGMAS": "#CDFFCD", "SAMPLER": "#ECB4B4",
}  # fmt: skip
CANVAS_NODE = "SanaSprintLiveCanvas"


def thumbnail(saved: list[bytes]) -> Image.Image:
    """The saved images side by side."""
    images = [Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE_PX, SIDE_PX)) for data in saved]
    sheet = Image.new("RGB", (SIDE_PX * len(images), SIDE_PX))
    for i, image in enumerate(images):
        sheet.paste(image, (i * SIDE_PX, 0))
    return sheet


def with_drawings(prompt: dict) -> dict:
    """A prompt that shows what is drawn on its live canvases, before what it saves."""
    canvases = [name for name, node in prompt.items() if node["class_type"] == CANVAS_NODE]
    shown = {f"drawn-{name}": {"class_type": "PreviewImage", "inputs": {"images": [name, 1]}} for name in canvases}
    return shown | prompt


def diagram(ui: dict) -> Image.Image:
    """The graph: nodes as titled boxes, links as lines between them."""
    nodes = {node["id"]: node for node in ui["nodes"]}
    left, top = (min(node["pos"][i] for node in nodes.values()) for i in (0, 1))
    right, bottom = (max(node["pos"][i] + node["size"][i] for node in nodes.values()) for i in (0, 1))
    scale = min((2 * SIDE_PX - 40) / (right - left), (SIDE_PX - 60) / (bottom - top + 30))
    sheet = Image.new("RGB", (2 * SIDE_PX, SIDE_PX), "#1e1f22")
    pen = ImageDraw.Draw(sheet)
    margin = (2 * SIDE_PX - (right - left) * scale) / 2
    at = lambda x, y: (margin + (x - left) * scale, 40 + (y - top) * scale)  # noqa: E731
    for node in nodes.values():
        (x, y), (width, height) = node["pos"], node["size"]
        note = node["type"] == "MarkdownNote"
        pen.rounded_rectangle(
            (at(x, y - 30), at(x + width, y + height)), 6, "#4a4426" if note else "#353639", "#6a6c72"
        )
        title, font = node.get("title") or NAMES.get(node["type"], node["type"]), ImageFont.load_default(13)
        while pen.textlength(title, font) > (width - 24) * scale:
            title = title.removesuffix("...")[:-1] + "..."
        pen.text(at(x + 12, y - 20), title, "#e8e8e8", font)
    for _, source, slot, target, socket, kind in ui["links"]:
        a, b = nodes[source], nodes[target]
        start = at(a["pos"][0] + a["size"][0], a["pos"][1] + 20 * (1 + slot))
        end = at(b["pos"][0], b["pos"][1] + 20 * (1 + socket))
        pen.line((start, end), fill=COLOURS.get(kind, "#888888"), width=2)
    return sheet


def main() -> None:
    with setup.comfyui_server() as server:
        for workflow in sorted((ROOT / "workflows").glob("*.json")):
            if sys.argv[1:] and workflow.stem not in sys.argv[1:]:
                continue
            ui = json.loads(workflow.read_text(encoding="utf-8"))
            if any(node["properties"].get("models") for node in ui["nodes"]):
                diagram(ui).save(workflow.with_suffix(".jpg"), quality=85)
                continue
            prompt = with_drawings(server.prompt_of(workflow))
            outputs = server.run(prompt)["outputs"]
            images = [image for node in prompt if node in outputs for image in outputs[node].get("images", [])]
            drawn = any(node.startswith("drawn-") for node in prompt)
            saved = [image for image in images if drawn or image["type"] == "output"] or images
            thumbnail([server.view(image) for image in saved]).save(workflow.with_suffix(".jpg"), quality=85)


if __name__ == "__main__":
    main()
