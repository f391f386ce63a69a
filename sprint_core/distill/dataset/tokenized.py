"""Captions that were tokenized before, as tensors on the training's device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...text.prompts import PromptTokenizer
from ...text.tokenizers import PAD


@dataclass(frozen=True)
class TokenizedCaptions:
    """b captions as tensors on one device, and the empty caption, by which any of them may be replaced.

    ids: [b, n], padded on the right. kept: [b, n], true for what the transformer reads, which is neither padding nor
    the instruction's own. null: the empty caption's ids and kept, each [n].
    """

    ids: Tensor
    kept: Tensor
    null: tuple[Tensor, Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> "TokenizedCaptions":
        """Those of these numbers [b]."""
        return TokenizedCaptions(self.ids[rows], self.kept[rows], self.null)

    def without(self, dropped: Tensor) -> "TokenizedCaptions":
        """With the empty caption where dropped [b] is true."""
        ids, kept = (
            torch.where(dropped[:, None], *pair) for pair in zip(self.null, (self.ids, self.kept), strict=True)
        )
        return TokenizedCaptions(ids, kept, self.null)

    def to(self, device: torch.device) -> "TokenizedCaptions":
        """The same on another device."""
        empty, kept = (one.to(device) for one in self.null)
        return TokenizedCaptions(self.ids.to(device), self.kept.to(device), (empty, kept))


def tokenize(prompts: PromptTokenizer, captions: Sequence[str]) -> TokenizedCaptions:
    """On the CPU; n is the longest caption's number of tokens."""
    rows = [prompts.tokens(caption) for caption in ("", *captions)]
    ids = torch.full((len(rows), max(len(row.ids) for row in rows)), PAD)
    kept = torch.zeros(ids.shape, dtype=torch.bool)
    for row, ids_of_row, kept_of_row in zip(rows, ids, kept, strict=True):
        ids_of_row[: len(row.ids)] = torch.tensor(row.ids)
        kept_of_row[row.keep] = True
    return TokenizedCaptions(ids[1:], kept[1:], (ids[0], kept[0]))
