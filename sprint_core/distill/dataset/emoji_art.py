"""Making sprites.zip from the archives of emoji_sources.py."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ... import disk
from ...emoji.art import SPRITE_PX, STYLES
from ...emoji.concepts import Concept, concepts
from . import emoji_sources as sources

ALPHA_LEAST = 8  # of 255: fainter pixels do not belong to the drawing

Draw = Callable[[str], Image.Image | None]  # hexcode -> RGBA, None where the style lacks it


def fit(image: Image.Image) -> np.ndarray:
    """[SPRITE_PX, SPRITE_PX, 4]: trimmed to its content, scaled to the sprite's longer side, centred, premultiplied."""
    image = image.convert("RGBA").convert("RGBa")
    drawn = np.argwhere(np.asarray(image.getchannel("a")) > ALPHA_LEAST)
    (top, left), (bottom, right) = drawn.min(0).tolist(), drawn.max(0).tolist()
    image = image.crop((left, top, right + 1, bottom + 1))
    scale = SPRITE_PX / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGBa", (SPRITE_PX, SPRITE_PX))
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(image, ((SPRITE_PX - width) // 2, (SPRITE_PX - height) // 2))
    return np.asarray(canvas)


def prepare(cache: Path, out: Path) -> Mapping[str, int]:
    """Write sprites.zip from the archives; returns how many concepts each style has. Raises OSError, ValueError."""
    drawers = {"3d": _fluent_3d(cache), "flat": _fluent_flat(cache)}
    counts: dict[str, int] = dict.fromkeys(STYLES, 0)
    with disk.replacing(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
        for number, concept in enumerate(concepts()):
            for style in STYLES:
                image = _drawn(drawers[style], concept)
                if image is None:
                    continue
                buffer = io.BytesIO()
                # RGBa cannot be written: the premultiplied numbers travel as RGBA, with `exact`, so that none is lost
                Image.fromarray(fit(image), "RGBA").save(buffer, "WEBP", lossless=True, exact=True, method=4)
                file.writestr(f"{style}/{number}.webp", buffer.getvalue())
                counts[style] += 1
        file.writestr("concepts.json", json.dumps([concept.label for concept in concepts()]))
    return counts


def _drawn(draw: Draw, concept: Concept) -> Image.Image | None:
    for hexcode in (concept.hexcode, concept.hexcode.replace("-fe0f", "")):
        if (image := draw(hexcode)) is not None:
            return image
    return None


def _fluent_3d(cache: Path) -> Draw:
    """Rendered drawings of 256 px; file names carry fe0f where emojibase's codes do not."""
    with tarfile.open(sources.archive(sources.FLUENT_3D, cache)) as file:
        members = [member for member in file.getmembers() if member.name.endswith(".webp")]
        contents = {
            Path(member.name).stem.replace("-fe0f", ""): stream.read()
            for member in members
            if (stream := file.extractfile(member)) is not None
        }

    def draw(hexcode: str) -> Image.Image | None:
        content = contents.get(hexcode.replace("-fe0f", ""))
        return None if content is None else Image.open(io.BytesIO(content))

    return draw


def _fluent_flat(cache: Path) -> Draw:
    """Vector drawings, rendered at 256 px by resvg. Raises ValueError where that is missing."""
    try:
        import resvg_py
    except ImportError:
        raise ValueError("the flat drawings are rendered with resvg: pip install resvg_py") from None

    with tarfile.open(sources.archive(sources.FLUENT_FLAT, cache)) as file:
        names, icons = (json.load(file.extractfile(f"package/{name}.json")) for name in ("chars", "icons"))  # type: ignore[arg-type]

    def draw(hexcode: str) -> Image.Image | None:
        name = names.get(hexcode) or names.get(hexcode.replace("-fe0f", ""))
        if name is None:
            return None
        while name not in icons["icons"]:
            name = icons["aliases"][name]["parent"]
        icon = {"left": 0, "top": 0, "width": icons["width"], "height": icons["height"], **icons["icons"][name]}
        box = " ".join(str(icon[key]) for key in ("left", "top", "width", "height"))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
        rendered = resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(rendered)))

    return draw
