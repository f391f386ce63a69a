"""Prompts to the tokens that Gemma reads, and the choice among them that the transformer reads.

SANA was trained with an instruction in front of each prompt and reads only some of the tokens. Of
instruction + prompt, tokenised as one string, padded or cut to C + max_tokens - 2 tokens (C counts the
instruction's, BOS included), it reads the first and the last max_tokens - 1. Without the padding that is
BOS and everything from position C - 1 on: the instruction's last token, whose space usually fuses with
the prompt's first word, then the prompt. So the tokens before C - 1 are the same for all prompts, and
are only needed as context.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from .formats import TextPreset
from .tokenizers import Span, Tokenizer

SHOWN = 100  # characters of what is not read, in a notice


class Tokens(NamedTuple):
    """What Gemma reads, `ids`, and the positions in it that the transformer reads, `keep` (ascending)."""

    ids: list[int]
    keep: list[int]


def select_tokens(ids: Sequence[int], instruction_tokens: int, max_tokens: int) -> Tokens:
    """Cuts ids (BOS first, unpadded) to the trained length and selects [0] + the last max_tokens - 1 of it.

    instruction_tokens: C, with BOS; 0 without an instruction, where the length is max_tokens.
    """
    limit = token_limit(instruction_tokens, max_tokens)
    ids = list(ids[:limit])
    return Tokens(ids, [0, *range(limit - max_tokens + 1, len(ids))])


def token_limit(instruction_tokens: int, max_tokens: int) -> int:
    """How many tokens of instruction + prompt are read at most, BOS included; see `select_tokens`."""
    return instruction_tokens + max_tokens - 2 if instruction_tokens else max_tokens


class PromptTokenizer:
    """A tokenizer with a preset. `prefix_ids`: the tokens before C - 1, which all prompts have in common."""

    def __init__(self, tokenizer: Tokenizer, preset: TextPreset):
        self.tokenizer, self.preset = tokenizer, preset
        self.instruction_ids = tokenizer.encode(preset.instruction) if preset.instruction else []
        self.prefix_ids = tuple(self.instruction_ids[:-1])

    def tokens(self, prompt: str) -> Tokens:
        """What Gemma reads for a prompt, and which of it the transformer reads."""
        ids = self.tokenizer.encode(self.preset.full_text(prompt))
        return select_tokens(ids, len(self.instruction_ids), self.preset.max_tokens)

    def notice(self, prompt: str) -> str:
        """A sentence that names what of a prompt the model does not know or not read; '' where there is nothing."""
        return "; ".join(filter(None, (self._unknown_notice(prompt), self.unread_notice(prompt))))

    def _unknown_notice(self, prompt: str) -> str:
        unknown = self.tokenizer.unknown(replace(self.preset, instruction=None).full_text(prompt))
        if not unknown:
            return ""
        shown = ", ".join(f'"{word}"' for word in unknown)
        alike = ", ".join(dict.fromkeys(word for words in unknown.values() for word in words))
        known = f" (it knows {alike})" if alike else f" (it knows {self.tokenizer.words} words)"
        return f"this model does not know {shown[:SHOWN]}{known}"

    def unread_notice(self, prompt: str) -> str:
        """A sentence that quotes what of a prompt is behind the last token that is read, or ''."""
        text = self.preset.full_text(prompt)
        limit = token_limit(len(self.instruction_ids), self.preset.max_tokens)
        _, spans = self.tokenizer.encode_spans(text)
        if len(spans) <= limit:
            return ""
        unread = " ".join(text[spans[limit][0] :].split())
        shown = unread if len(unread) <= SHOWN else f"{unread[:SHOWN]} ..."
        return (
            f'the prompt is longer than the {self.preset.max_tokens} tokens that this model reads; not read: "{shown}"'
        )

    def tokens_and_spans(self, prompt: str) -> tuple[Tokens, list[Span | None]]:
        """The tokens, and for each of `ids` the characters [begin, end) of the unchanged prompt that it came from.

        None for BOS and the instruction.
        """
        ids, spans = self.tokenizer.encode_spans(self.preset.full_text(prompt))
        tokens = select_tokens(ids, len(self.instruction_ids), self.preset.max_tokens)
        start = len(self.preset.instruction or "") - (len(prompt) - len(prompt.lstrip()))
        # Of each character that is tokenised: İ in lower case is two.
        places = [i for i, char in enumerate(prompt) for _ in (char.lower() if self.preset.lower else char)]
        moved = [places[max(begin - start, 0) : max(end - start, 0)] for begin, end in spans[: len(tokens.ids)]]
        return tokens, [(span[0], span[-1] + 1) if span else None for span in moved]
