"""Pictures from people's files: upright, without alpha, 8 bits a channel; and the names of those we write."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

WRITTEN = (".png", ".jpg", ".jpeg", ".webp")


def rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """As it is meant to be seen: turned as its EXIF says, over a background where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "I":  # the same, as some files say it
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def read(path: str | os.PathLike, option: str, background: str = "white") -> Image.Image:
    """`rgb` of a file that an option names. Raises ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"{option} {path}: no such file")
    try:
        with Image.open(path) as image:
            return rgb(image, background)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{option} {path}: not a picture that can be read ({error})") from None


def check_name(path: Path, option: str) -> Path:
    """The name of a picture to be written, or ValueError; asked before the work whose result it is."""
    if path.suffix.lower() not in WRITTEN:
        raise ValueError(f"{option} {path}: name it .png, .jpg or .webp")
    return path
