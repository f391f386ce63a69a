"""Run every workflow in a real ComfyUI and write its thumbnail, workflows/<name>.jpg.

    python run.py python tests/make_thumbnails.py

Not a test: run it when a workflow or the bundled model changes, and look at the pictures.
"""

import io
import sys
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import run  # noqa: E402

SIDE_PX = 512
DRAWING = "sana-sprint-drawing.png"  # what stands for a user's strokes in Painter


def thumbnail(pictures: list[bytes]) -> Image.Image:
    """The pictures side by side."""
    images = [Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE_PX, SIDE_PX)) for data in pictures]
    sheet = Image.new("RGB", (SIDE_PX * len(images), SIDE_PX))
    for i, image in enumerate(images):
        sheet.paste(image, (i * SIDE_PX, 0))
    return sheet


def draw(path: Path) -> None:
    """A square and a circle by hand, as Painter stores strokes: white on nothing."""
    sheet = Image.new("RGBA", (512, 512))
    pen = ImageDraw.Draw(sheet)
    pen.line([(70, 230), (210, 222), (216, 372), (66, 368), (70, 228)], fill="white", width=20, joint="curve")
    pen.ellipse((290, 130, 452, 296), outline="white", width=20)
    sheet.save(path)


def main() -> None:
    draw_into = run.HOME / "base" / "input"
    with run.comfyui_server() as server:
        draw(draw_into / DRAWING)
        for workflow in sorted((ROOT / "workflows").glob("*.json")):
            prompt = server.prompt_of(workflow)
            for node in prompt.values():
                if node["class_type"] == "Painter":
                    node["inputs"]["mask"] = DRAWING
            history = server.run(prompt)
            images = server.images(history)
            saved = [image for image in images if image["type"] == "output"] or images
            thumbnail([server.view(image) for image in saved]).save(workflow.with_suffix(".jpg"), quality=85)


if __name__ == "__main__":
    main()
