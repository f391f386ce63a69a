"""Run every template in a real ComfyUI and write its thumbnail, workflows/<name>.jpg, square as the browser shows it.

Those of models that are not at hand get a drawn card.

    python run.py python tools/make_thumbnails.py [NAME ...]

Without names, of all. Not a test: run it when a template or the bundled model changes, and look at the images.
"""

import io
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

from launcher import setup  # noqa: E402
from launcher.client import Client  # noqa: E402
from tools.make_logo import INK, PAPER, SUN, arc  # noqa: E402
from tools.template_plans import PLANS, TITLE_PREFIX, Plan  # noqa: E402

SIDE_PX, INSET_PX, EDGE_PX = 512, 140, 6
QUIET = (170, 172, 180)
BRAND = "SANA-Sprint"
CANVAS_NODE = "SanaSprintLiveCanvas"


def square(data: bytes, side: int = SIDE_PX) -> Image.Image:
    """A saved image, cropped to a square."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def upon(first: Image.Image, result: Image.Image) -> Image.Image:
    """What went in, small and framed, in a corner of what came out."""
    sheet = result.copy()
    framed = ImageOps.expand(first.resize((INSET_PX, INSET_PX), Image.Resampling.LANCZOS), EDGE_PX, PAPER)
    sheet.paste(framed, (EDGE_PX * 2, SIDE_PX - framed.height - EDGE_PX * 2))
    return sheet


def beside(images: list[Image.Image], words: tuple[str, ...]) -> Image.Image:
    """Two images, each under its name."""
    sheet = Image.new("RGB", (SIDE_PX, SIDE_PX), INK)
    pen = ImageDraw.Draw(sheet)
    side = SIDE_PX // 2 - 12
    for i, (image, word) in enumerate(zip(images, words, strict=True)):
        x = 8 + i * (side + 8)
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, 150))
        pen.text((x + side / 2, 120), word, PAPER, ImageFont.load_default(24), anchor="mm")
    pen.text((SIDE_PX / 2, 445), "the same image", QUIET, ImageFont.load_default(30), anchor="mm")
    return sheet


def card(words: tuple[str, ...]) -> Image.Image:
    """For a model that is not at hand: what it is in large letters, under the pack's mark."""
    large, *lines = words
    sheet = Image.new("RGBA", (SIDE_PX, SIDE_PX), (*INK, 255))
    arc(sheet, (256, 176), 140, (112, 72, 56, 44))
    pen = ImageDraw.Draw(sheet)
    pen.text((36, 318), large, SUN, ImageFont.load_default(124), anchor="ls")
    for i, line in enumerate(lines):
        pen.text((38, 372 + 40 * i), line, PAPER, ImageFont.load_default(32), anchor="ls")
    pen.text((38, 476), BRAND, QUIET, ImageFont.load_default(26), anchor="ls")
    return sheet.convert("RGB")


def with_drawings(prompt: dict) -> dict:
    """A prompt that shows what is drawn on its live canvases, before what it saves."""
    canvases = [name for name, node in prompt.items() if node["class_type"] == CANVAS_NODE]
    shown = {f"drawn-{name}": {"class_type": "PreviewImage", "inputs": {"images": [name, 1]}} for name in canvases}
    return shown | prompt


def thumbnail(server: Client, workflow: Path, plan: Plan) -> Image.Image:
    """What a run of the template shows; where it says not what, its image, and upon it what is drawn on its canvas."""
    if plan.card:
        return card(plan.card)
    outputs = server.run(with_drawings(server.prompt_of(workflow)))["outputs"]
    nodes = plan.shown or sorted(outputs, key=lambda name: not name.startswith("drawn-"))
    images = [square(server.view(outputs[str(node)]["images"][0])) for node in nodes]
    if plan.beside:
        return beside(images, plan.beside)
    return upon(images[0], images[1]) if len(images) == 2 else images[0]


def main() -> None:
    plans = {TITLE_PREFIX + name: plan for name, plan in PLANS.items()}
    with setup.comfyui_server() as server:
        for workflow in sorted((ROOT / "workflows").glob("*.json")):
            if not sys.argv[1:] or workflow.stem in sys.argv[1:]:
                image = thumbnail(server, workflow, plans[workflow.stem])
                image.save(workflow.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main()
