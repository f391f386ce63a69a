"""Weights in ComfyUI's quantised layers: 8 bits each, a scale beside them, and what that is in words.

    layer.weight (fp8 or int8), layer.weight_scale (fp32), layer.comfy_quant ({"format": ...} as bytes)

Only the linear layers of blocks, 1x1 convolutions among them: modulation, time, norms and projections stay, as errors
there reach every token, and so do depthwise convolutions, which are small.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from . import tensorfile
from .part import json_bytes

FORMATS = {"fp8_e4m3fn": "float8_e4m3fn", "int8": "int8_tensorwise"}  # the name on the command line, ComfyUI's
FP8_MAX, INT8_MAX = 448.0, 127.0
LAYERS = {
    "transformer": re.compile(
        r"transformer_blocks\.\d+\.(?:attn[12]\.to_(?:q|k|v|out\.0)|ff\.conv_(?:inverted|point))\.weight"
    ),
    "text_encoder": re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.weight"),
}
BLOCK_ELEMENTS = 2**20  # of a weight that are fp32 at a time


def quantised(tensors: Mapping[str, Tensor], kind: str, form: str) -> dict[str, Tensor]:
    """Native tensors of a 'transformer' or 'text_encoder' with its linear layers in 8 bits, the rest as it was.

    One tensor after the other, and each mapped one unmapped again, so that little more is held than what comes out.
    """
    out = {}
    description = json_bytes({"format": FORMATS[form]})
    for name, tensor in tensors.items():
        if LAYERS[kind].fullmatch(name) is None:
            out[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        stored, scale = (_fp8 if form == "fp8_e4m3fn" else _int8)(tensor.flatten(1))
        out |= {
            name: stored.view(tensor.shape),
            f"{layer}.weight_scale": scale,
            f"{layer}.comfy_quant": description.clone(),
        }
        tensorfile.unmap([tensor])
    return out


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for all."""
    largest = torch.stack([weight[rows].float().abs().amax() for rows in _blocks(weight)]).amax()
    scale = largest.clamp(min=1e-12) / FP8_MAX
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for rows in _blocks(weight):
        stored[rows] = (weight[rows].float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(stored.dtype)
    return stored, scale


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A scale for each row."""
    largest = torch.cat([weight[rows].float().abs().amax(dim=1, keepdim=True) for rows in _blocks(weight)])
    scale = largest.clamp(min=1e-12) / INT8_MAX
    stored = torch.empty(weight.shape, dtype=torch.int8)
    for rows in _blocks(weight):
        stored[rows] = (weight[rows].float() / scale[rows]).round_().clamp_(-INT8_MAX, INT8_MAX).to(stored.dtype)
    return stored, scale


def _blocks(weight: Tensor) -> list[slice]:
    """Rows, a few at a time."""
    step = max(1, BLOCK_ELEMENTS // weight.shape[1])
    return [slice(start, start + step) for start in range(0, len(weight), step)]
