"""HED for the Soft Edges node, where its weights lie in models/annotators."""

import functools
import logging
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...sprint_core.images import edges

log = logging.getLogger(__name__)

FOLDER, NAMES = "annotators", ("ControlNetHED.pth", "ControlNetHED.safetensors")
HED, SOFT = "HED", "from gradients, without weights"


def hed_file() -> Path | None:
    """The weights, in any folder that ComfyUI knows for annotators, or in models/annotators."""
    known = folder_paths.folder_names_and_paths.get(FOLDER, ((),))[0]
    for folder in (*map(Path, known), Path(folder_paths.models_dir) / FOLDER):
        for name in NAMES:
            if (folder / name).is_file():
                return folder / name
    return None


@functools.lru_cache(maxsize=1)
def _patcher(path: Path, changed_ns: int):
    model = edges.load_hed(path)
    return comfy.model_patcher.CoreModelPatcher(
        model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
    )


def detect(image: Tensor, path: Path | None, scribble: bool, resolution: int) -> Tensor:
    """Edges of images [b, h, w, 3], with HED's file or without weights; one by one, with progress."""
    hed, device = None, mm.get_torch_device()
    if path is not None:
        patcher = _patcher(path, path.stat().st_mtime_ns)
        mm.load_models_gpu([patcher])
        hed = patcher.model
    bar, found = comfy.utils.ProgressBar(len(image)), []
    for one in image.split(1):
        mm.throw_exception_if_processing_interrupted()
        found.append(edges.detect(one.to(device), hed, scribble, resolution).to(mm.intermediate_device()))
        bar.update(1)
    return torch.cat(found)
