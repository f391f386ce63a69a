"""What the stages share: transformers that encode their captions, and what the sample grids show."""

import abc
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import sampler
from ...models.gemma import Gemma
from ...models.transformer import SanaTransformer
from ...text.encoder import encode_ids, pad_embeddings
from ...text.prompts import PromptTokenizer
from ..dataset.batch import Captions
from ..dataset.tokenized import TokenizedCaptions

WATCH_SEED = 5000
FRESH_SEED = 0  # initialises what a student has and its teacher has not


Embed = Callable[[Sequence[str]], list[Tensor]]  # captions -> embeddings [n, c] each


class TextConditioned(nn.Module, abc.ABC):
    """A transformer and what encodes captions for it; "" is the caption of unconditional predictions."""

    transformer: SanaTransformer

    def with_transformer(self, transformer: SanaTransformer) -> "TextConditioned":
        """Another transformer with what encodes captions for this one."""
        twin = copy.copy(self)
        twin._modules = {**self._modules, "transformer": transformer}
        return twin

    @abc.abstractmethod
    def encode(self, captions: Captions) -> tuple[Tensor, Tensor]:
        """Caption embeddings [b, n, c] and their mask [b, n]."""

    def encode_empty(self, count: int) -> tuple[Tensor, Tensor]:
        """The same of "", count times."""
        return self.encode([""] * count)


class Captioned(TextConditioned):
    """A transformer with its frozen text encoder, so that both are saved as one; captions are texts or tokens."""

    def __init__(self, transformer: SanaTransformer, gemma: Gemma, prompts: PromptTokenizer):
        super().__init__()
        self.transformer, self.gemma = transformer, gemma
        self.prompts = prompts
        self._empty: dict[object, tuple[Tensor, Tensor]] = {}  # what "" is encoded to, by the weights that did

    @torch.no_grad()
    def encode(self, captions: Captions) -> tuple[Tensor, Tensor]:
        if isinstance(captions, TokenizedCaptions):
            return self.gemma(captions.ids), captions.kept
        device = next(self.gemma.parameters()).device
        rows = encode_ids(self.gemma, [self.prompts.tokens(str(c)) for c in captions], device=device)
        return pad_embeddings(rows)

    @torch.no_grad()
    def encode_empty(self, count: int) -> tuple[Tensor, Tensor]:
        """Encoded once, as long as the weights are the same: tokens on their way to a device make it wait.

        With autocast and without in turn, both are kept: a recorded loss (graphs.py) reads where its own lies.
        """
        weight = self.gemma.model.embed_tokens.weight
        key = (weight.data_ptr(), weight.device, weight._version, torch.is_autocast_enabled(weight.device.type))
        if key not in self._empty:
            self._empty[key] = self.encode([""])
        caption, mask = self._empty[key]
        return caption.expand(count, -1, -1), mask.expand(count, -1)

    def __deepcopy__(self, memo: dict) -> "Captioned":
        """Copies the networks; the tokenizer, which cannot be copied, is shared."""
        transformer, gemma = SanaTransformer(self.transformer.config), Gemma(self.gemma.config)
        for twin, network in ((transformer, self.transformer), (gemma, self.gemma)):
            twin.to(next(network.parameters()))
            twin.load_state_dict(network.state_dict())
        return Captioned(transformer, gemma, self.prompts)


class Embedded(TextConditioned):
    """A transformer whose captions were encoded before, so that `encode` only pads them; or are by `embed`, batch by
    batch: a function, since networks in here would be trained, averaged and saved."""

    def __init__(self, transformer: SanaTransformer, null: Tensor, embed: Embed | None = None):
        super().__init__()
        self.transformer = transformer
        self.null = null  # embedding [n, c] of the empty caption
        self.embed = embed

    def encode(self, captions: Captions) -> tuple[Tensor, Tensor]:
        assert not isinstance(captions, TokenizedCaptions)
        first = next(self.transformer.parameters())
        texts = [caption for caption in captions if isinstance(caption, str) and caption]
        encoded = dict(zip(texts, self.embed(texts), strict=True)) if texts and self.embed else {}
        rows = [encoded.get(caption, self.null) if isinstance(caption, str) else caption for caption in captions]
        return pad_embeddings([row.to(first.device, torch.float32) for row in rows])


CHUNK = 8  # samples at a time, which then need less memory than a step does


@dataclass(frozen=True)
class Watch:
    """How a distillation is watched: what the teacher makes of the first captions in many steps, from the same noise.

    judge: the share that is right of scaled latents of all captions.
    """

    captions: Captions
    shape: tuple[int, ...]  # of a latent
    flow_shift: float
    judge: Callable[[Tensor], float] | None = None

    def noise(self, device: torch.device) -> Tensor:
        """[b, *shape], other than the previews'."""
        return sampler.initial_noise(range(WATCH_SEED, WATCH_SEED + len(self.captions)), self.shape).to(device)


@dataclass(frozen=True)
class Preview:
    """What a sample grid shows: images for some captions, always from the same noise."""

    captions: Sequence
    shape: tuple[int, ...]  # of a latent
    decode: Callable[[Tensor], Tensor]  # scaled latents -> images [b, h, w, 3] in [0, 1]
    hints: Tensor | None = None  # of a ControlNet: scaled latents of its control images
    steps: Sequence[int] = (1,)  # of a student: how many each image takes, one row of images after another

    def noise(self, device: torch.device) -> Tensor:
        """[b, *shape]."""
        return sampler.initial_noise(range(len(self.captions)), self.shape).to(device)
