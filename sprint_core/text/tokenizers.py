"""Gemma's tokenizer from its two file formats, tokenizer.model and tokenizer.json, which give equal ids."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .. import disk

PAD, EOS, BOS = 0, 1, 2  # Gemma's ids
UNKNOWN = "<unk>"
TURN, TURN_END = "<start_of_turn>", "<end_of_turn>"
MARKS = {"<pad>", "<eos>", "<bos>", UNKNOWN, "<mask>", TURN, TURN_END}  # which are no text
BYTE = re.compile("<0x([0-9A-F]{2})>")  # of a character that the vocabulary has not
ALIKE, LIKENESS = 2, 0.75  # how many words are named beside an unknown one, and how like it they are at least
Span = tuple[int, int]


class Tokenizer(Protocol):
    """What every tokenizer offers, whichever file it was read from."""

    data: bytes  # its file's content
    state_key: str  # its name in a checkpoint
    size: int  # ids lie below it
    words: int  # entries of its vocabulary

    def encode(self, text: str) -> list[int]:
        """Token ids, BOS first, neither padded nor cut."""
        ...

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """The same ids, and the characters [begin, end) of the text that each came from; BOS: (0, 0)."""
        ...

    def piece(self, id: int) -> str:
        """The vocabulary entry of an id. Raises IndexError where there is none."""
        ...

    def unknown(self, text: str) -> dict[str, list[str]]:
        """Words that the vocabulary cannot spell, in lower case and in their order, and the words of it like each."""
        ...


def _require_gemma(bos: int | None, pad: int | None) -> None:
    if (bos, pad) != (BOS, PAD):
        raise ValueError(f"not Gemma's tokenizer: BOS and padding are {bos} and {pad} instead of {BOS} and {PAD}")


class SentencePieceTokenizer:
    """Gemma's tokenizer.model. Raises ValueError if it is another model's."""

    state_key = "spiece_model"  # as in ComfyUI's single-file text encoders

    def __init__(self, data: bytes):
        import sentencepiece

        self.data = data
        self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.size = self.words = self._model.get_piece_size()
        _require_gemma(self._model.bos_id(), self._model.pad_id())
        # sentencepiece spells control tokens out letter by letter, tokenizer.json recognises them in the text
        ids = list(range(self._model.get_piece_size()))
        is_control = self._model.is_control(ids)
        special = [i for i in ids if is_control[i] or i == self._model.unk_id()]
        self._special = {self._model.id_to_piece(i): i for i in special}
        self._split = re.compile(f"({'|'.join(map(re.escape, sorted(self._special, key=len, reverse=True)))})")

    def encode(self, text: str) -> list[int]:
        ids = [BOS]
        for part in self._split.split(text):
            ids += [self._special[part]] if part in self._special else self._model.encode(part)
        return ids

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        spans, start = [(0, 0)], 0
        for part in self._split.split(text):
            if part in self._special:
                spans.append((start, start + len(part)))
            else:
                spans += [(start + begin, start + end) for begin, end in self._offsets(part)]
            start += len(part)
        return self.encode(text), spans

    def _offsets(self, part: str) -> list[Span]:
        """The characters of each token; of a character's several bytes, each has all of it."""
        try:  # as of 0.2.3, then before; sentencepiece's stub lists neither
            offsets = self._model.encode(part, out_type="offset_mapping")["offsets"]  # pyright: ignore
        except RuntimeError:
            pieces = self._model.encode(part, out_type="immutable_proto").pieces  # pyright: ignore
            offsets = [(piece.begin, piece.end) for piece in pieces]
        return [(begin, max(end, begin + 1)) for begin, end in offsets]

    def piece(self, id: int) -> str:
        return self._model.id_to_piece(id)

    def unknown(self, text: str) -> dict[str, list[str]]:
        return {}  # what is in no vocabulary is spelt by bytes


class HFTokenizer:
    """Gemma's tokenizer.json. Raises ValueError if it is another model's."""

    state_key = "tokenizer_json"

    def __init__(self, data: bytes):
        import tokenizers  # the library under transformers

        self.data = data
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # tokenizers raises nothing more specific
            raise ValueError(f"damaged tokenizer.json ({error}); download it again") from None
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.size, self.words = 1 + max(vocabulary.values(), default=0), len(vocabulary)
        self._model.no_truncation()
        self._model.no_padding()
        _require_gemma(self._model.token_to_id("<bos>"), self._model.token_to_id("<pad>"))

    def encode(self, text: str) -> list[int]:
        return [BOS, *self._model.encode(text, add_special_tokens=False).ids]

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._model.encode(text, add_special_tokens=False)
        return [BOS, *encoding.ids], [(0, 0), *encoding.offsets]

    def piece(self, id: int) -> str:
        token = self._model.id_to_token(id)
        if token is None:
            raise IndexError(f"the vocabulary has no token {id}")
        return token

    def unknown(self, text: str) -> dict[str, list[str]]:
        encoding = self._model.encode(text, add_special_tokens=False)
        spans = [span for span, token in zip(encoding.offsets, encoding.tokens, strict=True) if token == UNKNOWN]
        words = dict.fromkeys(text[begin:end].lower() for begin, end in spans)
        return {word: difflib.get_close_matches(word, self._model.get_vocab(), ALIKE, LIKENESS) for word in words}


def load_tokenizer(source: str | Path | bytes | Tensor) -> Tokenizer:
    """A tokenizer from a file, a folder, or a file's content as bytes or a uint8 tensor.

    A folder, or its 'tokenizer' subfolder, holds tokenizer.model or tokenizer.json; both give equal ids
    and the first is taken, which loads faster. Raises FileNotFoundError, ValueError.
    """
    if isinstance(source, Tensor):
        source = source.cpu().numpy().tobytes()
    if not isinstance(source, bytes):
        path = Path(source)
        names = ("tokenizer.model", "tokenizer.json")
        candidates = [path, *(path / folder / name for name in names for folder in ("", "tokenizer"))]
        file = next((file for file in candidates if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"no Gemma tokenizer in {path}: put tokenizer.model or tokenizer.json of gemma-2-2b-it there"
            )
        source = file.read_bytes()
    if source.startswith(tuple(disk.MARKS)):
        source = disk.decoded(source).encode()
    return HFTokenizer(source) if source.lstrip()[:1] == b"{" else SentencePieceTokenizer(source)


def tokenizer_state(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The tokenizer as a state-dict entry of uint8, for saving it with the weights; `load_tokenizer` reads it."""
    return {tokenizer.state_key: torch.frombuffer(bytearray(tokenizer.data), dtype=torch.uint8)}


def decode(tokenizer: Tokenizer, ids: Sequence[int], *, marks: bool = False) -> str:
    """The text of tokens, with the marks of turns and ends or without; ids beyond the vocabulary are no text."""
    data = b""
    for piece in (tokenizer.piece(i) for i in ids if i < tokenizer.size):
        if byte := BYTE.fullmatch(piece):
            data += bytes.fromhex(byte[1])
        elif marks or piece not in MARKS:
            data += piece.replace("\u2581", " ").encode()
    return data.decode(errors="replace")
