"""Images of more than 8 bits a channel: their numbers by their type, from black to white, as 8 bits.

Pillow reads such colour images as 8 bits itself, and leaves grey ones, one number a pixel, to us: unsigned 12 and 16
bits, where white is the largest number, and floats, where it is 1. Of signed and of 32-bit integers nobody can tell
which number is white (many hold 12 or 16 bits), so they are refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339  # TIFF's tags, and EXIF's
SIGNED = 2  # a sample format
OVERSHOOT = 0.01  # of floats, as sharpening resizers leave it
ADVICE = "save it with 8 or 16 bits a channel"


def eight_bits(image: Image.Image) -> Image.Image:
    """The same image with 8 bits a channel, transparency by a colour included. Raises ValueError, OSError."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    of_png = image.format == "PNG" and any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    image.load()
    if SIGNED in np.ravel(tags.get(SAMPLE_FORMAT, 1)):
        raise ValueError(f"it holds signed numbers, of which none is known to be white; {ADVICE}")
    if image.mode == "F":
        return _of_floats(image, bool(tags) and tags.get(PHOTOMETRIC) == 0)
    if image.mode == "I" and tags:
        raise ValueError(f"it holds 32-bit integers, of which none is known to be white; {ADVICE}")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _of_integers(image, tags)
    clear = image.info.get("transparency")
    if of_png and isinstance(clear, tuple):  # the image has the high bytes, and this the whole number
        image.info["transparency"] = tuple(level >> 8 for level in clear)
    return image


def _of_integers(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Of a grey image of 16 bits, or as many as its TIFF says."""
    levels = np.asarray(image).astype(np.int64).clip(0, 65535)
    white = 2 ** min(16, *np.ravel(tags.get(BITS, 16))) - 1
    grey = (levels * 255 + white // 2) // white
    if tags.get(PHOTOMETRIC) == 0:
        grey = 255 - grey
    grey = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    return _with_exif(_without(grey, levels == clear) if isinstance(clear, int) else grey, image)


def _of_floats(image: Image.Image, black_is_one: bool) -> Image.Image:
    levels = np.asarray(image)
    low, high = float(levels.min()), float(levels.max())
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # NaN too
        raise ValueError(f"its numbers go from {low:g} to {high:g}, not from 0, black, to 1, white; {ADVICE}")
    levels = levels.clip(0, 1)
    levels = 1 - levels if black_is_one else levels
    return _with_exif(Image.fromarray((levels * 255).round().astype(np.uint8)), image)


def _without(grey: Image.Image, clear: np.ndarray) -> Image.Image:
    """The image, transparent where clear [h, w] says so."""
    grey.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return grey


def _with_exif(image: Image.Image, source: Image.Image) -> Image.Image:
    """Still to be turned as the source's EXIF says."""
    exif = Image.Exif()
    exif[ORIENTATION] = source.getexif().get(ORIENTATION, 1)
    image.info["exif"] = exif.tobytes()
    return image
