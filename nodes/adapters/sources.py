"""Model files, read so that ComfyUI's dynamic VRAM can bring their layers straight from where they lie.

Layers that it streams come from the file through memory that a GPU copies from at full speed, if ComfyUI has read the
file; from tensors that are mapped in any other way they come by a slower copy.
"""

from collections.abc import Mapping
from pathlib import Path

import comfy.memory_management
import comfy.utils
from torch import Tensor

from ...sprint_core.weights.checkpoint import Source


def opened(source: Source | str | Path, average: bool = False) -> Source:
    """A file or folder to load parts from."""
    return source if isinstance(source, Source) else Source(source, average, by_comfyui)


def by_comfyui(path: Path) -> Mapping[str, Tensor] | None:
    """Where dynamic VRAM is on, and for types of numbers that ComfyUI reads; else None."""
    if not getattr(comfy.memory_management, "aimdo_enabled", False):
        return None
    try:
        return comfy.utils.load_torch_file(str(path), safe_load=True)
    except KeyError:  # a type of numbers
        return None
