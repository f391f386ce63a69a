"""Files in ComfyUI's quantised formats: per-layer `comfy_quant`, and the older `scaled_fp8`."""

import comfy.utils

from ...sprint_core.weights.checkpoint import Weights


def prepare(weights: Weights) -> dict | None:
    """Bring a file to the per-layer format; ComfyUI's quantisation settings, or None if it has none."""
    weights.tensors, _ = comfy.utils.convert_old_quants(weights.tensors, "", metadata={})
    return comfy.utils.detect_layer_quantization(weights.tensors, "")
