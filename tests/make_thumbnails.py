"""Run every workflow in a real ComfyUI and write its thumbnail, workflows/<name>.jpg.

    python run.py python tests/make_thumbnails.py

Not a test: run it when a workflow or the bundled model changes, and look at the pictures.
"""

import io
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from run import comfyui_server  # noqa: E402

SIDE_PX = 512


def thumbnail(pictures: list[bytes]) -> Image.Image:
    """The saved pictures side by side."""
    images = [Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE_PX, SIDE_PX)) for data in pictures]
    sheet = Image.new("RGB", (SIDE_PX * len(images), SIDE_PX))
    for i, image in enumerate(images):
        sheet.paste(image, (i * SIDE_PX, 0))
    return sheet


def main() -> None:
    with comfyui_server() as server:
        for workflow in sorted((ROOT / "workflows").glob("*.json")):
            history = server.run(server.prompt_of(workflow))
            saved = [image for image in server.images(history) if image["type"] == "output"]
            thumbnail([server.view(image) for image in saved]).save(workflow.with_suffix(".jpg"), quality=85)


if __name__ == "__main__":
    main()
