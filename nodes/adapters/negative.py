"""A negative prompt on the MODEL of a SANA-Sprint, by normalized attention guidance (sprint_core/models/nag.py).

It travels among the MODEL's transformer options, as other nodes' patches do, so that it goes with clones, LoRAs and
compiled networks. Before each call of the network, the prompt is joined with it; ControlNets read the prompt alone.
"""

import functools
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ...sprint_core.models.layers import Attention
from ...sprint_core.models.nag import NAG, join
from ...sprint_core.weights.finite import is_finite

KEY = "sana_sprint_negative"  # a Negative
SPLIT = "sana_sprint_nag"  # for one call of the network: (NAG, how many tokens of its context are the prompt's)
UNREAD = {"area", "mask", "start_percent", "end_percent", "hooks"}  # what a CONDITIONING may say of where and when


@dataclass(frozen=True)
class Negative:
    text: Tensor  # [b, k, c]
    mask: Tensor | None  # [b, k], 1 = keep
    nag: NAG


def apply(patcher: Any, conditioning: list, nag: NAG) -> tuple[Any, list[str]]:
    """A copy of a Sprint's MODEL that avoids a CONDITIONING, and which of its settings nothing reads.

    A guidance that does nothing leaves the MODEL without a negative prompt. Raises ValueError.
    """
    sprint = getattr(patcher.model, "sprint", None)
    if sprint is None:
        raise ValueError("this MODEL is not a SANA; connect Load SANA-Sprint or Load SANA Model")
    if not sprint:
        raise ValueError(
            "this MODEL is a multi-step model, whose negative prompt acts by cfg; connect it to KSampler's negative "
            "and set cfg above 1"
        )
    text, mask = _joined(conditioning)
    patcher.model.require_own(text)
    if not is_finite(text):
        raise ValueError("the negative holds NaN or infinity; check the text encoder and the nodes behind it")
    patched = patcher.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    options.pop(KEY, None)
    if not nag.idle:
        options[KEY] = Negative(text, mask, nag)
    return patched, sorted(UNREAD & {key for _, extra in conditioning for key in extra})


def _joined(conditioning: list) -> tuple[Tensor, Tensor | None]:
    """All entries of a CONDITIONING as one text [b, k, c] and its mask. Raises ValueError where one has no text."""
    entries = [(text, extra.get("attention_mask")) for text, extra in conditioning]
    if not entries or not all(isinstance(text, Tensor) and text.ndim == 3 and text.numel() for text, _ in entries):
        raise ValueError("the negative holds no tokens of a prompt; connect CLIP Text Encode")
    width, rows = entries[0][0].shape[-1], max(len(text) for text, _ in entries)
    if any(text.shape[-1] != width for text, _ in entries):
        raise ValueError("the negative's prompts are of several text encoders; encode all with SANA's")
    repeated = [
        (
            comfy.utils.repeat_to_batch_size(text, rows),
            None if mask is None else comfy.utils.repeat_to_batch_size(fit_mask(mask, text), rows),
        )
        for text, mask in entries
    ]
    return functools.reduce(lambda one, other: join(*one, *other), repeated)


def fit_mask(mask: Tensor, text: Tensor) -> Tensor:
    """Mask [b, m] for text [b, n, c]: tokens that ConditioningConcat appended count, lost ones do not."""
    mask, n = mask.reshape(-1, mask.shape[-1]), text.shape[1]
    return torch.nn.functional.pad(mask[:, :n], (0, max(0, n - mask.shape[1])), value=1)


def before_call(
    options: dict, sampling: Any, sigma: Tensor, text: Tensor | None, mask: Tensor | None
) -> tuple[dict, Tensor | None, Tensor | None]:
    """The transformer options, context [b, m, c] and mask [b, m] of a call at sigma [b], with the negative prompt.

    They stay as they are where there is none, and outside of its share of the way.
    """
    negative = options.get(KEY)
    if negative is None or text is None or not _acts_at(negative.nag, sampling, sigma):
        return options, text, mask
    chunks = len(options.get("cond_or_uncond", ())) or 1  # prompts in one batch, each for all images

    def rows(x: Tensor) -> Tensor:
        images = comfy.utils.repeat_to_batch_size(x, len(text) // chunks)
        return images.to(text.device).repeat(chunks, *[1] * (x.ndim - 1))

    avoided = None if negative.mask is None else rows(negative.mask)
    both, mask = join(text, mask, rows(negative.text), avoided)
    return options | {SPLIT: (negative.nag, text.shape[1])}, both, mask


def _acts_at(nag: NAG, sampling: Any, sigma: Tensor) -> bool:
    if (nag.start, nag.end) == (0.0, 1.0):
        return True  # without waiting for the device
    first, last = sampling.percent_to_sigma(nag.start), sampling.percent_to_sigma(nag.end)
    return bool((sigma[0] <= first) & (sigma[0] >= last))


def attention_of(options: dict, attention: Attention) -> Attention:
    """The attention of a call of the network with these transformer options."""
    if SPLIT not in options:
        return attention
    nag, tokens = options[SPLIT]
    return nag.around(attention, tokens)
