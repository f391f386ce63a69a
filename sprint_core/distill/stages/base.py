"""What the stages share: what they ask of their data and text encoder, and what their sample grids show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ... import sampler
from ...models.gemma import Gemma
from ...models.transformer import SanaTransformer
from ...text.encoder import encode_ids, pad_embeddings
from ...text.prompts import PromptTokenizer
from ..engine.randomness import SampleRandom

FRESH_SEED = 0  # of what a student has and its teacher has not


class Data(Protocol):
    """Scaled latents and captions: texts, or their embeddings [n, c] where they were encoded before."""

    identity: str  # of what encoded them

    def batch(self, random: SampleRandom) -> tuple[Tensor, list]:
        """Latents [b, 32, h, w] and b captions."""


class Encoding(Protocol):
    """A transformer and what encodes captions for it; "" is the caption of unguided predictions."""

    transformer: SanaTransformer

    def encode(self, captions: Sequence) -> tuple[Tensor, Tensor]:
        """Caption embeddings [b, n, c] and their mask [b, n]."""


@dataclass(frozen=True)
class Preview:
    """What a stage shows of itself: pictures for some captions, always from the same noise."""

    captions: Sequence
    shape: tuple[int, ...]  # of a latent
    decode: Callable[[Tensor], Tensor]  # scaled latents -> images [b, h, w, 3] in [0, 1]
    hints: Tensor | None = None  # of a ControlNet: scaled latents of its control images

    def noise(self, device: torch.device) -> Tensor:
        """[b, *shape]."""
        return sampler.initial_noise(range(len(self.captions)), self.shape).to(device)


class Captioned(nn.Module):
    """A transformer with its text encoder, so that both are saved as one."""

    def __init__(self, transformer: SanaTransformer, gemma: Gemma, prompts: PromptTokenizer):
        super().__init__()
        self.transformer, self.gemma = transformer, gemma
        self.prompts = prompts

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Caption embeddings [b, n, c] and their mask [b, n]."""
        device = next(self.gemma.parameters()).device
        rows = encode_ids(self.gemma, [self.prompts.tokens(c) for c in captions], device=device)
        return pad_embeddings(rows)

    def __deepcopy__(self, memo: dict) -> "Captioned":
        """Copies the networks; the tokenizer, which cannot be copied, is shared."""
        networks = (self.transformer, self.gemma)
        twins = [type(m)(m.config).to(next(m.parameters())) for m in networks]
        for twin, network in zip(twins, networks):
            twin.load_state_dict(network.state_dict())
        return Captioned(*twins, self.prompts)
