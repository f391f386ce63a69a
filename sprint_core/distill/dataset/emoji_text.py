"""The tokenizer of the bundled model: one token per word that a caption may hold, and <unk>."""

import functools
import json
from collections.abc import Sequence

from ...emoji import captions
from ...shapes import captions as shape_captions
from ...text.formats import TextPreset
from ...text.prompts import PromptTokenizer
from ...text.tokenizers import HFTokenizer

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
MAX_TOKENS = 32


def tokenizer_vocabulary(among: Sequence[int] = captions.ALL) -> dict[str, int]:
    """Words that captions of these concepts may hold, and their tokens, which are the same for any concepts."""
    words = sorted({*captions.vocabulary(), *shape_captions.VOCABULARY})
    known = {*SPECIAL, *captions.vocabulary(among), *shape_captions.VOCABULARY}
    return {piece: i for i, piece in enumerate((*SPECIAL, *words)) if piece in known}


def tokenizer(among: Sequence[int] = captions.ALL) -> HFTokenizer:
    """One token per word of the world's vocabulary, with Gemma's special tokens; of other concepts' words <unk>."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    apostrophe = {"type": "Replace", "pattern": {"Regex": "['’]"}, "content": ""}
    letters = {"type": "Replace", "pattern": {"Regex": "[^a-z0-9]+"}, "content": " "}
    description = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": piece, **flags} for i, piece in enumerate(SPECIAL)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, apostrophe, letters]},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": tokenizer_vocabulary(among), "unk_token": "<unk>"},
    }
    return HFTokenizer(json.dumps(description).encode())


@functools.cache
def prompts() -> PromptTokenizer:
    """Captions to tokens, without an instruction."""
    return PromptTokenizer(tokenizer(), TextPreset(instruction=None, max_tokens=MAX_TOKENS))
