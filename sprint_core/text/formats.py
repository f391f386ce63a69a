"""Prompt formats: the instruction that SANA was trained to read in front of each prompt, and the token limit."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..config import Range, check_fields

LOWER_CASE = {"nvlabs": False, "diffusers": True}  # prompt formats; both strip, and their instructions differ


@functools.cache
def load_instruction(format: str = "nvlabs") -> str:
    """The instruction text of the training ('nvlabs') or of diffusers' port ('diffusers'). Raises ValueError."""
    if format not in LOWER_CASE:
        raise ValueError(f"prompt format {format!r} is none of {', '.join(LOWER_CASE)}")
    texts = json.loads(Path(__file__).with_name("instruction.json").read_text(encoding="utf-8"))
    return "\n".join(texts[format])


@dataclass(frozen=True)
class TextPreset:
    """How a prompt becomes text: the instruction in front (None for none), the limit, lower-casing.

    max_tokens: the most tokens that the transformer reads, BOS included. Raises ValueError on other types and limits.
    """

    instruction: str | None
    max_tokens: Annotated[int, Range(2, 1e6)] = 300
    lower: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.instruction is not None:
            object.__setattr__(self, "instruction", _whole_characters(self.instruction))

    def full_text(self, prompt: str) -> str:
        """The text to tokenise: the instruction, and the prompt stripped and perhaps lower-cased."""
        prompt = _whole_characters(prompt)
        prompt = (prompt.lower() if self.lower else prompt).strip()
        return (self.instruction or "") + prompt


def _whole_characters(text: str) -> str:
    """The text with ? for halves of surrogate pairs, which no tokenizer takes and no file can hold."""
    return text.encode("utf-8", "replace").decode()


def text_preset(format: str = "nvlabs") -> TextPreset:
    """The preset of a published prompt format; dataclasses.replace varies it. Raises ValueError."""
    return TextPreset(load_instruction(format), lower=LOWER_CASE[format])
