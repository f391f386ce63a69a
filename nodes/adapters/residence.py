"""Whether a network is loaded as a whole, or ComfyUI's dynamic VRAM brings its layers as they are needed.

Dynamic VRAM (comfy-aimdo) is for models that a GPU has no room for: each node prepares every layer anew, which takes a
hundred small copies that the GPU waits for, and longer than a step of a small model. One that is small beside the GPU's
memory is spared that by ComfyUI's plain patcher.

Both kinds may be loaded at once. ComfyUI unloads plain networks, or a part of them, before it loads one of either kind
that needs the room. Streamed ones it unloads only before it loads a plain one: among themselves they exchange layers
as they compute. In a run, a streamed network that outgrows ComfyUI's estimate cannot have a plain one's room.
"""

from collections.abc import Mapping

import comfy.model_management as mm
import comfy.model_patcher
import torch
from torch import Tensor

# Of a device's memory: a transformer, a text encoder and a VAE of that size leave as much for what they compute.
# 1.6B in bf16 is 3.2 GB, Gemma-2 5.2 GB, DC-AE 0.6 GB: all of them from 24 GB on, all but Gemma from 16 GB on.
SHARE = 1 / 4


def is_small(tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None = None) -> bool:
    """Whether weights, as they are or in dtype, take at most SHARE of the memory of the device that computes."""
    weights_bytes = sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors.values())
    return weights_bytes <= SHARE * mm.get_total_memory(device)


def patcher_class(
    tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None = None, plain: bool = False
) -> type[comfy.model_patcher.ModelPatcher]:
    """The plain patcher for a network that is small, or of which that is asked, else the one that ComfyUI prefers."""
    plain = plain or is_small(tensors, device, dtype)
    return comfy.model_patcher.ModelPatcher if plain else comfy.model_patcher.CoreModelPatcher
