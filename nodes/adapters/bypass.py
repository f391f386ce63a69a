"""LoRAs beside the weights (LoraLoaderBypass, TrainLoraNode's bypass mode) on the layers where ComfyUI's own way fails.

ComfyUI runs down, then up, on a layer's input. A depthwise convolution and a table of rows have no such path: it
raises RuntimeError there. Here such a layer adds its change, at the LoRA's strength, by the same operation as its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEY = "sana_sprint_bypass"


def mend(patcher) -> None:
    """Once ComfyUI has replaced the forward of each layer with a LoRA: at ON_INJECT_MODEL, or when training starts."""
    for module in patcher.model.modules():
        hook = getattr(module.__dict__.get("forward"), "__self__", None)
        if hook is not None and hasattr(hook, "adapter") and _has_no_path(module):
            module.forward = _Beside(hook)


def _has_no_path(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or (isinstance(module, nn.Conv2d) and module.groups > 1)


class _Beside:
    """The forward of a layer with an adapter: its own output and that of the adapter's change of the weight."""

    def __init__(self, hook):
        self.hook = hook

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        own, module = self.hook.original_forward(x, *args, **kwargs), self.hook.module
        weight = module.weight.to(own.device, torch.float32)
        change = (self._changed(weight) - weight).to(own.dtype)
        if isinstance(module, nn.Embedding):
            return own + F.embedding(x, change)
        return own + F.conv2d(x, change, None, module.stride, module.padding, module.dilation, module.groups)

    def _changed(self, weight: Tensor) -> Tensor:
        adapter = self.hook.adapter
        if isinstance(adapter, nn.Module):  # in training
            return adapter(weight)
        strength = self.hook.multiplier
        return adapter.calculate_weight(weight.clone(), "", strength, 1.0, None, lambda change: change)
