"""Images from people's files: upright, without alpha, 8 bits a channel; and the names of those we write."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .. import disk
from .levels import eight_bits

READ = ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif", "avif")  # endings of names
WRITTEN = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """As it is meant to be seen: turned as its EXIF says, over a background where it is transparent.

    Raises ValueError for numbers that no type says how to show, and what Pillow raises for damaged files.
    """
    image = ImageOps.exif_transpose(eight_bits(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def read(path: str | os.PathLike, option: str, background: str = "white") -> Image.Image:
    """`rgb` of a file that an option names. Raises ValueError."""
    if os.fspath(path) and Path(path).is_dir():  # an empty name would be the working directory
        raise ValueError(f"{option} {path}: this is a folder; name an image in it")
    if not Path(path).is_file():
        raise ValueError(f"{option} {path}: no such file")
    try:
        with Image.open(path) as image:
            return rgb(image, background)
    except UnidentifiedImageError:
        raise ValueError(f"{option} {path}: not an image that can be read (of an unknown kind)") from None
    except Exception as error:  # on damaged input Pillow's decoders raise anything, SyntaxError included
        raise ValueError(f"{option} {path}: not an image that can be read ({error})") from None


def pixels(image: Image.Image) -> Tensor:
    """[1, h, w, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]


def check_image_name(path: Path, option: str) -> None:
    """Of an image to be written, checked before the work whose result it is. Raises ValueError, OSError."""
    if path.suffix.lower() not in WRITTEN:
        raise ValueError(f"{option} {path}: name it .png, .jpg or .webp")
    if path.is_dir():
        raise ValueError(f"{option} {path}: this is a folder; choose another name")
    disk.check_writable(path)


def image_paths(first: Path, count: int, new: bool) -> list[Path]:
    """For the images of a batch: a.png, a-1.png, a-2.png; if they are to be new, a_2.png, ... where one exists."""
    start, number = first, 1
    while True:
        names = [start if i == 0 else start.with_stem(f"{start.stem}-{i}") for i in range(count)]
        if not (new and any(name.exists() for name in names)):
            return names
        number += 1
        start = first.with_stem(f"{first.stem}_{number}")


def save(images: Tensor, paths: Sequence[Path]) -> None:
    """Write images [b, h, w, 3] in [0, 1] to b paths, whose folders are made. Raises ValueError, OSError."""
    for path, image in zip(paths, images.mul(255.0).round().to("cpu", torch.uint8).numpy(), strict=True):
        write(Image.fromarray(image), path)


def write(image: Image.Image, path: Path) -> None:
    """Write an image, whole or not at all; the path's ending says its kind. Raises ValueError, OSError."""
    with disk.replacing(path) as temporary:
        image.save(temporary, WRITTEN[path.suffix.lower()])
