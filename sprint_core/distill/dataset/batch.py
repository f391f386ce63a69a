"""What every dataset of latents gives to a stage, and how datasets are told apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ...weights import tensorfile
from ..engine.randomness import SampleRandom
from .tokenized import TokenizedCaptions

Captions = Sequence[str] | Sequence[Tensor] | TokenizedCaptions


def without(captions: Captions, dropped: Tensor) -> Captions:
    """The same with the empty caption where dropped [b] is true."""
    if isinstance(captions, TokenizedCaptions):
        return captions.without(dropped)
    return ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]  # type: ignore


@dataclass(frozen=True)
class Batch:
    """Scaled latents [b, 32, h, w] in fp32 with b captions: texts, tokens, or embeddings [n, c] if encoded before."""

    latents: Tensor
    captions: Captions
    hints: Tensor | None = None  # of a ControlNet: scaled latents of the control images, as `latents`


class Dataset(Protocol):
    """Where batches come from."""

    @property
    def fingerprint(self) -> str:
        """What the latents are and which networks encoded them: another fingerprint makes another run."""
        ...

    def batch(self, random: SampleRandom) -> Batch:
        """As many samples as `random` has, drawn by it."""
        ...


def weights_fingerprint(model: nn.Module) -> str:
    """Tells networks apart by their weights."""
    return tensorfile.hash_of(model.state_dict())
