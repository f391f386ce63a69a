"""Model files, read so that ComfyUI's dynamic VRAM can bring their layers straight from where they lie.

Layers that it streams come straight from a file that ComfyUI has opened; of tensors that are mapped in any other way
they are copies.
"""

from collections.abc import Mapping
from pathlib import Path

import comfy.memory_management
import comfy.utils
from torch import Tensor

from ...sprint_core import messages
from ...sprint_core.weights import checkpoint
from ...sprint_core.weights.folder_files import SAFETENSORS

log = messages.logger(__name__)


def opened(source: checkpoint.Source | str | Path, average: bool = False) -> checkpoint.Source:
    """A file or folder to load parts from."""
    return checkpoint.opened(source, average, by_comfyui)


def by_comfyui(path: Path) -> Mapping[str, Tensor] | None:
    """Where dynamic VRAM is on, and ComfyUI can; else None."""
    if not comfy.memory_management.aimdo_enabled or path.suffix.lower() not in SAFETENSORS:  # by which it goes
        return None
    try:
        return comfy.utils.load_torch_file(str(path), safe_load=True)
    except (KeyError, RuntimeError) as error:  # a type of numbers that it does not know; comfy-aimdo's own faults
        log.debug("%s: not opened by ComfyUI (%s)", path, error)
        return None
