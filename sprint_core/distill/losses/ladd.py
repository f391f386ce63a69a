"""Latent adversarial distillation, LADD (paper, section 3.2): a critic on the frozen teacher's features.

The student's prediction and a true latent are noised again, the teacher reads both, and small
heads on some of its blocks judge. Only the heads and, in its own phase, the student learn.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...devices import fp32
from ...models.transformer import AroundBlock
from ...trigflow import SIGMA_DATA, T_MAX, add_noise, flow_input, s_from_t
from ..engine.activation_checkpointing import direct
from ..engine.randomness import SampleRandom
from .scm import Proposal
from .transform import per_sample

PUBLISHED_DEPTH, PUBLISHED_BLOCKS = 20, (2, 8, 14, 19)  # where the heads sit on the 1.6B
HEAD_CHANNELS = 128
HEAD_GROUPS = 8  # of its norms


def block_ids(depth: int) -> tuple[int, ...]:
    """The published depth fractions on a trunk of another depth, each block once."""
    return tuple(sorted({round(i * (depth - 1) / (PUBLISHED_DEPTH - 1)) for i in PUBLISHED_BLOCKS}))


class Head(nn.Module):
    """Judges one block's tokens [b, n, c] on their (h, w) grid: logits [b, h, w]."""

    def __init__(self, width: int):
        super().__init__()
        self.inward = nn.Conv2d(width, HEAD_CHANNELS, 1)
        self.norm1 = nn.GroupNorm(HEAD_GROUPS, HEAD_CHANNELS)
        self.around = nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS, 3, padding=1)
        self.norm2 = nn.GroupNorm(HEAD_GROUPS, HEAD_CHANNELS)
        self.outward = nn.Conv2d(HEAD_CHANNELS, 1, 1)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        x = F.leaky_relu(self.norm1(self.inward(rearrange(tokens, "b (h w) c -> b c h w", h=size[0]))), 0.2)
        x = x + F.leaky_relu(self.norm2(self.around(x)), 0.2)
        return self.outward(x)[:, 0]


class Critic(nn.Module):
    """The heads. `forward` runs the frozen teacher and returns all logits, [b, heads * h * w]."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.blocks = block_ids(depth)
        self.heads = nn.ModuleList(Head(width) for _ in self.blocks)

    def forward(
        self,
        teacher: Callable[..., Tensor],
        x_t: Tensor,
        t: Tensor,
        around_block: AroundBlock = direct,
        **conditioning: Tensor,
    ) -> Tensor:
        """teacher: a SanaTransformer; x_t [b, c, h, w] at angles t [b]; conditioning: its caption, mask, guidance.

        around_block runs the teacher's blocks: with or without activation checkpointing.
        """
        features: list[Tensor] = []

        def collect(i: int, run: Callable, x: Tensor, caption: Tensor) -> Tensor:
            x = around_block(i, run, x, caption)
            if i in self.blocks:
                features.append(x)
            return x

        teacher(flow_input(x_t, per_sample(t, x_t)), s_from_t(t), around_block=collect, **conditioning)
        logits = [head(fp32(f), x_t.shape[-2:]).flatten(1) for head, f in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1)


def generator_angles(proposal: Proposal, max_time_share: float, random: SampleRandom) -> Tensor:
    """Angles [b] of the student's own samples: pi/2 with that probability, else from its proposal."""
    t = proposal.draw(random)
    return t.masked_fill(random.uniform() < max_time_share, T_MAX)


def renoise(x0: Tensor, t: Tensor, random: SampleRandom) -> Tensor:
    """Noise x0, of standard deviation sigma_data, to the critic's angles t [b]."""
    z = SIGMA_DATA * random.normal(*x0.shape[1:]).to(x0)
    return add_noise(x0, z, per_sample(t.to(x0), x0))


def critic_loss(real: Tensor, fakes: Sequence[Tensor]) -> Tensor:
    """Hinge: real logits above 1, those of every kind of fake below -1."""
    return F.relu(1 - real).mean() + sum(F.relu(1 + fake).mean() for fake in fakes) / len(fakes)


def generator_loss(fake: Tensor) -> Tensor:
    """What the student minimises to be taken for real."""
    return -fake.mean()
