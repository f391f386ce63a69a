"""Tokens to prompt embeddings: Gemma's hidden states of the kept tokens, and a cache of them.

The tokens in front of every prompt are the same, so that their keys and values are computed once and cached; so are
the embeddings of whole batches. Padding is dropped rather than masked, which is exact: masked tokens get no weight in
the transformer.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..models.gemma import Gemma, KVPrefix
from ..weights import tensorfile
from .formats import TextPreset
from .prompts import PromptTokenizer, Tokens
from .tokenizers import PAD, Tokenizer

Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """The `slots` values that were used most recently, by their keys."""

    def __init__(self, slots: int):
        self.slots = slots
        self._entries: dict[Hashable, Value] = {}

    def get(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of this key, computed where it is not cached; the value used least recently makes room."""
        value = self._entries.pop(key) if key in self._entries else compute()
        self._entries[key] = value
        while len(self._entries) > self.slots:
            del self._entries[next(iter(self._entries))]
        return value

    def clear(self) -> None:
        """Forget all values."""
        self._entries.clear()


class PromptEmbeddingCache:
    """Embeddings of prompts and states of their instruction, so that none is computed twice.

    prefixes: states of the constant instruction, some 20 MiB each in bf16; embeddings: of whole batches, at most
    1.4 MiB a prompt. (Of batches, since a text among others is rounded differently than alone.) Keys must change with
    the weights.
    """

    def __init__(self) -> None:
        self.prefixes: LRUCache[KVPrefix] = LRUCache(2)
        self.embeddings: LRUCache[list[Tensor]] = LRUCache(32)

    def clear(self) -> None:
        """Forget everything, as after a change of the weights."""
        self.prefixes.clear()
        self.embeddings.clear()


def encode_ids(
    gemma: Gemma,
    batch: Sequence[Tokens],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    layer: int = -1,
    prefix_ids: Sequence[int] = (),
    cache: PromptEmbeddingCache | None = None,
    key: Hashable = None,
) -> list[Tensor]:
    """The kept hidden states of each text: list of [len(keep), width], without padding, in the order of `batch`.

    dtype, layer: see `Gemma`. With a cache, a batch that was encoded before is not encoded again, and texts that
    all start with `prefix_ids` share its states. key: names the weights in the cache (device, dtype and so on are
    added). Raises ValueError as `Gemma` does.
    """
    names = [(tuple(tokens.ids), tuple(tokens.keep)) for tokens in batch]
    unique = dict(zip(names, batch, strict=True))
    texts = list(unique.values())
    if cache is None:
        rows = _encode(gemma, texts, None, device, dtype, layer)
    else:
        cache_key = (key, str(device), dtype, layer, tuple(prefix_ids))

        def prefill() -> KVPrefix:
            return gemma.prefill(torch.tensor([list(prefix_ids)], device=device), layer=layer, dtype=dtype)

        def encode() -> list[Tensor]:
            shared = bool(prefix_ids) and all(_starts_with(tokens.ids, prefix_ids) for tokens in texts)
            prefix = cache.prefixes.get(cache_key, prefill) if shared else None
            return _encode(gemma, texts, prefix, device, dtype, layer)

        rows = cache.embeddings.get((cache_key, tuple(unique)), encode)
    embeddings = dict(zip(unique, rows, strict=True))
    return [embeddings[name].clone() for name in names]  # a caller may change one, and neither the cache nor another


def _starts_with(ids: Sequence[int], prefix_ids: Sequence[int]) -> bool:
    """Whether ids are prefix_ids and at least one more."""
    return len(ids) > len(prefix_ids) and list(ids[: len(prefix_ids)]) == list(prefix_ids)


def _encode(
    gemma: Gemma,
    batch: Sequence[Tokens],
    prefix: KVPrefix | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
    layer: int,
) -> list[Tensor]:
    """The kept states of texts that all start with `prefix`, which is not computed again."""
    start = 0 if prefix is None else len(prefix.ids)
    ids = [torch.tensor(tokens.ids[start:]) for tokens in batch]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD).to(device)
    hidden = gemma(padded, prefix=prefix, layer=layer, dtype=dtype)
    if prefix is not None:
        hidden = torch.cat([prefix.hidden.expand(len(hidden), -1, -1), hidden], dim=1)
    keeps = [torch.tensor(tokens.keep, device=hidden.device) for tokens in batch]
    return [states[keep] for states, keep in zip(hidden, keeps, strict=True)]


def pad_embeddings(rows: Sequence[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows [n_i, width] as one batch [b, length, width], zero-padded, and its mask [b, length], true but for padding.

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


def _unmap(layer: torch.nn.Module, *_: object) -> None:
    tensorfile.unmap(layer.parameters())


class TextEncoder:
    """Prompts to embeddings outside any host: Gemma, a tokenizer and a preset.

    After changing Gemma's weights in place call `cache.clear()`. A prompt needs each layer once, and the layers
    outweigh every other part of a model, so those that lie in a mapped file are unmapped as soon as they have run.
    """

    def __init__(self, gemma: Gemma, tokenizer: Tokenizer, preset: TextPreset):
        self.gemma = gemma
        for layer in gemma.model.layers:
            layer.register_forward_hook(_unmap)
        self.prompts = PromptTokenizer(tokenizer, preset)
        self.cache = PromptEmbeddingCache()

    def tokens(self, prompt: str) -> Tokens:
        """What Gemma reads for a prompt, and which of it the transformer reads."""
        return self.prompts.tokens(prompt)

    def notice(self, prompt: str) -> str:
        """A sentence that names what of a prompt the model does not know or not read; '' where there is nothing."""
        return self.prompts.notice(prompt)

    @torch.no_grad()  # the encoder is frozen, and a cached prefix must not keep a graph alive
    def encode(self, prompts: Sequence[str], *, layer: int = -1) -> list[Tensor]:
        """One [n_i, width] tensor per prompt, n_i <= max_tokens; `pad_embeddings` makes a batch of them.

        layer: see `Gemma.forward`. Raises ValueError as it does.
        """
        return encode_ids(
            self.gemma,
            [self.tokens(prompt) for prompt in prompts],
            device=next(self.gemma.parameters()).device,
            layer=layer,
            prefix_ids=self.prompts.prefix_ids,
            cache=self.cache,
        )
