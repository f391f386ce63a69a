"""Tokens to text embeddings: Gemma's hidden states of the kept tokens, and what need not be computed twice.

The tokens in front of every prompt are the same, so their keys and values are computed once (EncoderCache).
Padding is dropped rather than masked, which is exact: masked tokens get no weight in the transformer.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.gemma import Gemma
from ..weights import tensorfile
from .formats import TextPreset
from .prompts import PromptTokenizer, Tokens
from .tokenizers import PAD, Tokenizer


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
