"""From prompts to text embeddings: formats, tokenizers, token selection, and the encoder's prefix cache.

SANA was trained with an instruction in front of each prompt and reads only some of the tokens. Of
instruction + prompt, tokenised as one string, padded or cut to C + max_tokens - 2 tokens (C counts the
instruction's, BOS included), it reads the first and the last max_tokens - 1. Without the padding that is
BOS and everything from position C - 1 on: the instruction's last token, whose space usually fuses with
the prompt's first word, then the prompt. So the tokens before C - 1 are the same for all prompts, and
are only needed as context: their keys and values are computed once (`PrefixCache`).
Padding is dropped rather than masked, which is exact: masked tokens get no weight in the transformer.
"""

import functools
import json
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import check_numbers
from ..models.gemma import Gemma
from ..weights import tensorfile

PAD, BOS = 0, 2  # Gemma's ids
LOWER_CASE = {"nvlabs": False, "diffusers": True}  # prompt formats; both strip, and their instructions differ


# --- prompt formats -------------------------------------------------------------------------------


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

    max_tokens: most tokens that the transformer reads, BOS included.
    """

    instruction: str | None
    max_tokens: int = 300
    lower: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.max_tokens < 2 or not isinstance(self.instruction, str | None):
            raise ValueError(f"{self.max_tokens} tokens after the instruction {self.instruction!r}")

    def full_text(self, prompt: str) -> str:
        prompt = prompt.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
        prompt = (prompt.lower() if self.lower else prompt).strip()
        return (self.instruction or "") + prompt


def text_preset(format: str = "nvlabs") -> TextPreset:
    """The preset of a published prompt format; dataclasses.replace varies it. Raises ValueError."""
    return TextPreset(load_instruction(format), lower=LOWER_CASE[format])


# --- tokenizers -----------------------------------------------------------------------------------


Span = tuple[int, int]


class Tokenizer(Protocol):
    """What the rest needs of a tokenizer. `data` is its file's content, `state_key` its name in a checkpoint."""

    data: bytes
    state_key: str
    size: int  # ids lie below it

    def encode(self, text: str) -> list[int]:
        """Token ids, BOS first, neither padded nor cut."""

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """The same ids, and the characters [begin, end) of the text that each came from; BOS: (0, 0)."""

    def piece(self, id: int) -> str:
        """The vocabulary entry of an id."""


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
        self.size = self._model.get_piece_size()
        _require_gemma(self._model.bos_id(), self._model.pad_id())
        # sentencepiece spells control tokens out letter by letter, tokenizer.json recognises them in the text
        ids = list(range(self._model.get_piece_size()))
        special = [i for i, control in zip(ids, self._model.is_control(ids)) if control or i == self._model.unk_id()]
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
                pieces = self._model.encode(part, out_type="immutable_proto").pieces
                spans += [(start + piece.begin, start + piece.end) for piece in pieces]
            start += len(part)
        return self.encode(text), spans

    def piece(self, id: int) -> str:
        return self._model.id_to_piece(id)


class HFTokenizer:
    """Gemma's tokenizer.json. Raises ValueError if it is another model's."""

    state_key = "tokenizer_json"

    def __init__(self, data: bytes):
        import tokenizers  # what transformers runs underneath

        self.data = data
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # tokenizers raises nothing more specific
            raise ValueError(f"damaged tokenizer.json ({error}); download it again") from None
        self.size = 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=0)
        self._model.no_truncation()
        self._model.no_padding()
        _require_gemma(self._model.token_to_id("<bos>"), self._model.token_to_id("<pad>"))

    def encode(self, text: str) -> list[int]:
        return [BOS, *self._model.encode(text, add_special_tokens=False).ids]

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._model.encode(text, add_special_tokens=False)
        return [BOS, *encoding.ids], [(0, 0), *encoding.offsets]

    def piece(self, id: int) -> str:
        return self._model.id_to_token(id)


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
        found = next((file for file in candidates if file.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"no Gemma tokenizer in {path}: put tokenizer.model or tokenizer.json of gemma-2-2b-it there"
            )
        source = found.read_bytes()
    return HFTokenizer(source) if source.lstrip()[:1] == b"{" else SentencePieceTokenizer(source)


def tokenizer_state(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The tokenizer as a state-dict entry of uint8, for saving it with the weights; `load_tokenizer` reads it."""
    return {tokenizer.state_key: torch.frombuffer(bytearray(tokenizer.data), dtype=torch.uint8)}


# --- text to ids ----------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """What Gemma reads, `ids`, and the positions in it that the transformer reads, `keep` (ascending)."""

    ids: list[int]
    keep: list[int]


def select_tokens(ids: Sequence[int], instruction_tokens: int, max_tokens: int) -> Tokens:
    """Cuts ids (BOS first, unpadded) to the trained length and selects [0] + the last max_tokens - 1 of it.

    instruction_tokens: C, with BOS; 0 without an instruction, where the length is max_tokens.
    """
    limit = instruction_tokens + max_tokens - 2 if instruction_tokens else max_tokens
    ids = list(ids[:limit])
    return Tokens(ids, [0, *range(limit - max_tokens + 1, len(ids))])


class PromptTokenizer:
    """A tokenizer with a preset. `prefix_ids`: the tokens before C - 1 that prompts have in common."""

    def __init__(self, tokenizer: Tokenizer, preset: TextPreset):
        self.tokenizer, self.preset = tokenizer, preset
        self.instruction_ids = tokenizer.encode(preset.instruction) if preset.instruction else []
        self.prefix_ids = tuple(self.instruction_ids[:-1])

    def tokens(self, prompt: str) -> Tokens:
        ids = self.tokenizer.encode(self.preset.full_text(prompt))
        return select_tokens(ids, len(self.instruction_ids), self.preset.max_tokens)

    def tokens_and_spans(self, prompt: str) -> tuple[Tokens, list[Span | None]]:
        """The tokens, and the characters of the prompt as given that each of `ids` came from.

        None for BOS and the instruction. (Lower-casing is taken to keep every character's place.)
        """
        ids, spans = self.tokenizer.encode_spans(self.preset.full_text(prompt))
        tokens = select_tokens(ids, len(self.instruction_ids), self.preset.max_tokens)
        start = len(self.preset.instruction or "") - (len(prompt) - len(prompt.lstrip()))
        moved = [(max(begin - start, 0), end - start) for begin, end in spans]
        return tokens, [span if span[1] > span[0] else None for span in moved[: len(tokens.ids)]]


# --- ids to embeddings ----------------------------------------------------------------------------


class Recent:
    """The values that were asked for most recently."""

    def __init__(self, slots: int):
        self.slots = slots
        self._entries: dict[Hashable, Any] = {}

    def get(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        entry = self._entries.pop(key) if key in self._entries else compute()
        self._entries[key] = entry
        while len(self._entries) > self.slots:
            del self._entries[next(iter(self._entries))]
        return entry

    def clear(self) -> None:
        self._entries.clear()


class EncoderCache:
    """What need not be computed twice. Keys must change with the weights.

    prefixes: states of the constant instruction, some 20 MiB each in bf16; texts: embeddings of whole batches, at
    most 1.4 MiB a prompt. (Of batches, since a text among others is rounded differently than alone.)
    """

    def __init__(self) -> None:
        self.prefixes, self.texts = Recent(2), Recent(32)

    def clear(self) -> None:
        self.prefixes.clear()
        self.texts.clear()


def encode_ids(
    gemma: Gemma,
    batch: Sequence[Tokens],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    layer: int = -1,
    prefix_ids: Sequence[int] = (),
    cache: EncoderCache | None = None,
    key: Hashable = None,
) -> list[Tensor]:
    """The kept hidden states of each text: list of [len(keep), width], without padding.

    dtype, layer: see `Gemma`. With a cache, a batch that was encoded before is not encoded again, and texts that
    all start with `prefix_ids` share its states. key: identifies the weights (device, dtype and so on are added).
    """
    names = [(tuple(t.ids), tuple(t.keep)) for t in batch]
    unique = dict(zip(names, batch))
    run = functools.partial(_encode_ids, gemma, list(unique.values()), device, dtype, layer)
    if cache is None:
        rows = run((), None, None)
    else:
        how = (key, str(device), dtype, layer, tuple(prefix_ids))
        rows = cache.texts.get((how, tuple(unique)), lambda: run(prefix_ids, cache.prefixes, how))
    found = dict(zip(unique, rows))
    return [found[name].clone() for name in names]  # whoever changes one changes neither the cache nor another


def _encode_ids(gemma, batch, device, dtype, layer, prefix_ids, prefixes: Recent | None, key: Hashable) -> list[Tensor]:
    p = len(prefix_ids)
    shared = p and all(len(t.ids) > p and t.ids[:p] == list(prefix_ids) for t in batch)
    prefix = None
    if shared:
        ids = torch.tensor([list(prefix_ids)], device=device)
        prefix = prefixes.get(key, lambda: gemma.prefill(ids, layer=layer, dtype=dtype))
    rest = [torch.tensor(t.ids[p:] if shared else t.ids) for t in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rest, batch_first=True, padding_value=PAD).to(device)
    hidden = gemma(ids, prefix=prefix, layer=layer, dtype=dtype)
    if prefix is not None:
        hidden = torch.cat([prefix.hidden.expand(len(hidden), -1, -1), hidden], dim=1)
    return [h[torch.tensor(t.keep, device=h.device)] for h, t in zip(hidden, batch)]


def pad_embeddings(rows: Sequence[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows [n_i, width] as one batch [b, length, width], zero-padded, and its mask [b, length], true for real tokens.

    length: the longest row's if None. Raises ValueError if a row is longer.
    """
    longest = max(map(len, rows))
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a text of {longest} tokens does not fit into {length}")
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    padded = torch.nn.functional.pad(padded, (0, 0, 0, length - longest))
    counts = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(length, device=padded.device) < counts[:, None]


def _unmap(layer: torch.nn.Module, *_: Any) -> None:
    tensorfile.unmap(layer.parameters())


class TextEncoder:
    """Prompts to embeddings outside any host: Gemma, a tokenizer and a preset.

    After changing Gemma's weights in place call `cache.clear()`. A prompt needs each layer once, and together they
    outweigh every other part of a model, so layers that lie in a mapped file are unmapped as soon as they have run.
    """

    def __init__(self, gemma: Gemma, tokenizer: Tokenizer, preset: TextPreset):
        self.gemma = gemma
        for layer in gemma.model.layers:
            layer.register_forward_hook(_unmap)
        self.prompts = PromptTokenizer(tokenizer, preset)
        self.cache = EncoderCache()

    def tokens(self, prompt: str) -> Tokens:
        return self.prompts.tokens(prompt)

    @torch.no_grad()  # the encoder is frozen, and a cached prefix must not keep a graph alive
    def encode(self, prompts: Sequence[str], *, layer: int = -1) -> list[Tensor]:
        """One [n_i, width] tensor per prompt, n_i <= max_tokens; `pad_embeddings` makes a batch of them."""
        options: dict[str, Any] = {"prefix_ids": self.prompts.prefix_ids, "cache": self.cache, "layer": layer}
        device = next(self.gemma.parameters()).device
        return encode_ids(self.gemma, [self.tokens(prompt) for prompt in prompts], device=device, **options)
