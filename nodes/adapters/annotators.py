"""HED for the Soft Edges node, where its weights lie in models/annotators."""

import functools
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...sprint_core import messages
from ...sprint_core.images import edges
from . import residence

log = messages.logger(__name__)

FOLDER = "annotators"
NAMES = ("ControlNetHED.pth", "ControlNetHED.safetensors")
HED, SOFT = "HED", "from gradients, without weights"


def hed_file() -> Path | None:
    """The weights, in any folder that ComfyUI knows for annotators, or in models/annotators."""
    registered = folder_paths.folder_names_and_paths.get(FOLDER, ((),))[0]
    for folder in (*map(Path, registered), Path(folder_paths.models_dir) / FOLDER):
        for name in NAMES:
            if (folder / name).is_file():
                return folder / name
    return None


@functools.lru_cache(maxsize=1)
def _patcher(path: Path, changed_ns: int) -> comfy.model_patcher.ModelPatcher:
    """changed_ns: when the file was, so that a repaired one is read."""
    model = edges.load_hed(path, comfy.ops.manual_cast)  # which moves weights that stay in main memory
    device = mm.get_torch_device()
    make = residence.patcher_class(model.state_dict(), device)
    return make(model, load_device=device, offload_device=mm.unet_offload_device())


def detect(image: Tensor, path: Path | None, scribble: bool, resolution: int) -> Tensor:
    """Edges [b, h, w, 3] of images [b, h, w, 3], both in [0, 1], by HED or from gradients; one by one, with progress.

    path: HED's weights, or None. resolution: the shorter side in pixels at which edges are looked for.
    """
    hed, device = None, mm.get_torch_device()
    if path is not None:
        patcher = _patcher(path, path.stat().st_mtime_ns)
        mm.load_models_gpu([patcher])
        hed = patcher.model
    bar, detected = comfy.utils.ProgressBar(len(image)), []
    for single in image.split(1):
        mm.throw_exception_if_processing_interrupted()
        detected.append(edges.detect(single.to(device), hed, scribble, resolution).to(mm.intermediate_device()))
        bar.update(1)
    return torch.cat(detected)
