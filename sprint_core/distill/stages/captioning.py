"""Pre-training of a small text encoder by captioning questions, before a teacher learns to paint from it.

SANA's Gemma comes trained on text. An encoder that starts from nothing, with nothing but the teacher's loss,
stays a bag of words for thousands of steps: it knows which colours and shapes are named, not which belong together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.gemma import Gemma
from ...shapes import captions, scenes
from ...text.encoder import encode_ids, pad_embeddings
from ...text.prompts import PromptTokenizer
from ...text.tokenizers import PAD
from ..dataset import scenes as scene_dataset
from ..engine.randomness import SampleRandom
from ..engine.stage import Stage

# A question about a caption is the list of its possible labels; None: the caption does not say. A caption names one
# or two things, and of each its shape, colour, size and place.
THING = ([None, *scenes.SHAPES], [None, *scenes.COLOURS], [None, *captions.SIZE_WORDS], [None, *captions.PLACES])
QUESTIONS = (*THING, *THING, list(captions.NUMBERS), [None, "left", "above"], [None, *scenes.BACKGROUNDS])


def labels(caption: str) -> list[int]:
    """What a caption says: for each of QUESTIONS the index of its label."""
    meaning = captions.parse(caption)
    values = [getattr(thing, name) for thing in meaning.things for name in ("shape", "colour", "size", "place")]
    values += [None] * (2 * len(THING) - len(values))
    values += [meaning.things[0].count, meaning.relation, meaning.background]
    return [question.index(value) for question, value in zip(QUESTIONS, values, strict=True)]


class CaptioningModel(nn.Module):
    """A text encoder with a head per question: states [b, n, c] -> a list of logits [b, n, labels].

    The heads are drawn once and stay. Heads that learn would find a label in a state however faint it is there, and
    what is faint escapes the teacher.
    """

    def __init__(self, gemma: Gemma, questions: Sequence[Sequence] = QUESTIONS):
        super().__init__()
        self.gemma = gemma
        self.heads = nn.ModuleList(nn.Linear(gemma.config.width, len(question), bias=False) for question in questions)
        self.heads.requires_grad_(False)

    def forward(self, states: Tensor) -> list[Tensor]:
        return [head(states) for head in self.heads]


def answer_loss(answers: Sequence[Tensor], mask: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the answers at each token, and the share of captions that are all right at their last one.

    answers: logits [b, n, labels] of each question; mask: [b, n], true for a caption's tokens; targets: [b, questions].
    """
    shares = mask / mask.sum(1, keepdim=True) / len(mask)  # captions count alike, and in each one its tokens
    last = (mask.sum(1) - 1)[:, None, None]
    total, right = shares.new_zeros(()), []
    for logits, target in zip(answers, targets.unbind(1), strict=True):
        everywhere = target[:, None].expand(mask.shape)
        total = total + (F.cross_entropy(logits.float().mT, everywhere, reduction="none") * shares).sum()
        right.append(logits.argmax(-1, keepdim=True).gather(1, last)[:, 0, 0] == target)
    return total, {"right": torch.stack(right).all(0).float().mean()}


class CaptioningStage(Stage[CaptioningModel]):
    """Cross-entropy of each label at each token. The first tokens can only guess, because the mask is causal."""

    name = averaged = "captioning"

    def __init__(self, model: CaptioningModel, prompts: PromptTokenizer, pool: int):
        super().__init__({self.name: model}, {"pool": str(pool)})
        self.model = model
        self.prompts = prompts
        self.pool = pool

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        texts = scene_dataset.captions(random.integers(self.pool).tolist(), random)
        targets = torch.tensor([labels(caption) for caption in texts], device=self.device)
        tokens = [self.prompts.tokens(caption) for caption in texts]
        states, mask = pad_embeddings(encode_ids(self.model.gemma, tokens, device=self.device))
        return answer_loss(self.model(states), mask, targets)


class TokenCaptioningStage(Stage[CaptioningModel]):
    """The same from captions that are tokens already, with their labels, where the network is.

    tokens [n, t], padded with PAD; labels [n, questions].
    """

    name = averaged = "captioning"

    def __init__(self, model: CaptioningModel, tokens: Tensor, labels: Tensor, fingerprint: str):
        super().__init__({self.name: model}, {"captions": fingerprint})
        self.model, self.tokens, self.labels = model, tokens, labels

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.as_tensor(random.integers(len(self.tokens)), device=self.tokens.device)
        ids, targets = (rows[chosen].to(self.device, torch.long) for rows in (self.tokens, self.labels))
        mask = ids != PAD
        states = self.model.gemma(ids)
        return answer_loss(self.model(states), mask, targets)
