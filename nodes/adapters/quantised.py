"""Layers in ComfyUI's quantised formats: of files that have them, and of any file, made while it is loaded.

A file's are named layer by layer (`comfy_quant`), in the header, or by the older `scaled_fp8`. ComfyUI's only quantised
layer of these is a linear one; a 1x1 convolution becomes such a layer here, and stays a convolution for all who read,
patch, merge or save its weight.
"""

import json
from typing import Any

import comfy.model_management as mm
import comfy.quant_ops
import comfy.utils
import torch
from torch import Tensor, nn

from ...sprint_core.weights import part, quantise
from ...sprint_core.weights.checkpoint import Weights
from ...sprint_core.weights.tensorfile import CheckpointError

MARK = "comfy_quant"
HOST_LINEAR: Any = nn.Module  # in place of ComfyUI's quantised layer, a class that it makes anew for each model


def prepare(weights: Weights, form: str | None = None) -> dict | None:
    """Bring a file to the per-layer format; ComfyUI's quantisation settings, or None if it has none.

    form: a key of quantise.FORMATS, to quantise a file that is not. Raises CheckpointError.
    """
    weights.tensors, _ = comfy.utils.convert_old_quants(weights.tensors, "", metadata={})
    _require_known(weights, formats := _formats(weights))
    if form and formats and formats != {quantise.FORMATS[form]}:
        raise CheckpointError(
            f"{weights.path}: its layers are {' and '.join(sorted(formats))} already, not {form}; choose dtype auto, "
            "or load the file that they were made of"
        )
    if form and not formats:
        _require_known(weights, {quantise.FORMATS[form]})
        weights.tensors = quantise.quantised(weights.tensors, weights.layout.name, form)
    return comfy.utils.detect_layer_quantization(weights.tensors, "")


def _formats(weights: Weights) -> set[str]:
    """The formats of a file's quantised layers. Raises CheckpointError."""
    try:
        marks = {name: tensor for name, tensor in weights.tensors.items() if name.endswith(f".{MARK}")}
        return {str(json.loads(bytes(mark.tolist()))["format"]) for mark in marks.values()}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{weights.path}: what it says of its quantised layers is damaged ({error}); take another copy"
        ) from None


def _require_known(weights: Weights, formats: set[str]) -> None:
    """Raise CheckpointError for layers that this ComfyUI has not."""
    known = set(comfy.quant_ops.QUANT_ALGOS) if hasattr(comfy.quant_ops.QuantizedTensor, "from_float") else set()
    if missing := sorted(formats - known):
        raise CheckpointError(
            f"{weights.path}: this ComfyUI has no {' and no '.join(missing)} layers; update ComfyUI and its "
            "requirements, or choose another dtype or file"
        )


def operations(host: Any) -> Any:
    """ComfyUI's operations as it chose them; those of quantised layers with the layers below."""
    if issubclass(host.Linear, nn.Linear):
        return host
    linear = type("Linear", (_Linear, host.Linear), {})
    pointwise = type("PointwiseConv", (_Pointwise, linear), {})
    return type("QuantisedOperations", (host,), {"Linear": linear, "PointwiseConv": pointwise})


class _Linear(HOST_LINEAR):
    """A linear layer of ComfyUI's, quantised or not, which also has what its state dict names: merges read that."""

    weight: Any

    def __init__(self, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any):
        super().__init__(*args, dtype=dtype, **kwargs)
        self.whole_dtype = dtype

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if f"{prefix}{MARK}" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)
            # A CPU multiplies int8 numbers some twenty times slower than weights that are widened first.
            self._full_precision_mm |= mm.is_device_cpu(mm.get_torch_device())
            return
        # One that is not quantised keeps its type: ComfyUI's layer would widen it to that of the computation.
        weight = state_dict.pop(f"{prefix}weight")
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
        device = self.factory_kwargs["device"]
        self.weight = nn.Parameter(weight.to(device, self.whole_dtype), requires_grad=False)

    def set_weight(self, weight: Tensor, inplace_update: bool = False, **kwargs: Any) -> Tensor | None:
        """Raises ValueError in place, as LoRA hooks on conditioning ask for: ComfyUI would not restore the scale."""
        if inplace_update:
            raise ValueError(
                "a LoRA hooked to conditioning cannot change layers in 8 bits; apply it to the MODEL or CLIP by Load "
                "LoRA, or load that in another dtype"
            )
        return super().set_weight(weight, inplace_update=False, **kwargs)

    @property
    def weight_scale(self) -> Tensor:
        return self.weight._params.scale

    @property
    def comfy_quant(self) -> Tensor:
        return part.json_bytes({"format": self.quant_format})


class _Pointwise(HOST_LINEAR):
    """A 1x1 convolution [b, c, h, w] -> [b, c', h, w] as a linear layer of ComfyUI's, over tokens.

    Outside, in state dicts, patches, merges and hooks, its weight is [c', c, 1, 1]. (Bypassed LoRAs take a layer for a
    convolution by its class's name.)
    """

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, bias: bool = True, **factory: Any):
        super().__init__(channels_in, channels_out, bias=bias, **factory)
        self.in_channels, self.out_channels, self.kernel_size = channels_in, channels_out, (kernel_size, kernel_size)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokens = x.movedim(1, -1)
        out = super().forward(tokens.flatten(1, 2), *args, **kwargs)
        return out.unflatten(1, tokens.shape[1:3]).movedim(-1, 1)

    def forward_comfy_cast_weights(self, *args: Any, **kwargs: Any) -> Tensor:
        """Patches that are added as the layer runs, where memory is short, see a convolution, too."""
        names = [name for name in ("weight_function", "weight_lowvram_function") if getattr(self, name, None)]
        plain = {name: getattr(self, name) for name in names}
        for name, value in plain.items():
            setattr(self, name, [*map(_OfConvolution, value)] if isinstance(value, list) else _OfConvolution(value))
        try:
            return super().forward_comfy_cast_weights(*args, **kwargs)
        finally:
            for name, value in plain.items():
                setattr(self, name, value)

    # --- the weight's shape outside -----------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        weight = state_dict[f"{prefix}weight"].flatten(1)
        super()._load_from_state_dict(state_dict | {f"{prefix}weight": weight}, prefix, *args)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict:
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        state[f"{prefix}weight"] = _as_convolution(state[f"{prefix}weight"])
        return state

    def convert_weight(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _as_convolution(super().convert_weight(weight, *args, **kwargs))

    def set_weight(self, weight: Tensor, inplace_update: bool = False, **kwargs: Any) -> Tensor | None:
        return super().set_weight(weight.flatten(1), inplace_update, **kwargs)


class _OfConvolution:
    """A patch of a weight [c', c], computed as that of a convolution [c', c, 1, 1]."""

    def __init__(self, patch: Any):
        self.patch = patch

    def __call__(self, weight: Tensor) -> Tensor:
        return self.patch(_as_convolution(weight)).flatten(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.patch, name)


def _as_convolution(weight: Tensor) -> Tensor:
    return weight[:, :, None, None] if weight.ndim == 2 else weight
