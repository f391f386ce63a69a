"""Training the demo's text encoder to understand captions, before a teacher learns to paint from it.

SANA's Gemma comes trained on text. An encoder that starts from nothing, with nothing but the teacher's loss,
stays a bag of words for thousands of steps: it knows which colours and shapes are named, not which belong together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.gemma import Gemma
from ...shapes import captions, scenes
from ...text.encoder import encode_ids, pad_embeddings
from ...text.prompts import PromptTokenizer
from ..dataset import scenes as data
from ..engine.randomness import SampleRandom

# What each part of a meaning may be; None is unsaid. A caption names one or two things.
THING = ([None, *scenes.SHAPES], [None, *scenes.COLOURS], [None, *captions.SIZE_WORDS], [None, *captions.PLACES])
PARTS = (*THING, *THING, list(captions.NUMBERS), [None, "left", "above"], [None, *scenes.BACKGROUNDS])


def meaning(caption: str) -> list[int]:
    """What a caption says, as the index in each of PARTS."""
    said = captions.parse(caption)
    values = [getattr(thing, name) for thing in said.things for name in ("shape", "colour", "size", "place")]
    values += [None] * (2 * len(THING) - len(values)) + [said.things[0].count, said.relation, said.background]
    return [part.index(value) for part, value in zip(PARTS, values)]


class Reader(nn.Module):
    """Says of every token what the caption means so far: states [b, n, c] -> a list of logits [b, n, k] per part.

    Where an answer is read in a state is drawn once and stays: heads that learn would find it however faint it is,
    and what is faint escapes the teacher.
    """

    def __init__(self, gemma: Gemma):
        super().__init__()
        self.gemma = gemma
        self.answers = nn.ModuleList(nn.Linear(gemma.config.width, len(part), bias=False) for part in PARTS)
        self.answers.requires_grad_(False)

    def forward(self, states: Tensor) -> list[Tensor]:
        return [answer(states) for answer in self.answers]


class ReaderStage:
    """Cross-entropy of each part at each token. Those of the first words can only guess: attention is causal."""

    name = averaged = "reader"

    def __init__(self, model: Reader, prompts: PromptTokenizer, pool: int):
        self.modules = {self.name: model}
        self.prompts, self.pool, self.settings = prompts, pool, {"pool": str(pool)}

    def phases(self, step: int) -> tuple[str, ...]:
        return (self.name,)

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.modules[self.name]
        device = next(model.parameters()).device
        texts = data.captions(random.integers(self.pool), random)
        meanings = torch.tensor([meaning(caption) for caption in texts], device=device)
        rows = encode_ids(model.gemma, [self.prompts.tokens(caption) for caption in texts], device=device)
        states, read = pad_embeddings(rows)
        shares = read / read.sum(1, keepdim=True) / len(read)  # each caption counts once, each of its tokens as much
        last = (read.sum(1) - 1)[:, None, None]
        total, right = states.new_zeros(()), []
        for logits, target in zip(model(states), meanings.unbind(1)):
            everywhere = target[:, None].expand(read.shape)
            total = total + (F.cross_entropy(logits.mT, everywhere, reduction="none") * shares).sum()
            right.append(logits.argmax(-1, keepdim=True).gather(1, last)[:, 0, 0] == target)
        return total, {"right": torch.stack(right).all(0).float().mean()}

    def samples(self, average: Reader) -> None:
        """Nothing to see."""
