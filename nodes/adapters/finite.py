"""What made a result NaN or infinite: weights, a LoRA, conditioning, a ControlNet. Looked for once one did.

A LoRA is looked at before, too: torch's attention without a mask can make zeros of NaN (2.11, seen on an Intel Xeon
with AVX-512), so that what a LoRA did to queries and keys need not reach the result.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...sprint_core.weights.finite import first_and_count, is_finite, not_finite

NETWORK = "diffusion_model."


def sampling_fault(guider: Any) -> str | None:
    """What is wrong with the weights or the conditioning of a sampling run, and what to do; None if nothing is."""
    patcher = guider.model_patcher
    return (
        weights_fault(patcher, patcher.model.diffusion_model, NETWORK)
        or lora_fault(patcher)
        or next(filter(None, map(_cond_fault, _conds(guider))), None)
    )


def weights_fault(patcher: Any, network: nn.Module, prefix: str = "") -> str | None:
    """The tensors of a network's file that hold NaN or infinity, without what LoRAs merged into them."""
    weights = {}
    for name, tensor in network.state_dict().items():
        saved = patcher.backup.get(prefix + name)
        weights[name] = tensor if saved is None else saved.weight
    if not (names := not_finite(weights)):
        return None
    made_by = getattr(patcher, "cached_patcher_init", None)  # for ComfyUI: (load, (file, options))
    file = made_by[1][0] if made_by else getattr(network, "path", "the model")
    return f"{file}: its tensor {first_and_count(names)} holds NaN or infinity; download or convert it again"


def lora_fault(patcher: Any) -> str | None:
    """Of patches to the weights: LoRAs, and other models that were merged in."""
    for key, patches in patcher.patches.items():
        tensors = {str(i): tensor for i, tensor in enumerate(_tensors(patches))}
        if not_finite(tensors):
            return f"a LoRA's change of {key} holds NaN or infinity; take that LoRA out"
    return None


def _tensors(patch: Any) -> Iterator[Tensor]:
    """All tensors of a patch: ComfyUI nests them in lists, tuples, and adapters with `weights`."""
    if isinstance(patch, Tensor):
        yield patch
    elif isinstance(patch, list | tuple):
        for part in patch:
            yield from _tensors(part)
    elif hasattr(patch, "weights"):
        yield from _tensors(patch.weights)


def _conds(guider: Any) -> Iterator[dict]:
    for conds in getattr(guider, "conds", {}).values():
        yield from conds


def _cond_fault(cond: dict) -> str | None:
    text = cond.get("cross_attn")
    if isinstance(text, Tensor) and not is_finite(text):
        return "the conditioning holds NaN or infinity; check the text encoder and the nodes behind it"
    control = cond.get("control")
    while control is not None:
        if fault := weights_fault(control.control_model_wrapped, control.control_model):
            return fault
        control = control.previous_controlnet
    return None
