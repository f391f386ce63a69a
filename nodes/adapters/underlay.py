"""The image below a live canvas's paint: from the node's input, or of one of ComfyUI's folders."""

import os
from pathlib import Path

import folder_paths
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...sprint_core.images import drawing, files
from ...sprint_core.weights.finite import is_finite


def file_of(underlay: drawing.Underlay) -> Path:
    """Its file. Raises ValueError for one outside of ComfyUI's folders for images."""
    folder = folder_paths.get_directory_by_type(underlay.type)
    if folder is None:
        raise ValueError(f"drawing: its underlay is of type {underlay.type!r}; take an image of the input folder")
    path = os.path.abspath(os.path.join(folder, underlay.subfolder, underlay.name))
    if "\0" in path or os.path.commonpath((os.path.abspath(folder), path)) != os.path.abspath(folder):
        raise ValueError(f"drawing: its underlay {underlay.name} lies outside of ComfyUI's folders; upload the image")
    return Path(path)


def files_of(text: str) -> list[Path]:
    """The files that a drawing's pixels depend on; none of one that is none."""
    try:
        sheet = drawing.parse(text)
        return [file_of(sheet.underlay)] if sheet.underlay is not None and sheet.underlay.name else []
    except ValueError:
        return []


def below(sheet: drawing.Drawing, image: Tensor | None, size: tuple[int, int]) -> np.ndarray | None:
    """uint8 [h, w, 3] that fills a sheet of size (width, height): the drawing's own, else the node's image.

    image: [b, h, w, 3] in [0, 1], of which the first counts. Raises ValueError.
    """
    if sheet.underlay is not None and sheet.underlay.name:
        return drawing.fitted(files.read(file_of(sheet.underlay), "underlay"), *size)
    return None if image is None else drawing.fitted(_pillow(image), *size)


def _pillow(image: Tensor) -> Image.Image:
    if image.ndim != 4 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(
            f"image: of shape {list(image.shape)}; it needs the 3 channels of an image without alpha; use Split Image "
            "with Alpha"
        )
    if not is_finite(image[0]):
        raise ValueError("image: holds NaN or infinity; check the node that made it")
    return Image.fromarray(image[0].clamp(0, 1).mul(255).round().to("cpu", torch.uint8).numpy())
