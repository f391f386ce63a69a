"""Gemma as a writer: what ComfyUI's Generate Text asks of a CLIP, by the core's generation."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.ops
import comfy.utils
import torch
from torch import Tensor

from ...sprint_core.models.gemma import Gemma
from ...sprint_core.text.generation import Sampling, chat_text, generate, stop_ids
from ...sprint_core.text.tokenizers import Tokenizer
from ...sprint_core.weights.finite import is_finite
from . import screen

STOP = "sana_stop"  # entry of a token dictionary to write from: the tokens that end the answer
UNREAD = ("image", "video", "audio")  # what Generate Text offers to other families


@screen.one_sentence
def tokens_to_answer(
    tokenizer: Tokenizer, path: Path, text: str, skip_template: bool, **inputs: Any
) -> tuple[list[int], set[int]]:
    """The text's tokens, in a user's turn unless skip_template, and those that end the answer. Raises ValueError.

    path: the encoder's file. inputs: the others of Generate Text.
    """
    if connected := [name for name in UNREAD if inputs.get(name) is not None]:
        raise ValueError(f"{', '.join(connected)}: Gemma-2 reads text alone; disconnect this input")
    try:
        stop = stop_ids(tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return tokenizer.encode(text if skip_template else chat_text(text)), stop


@screen.one_sentence
def answer(
    gemma: Gemma,
    prompt: Sequence[int],
    stop: Collection[int] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
    choice: tuple | None,
    seed: int,
    why_not_finite: Callable[[], str],
) -> list[int]:
    """The answer's tokens, with ComfyUI's progress bar; its Cancel ends it between two. Raises ValueError.

    stop: None for tokens that were not made to be answered. choice: the fields of `Sampling`, None for the most likely
    token each time. why_not_finite: the sentence for NaN.
    """
    if stop is None:
        raise ValueError(
            "these tokens are of a prompt to paint; to write, tokenize with skip_template, as Generate Text"
        )

    def logits(hidden: Tensor) -> Tensor:
        if not is_finite(hidden):
            raise ValueError(why_not_finite())
        return _logits(gemma, hidden)

    bar, written = comfy.utils.ProgressBar(max_length), []
    sampling = None if choice is None else Sampling(*choice)
    writing = generate(
        gemma,
        prompt,
        max_tokens=max_length,
        stop=stop,
        sampling=sampling,
        seed=seed,
        device=device,
        dtype=dtype,
        logits=logits,
    )
    with contextlib.closing(writing) as tokens:
        for token in tokens:
            written.append(token)
            bar.update(1)
            mm.throw_exception_if_processing_interrupted()
    return written


def _logits(gemma: Gemma, hidden: Tensor) -> Tensor:
    """`Gemma.logits` with the embedding as ComfyUI casts, patches and moves it."""
    embedding = gemma.model.embed_tokens
    weight, _, stream = comfy.ops.cast_bias_weight(embedding, hidden, offloadable=True)
    result = gemma.logits(hidden, weight)
    comfy.ops.uncast_bias_weight(embedding, weight, None, stream)
    return result
