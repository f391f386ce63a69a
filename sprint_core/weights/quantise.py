"""Weights in ComfyUI's quantised layers: 8 bits each, a scale beside them, and what that is in words.

    layer.weight (fp8 or int8), layer.weight_scale (fp32), layer.comfy_quant ({"format": ...} as bytes)

Only the linear layers of blocks: modulation, time, norms and projections stay, as errors there reach every token,
and so do convolutions, for which ComfyUI has no quantised layer.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .part import json_bytes

FORMATS = {"fp8_e4m3fn": "float8_e4m3fn", "int8": "int8_tensorwise"}  # the name on the command line, ComfyUI's
FP8_MAX, INT8_MAX = 448.0, 127.0
LAYERS = {
    "transformer": re.compile(r"transformer_blocks\.\d+\.attn[12]\.to_(?:q|k|v|out\.0)\.weight"),
    "text_encoder": re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.weight"),
}


def quantised(tensors: Mapping[str, Tensor], kind: str, form: str) -> dict[str, Tensor]:
    """Native tensors of a 'transformer' or 'text_encoder' with its linear layers in 8 bits, the rest as it was."""
    out = {}
    description = json_bytes({"format": FORMATS[form]})
    for name, tensor in tensors.items():
        if LAYERS[kind].fullmatch(name) is None:
            out[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        stored, scale = (_fp8 if form == "fp8_e4m3fn" else _int8)(tensor.float())
        out |= {name: stored, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": description.clone()}
    return out


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for all."""
    scale = weight.abs().amax().clamp(min=1e-12) / FP8_MAX
    return (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A scale for each row."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / INT8_MAX
    return (weight / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale
