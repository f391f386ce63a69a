"""Several prompts, one a line, as one CONDITIONING: a batch whose row i is of image i, i + n, i + 2n and so on."""

import comfy.sd

from ...sprint_core.text.encoder import pad_embeddings
from ...sprint_core.text.formats import TextPreset
from ...sprint_core.text.prompts import PromptTokenizer
from . import screen
from .clip import split_weights


def lines_of(text: str) -> list[str]:
    """The lines that hold something; one empty line where none does."""
    return [line for line in text.splitlines() if line.strip()] or [""]


def encode_lines(clip: comfy.sd.CLIP, text: str, preset: TextPreset) -> list:
    """CONDITIONING of each line as it is encoded alone, padded to the longest, with a mask of the padding.

    The node names what of which line is not known or not read. Raises ValueError as `clip.tokenize` does.
    """
    lines = lines_of(text)
    prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(line, sana_preset=preset)) for line in lines]
    read = PromptTokenizer(clip.tokenizer.tokenizer, preset)
    notices = [(i, read.notice(split_weights(line)[0])) for i, line in enumerate(lines, 1)]
    if unread := [f"line {i}: {notice}" for i, notice in notices if notice]:
        screen.hold("; ".join(unread))
    return [_joined(entries) for entries in zip(*prompts, strict=True)]


def _joined(entries: tuple) -> list:
    """One entry of a CONDITIONING for the lines' entries of the same range of steps."""
    rows, mask = pad_embeddings([cond[0] for cond, _ in entries])
    options = dict(entries[0][1])
    return [rows, options if mask.all() else options | {"attention_mask": mask.long()}]
