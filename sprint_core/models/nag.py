"""Normalized attention guidance (NAG, arXiv 2505.21179): negative prompts for models without classifier-free guidance.

Of each cross-attention, z_pos is what the image reads in the prompt and z_neg, for the same queries, what it reads in
the negative prompt. In the place of z_pos goes on, before the output projection:

    (1) z = z_pos + (scale - 1) (z_pos - z_neg)            scale - 1 is the paper's phi
    (2) z' = min(1, tau / r) z,  r = |z|_1 / |z_pos|_1     per image token, over the channels of all heads
    (3) alpha z' + (1 - alpha) z_pos

Keys and values belong to one token each. So both prompts pass through the blocks as one caption, which the attention
that they call splits: no block knows of it, and it costs one more attention in each rather than a second pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import trigflow
from ..devices import fp32
from .layers import Attention, run_in_blocks

MAX_SCALE, MAX_TAU = 50.0, 10.0  # those of ComfyUI's own node
TINY = 1e-12  # in place of the norm of zeros


@dataclass(frozen=True)
class NAG:
    """How strongly to avoid a negative prompt, and when. The defaults are the paper's for SANA (its Table 5).

    scale: 1 is no guidance; alpha: share of the guided output in [0, 1]; tau: at least 1, the largest growth of a
    token's L1 norm; start, end: shares in [0, 1] of the way from noise to image, as of a ControlNet. Raises ValueError.
    """

    scale: float = 3.0
    alpha: float = 0.5
    tau: float = 2.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        ranges = {"scale": (1, MAX_SCALE), "alpha": (0, 1), "tau": (1, MAX_TAU)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"the negative prompt's {name} is {value:g}; it must lie in {least} to {most:g}")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"the negative prompt from {self.start:g} to {self.end:g}: start must not exceed end, and both lie in "
                "0 to 1"
            )

    @property
    def idle(self) -> bool:
        """Whether the output is z_pos itself."""
        return self.scale == 1 or self.alpha == 0

    def acts_at(self, s: Tensor) -> bool:
        """Whether it acts at flow time s, an fp32 scalar on the CPU."""
        return trigflow.acts_at(s, self.start, self.end)

    def combine(self, z_pos: Tensor, z_neg: Tensor) -> Tensor:
        """(1) to (3), in fp32: both [b, n, c] -> [b, n, c] in z_pos's dtype; z_pos may be overwritten."""
        return run_in_blocks(self._combine, z_pos, z_neg)

    def _combine(self, z_pos: Tensor, z_neg: Tensor) -> Tensor:
        dtype, z_pos, z_neg = z_pos.dtype, fp32(z_pos), fp32(z_neg)
        z = z_pos + (self.scale - 1) * (z_pos - z_neg)
        norm, most = (y.abs().sum(-1, keepdim=True) for y in (z, self.tau * z_pos))
        z = z * (most / norm.clamp(min=TINY)).clamp(max=1)
        return torch.lerp(z_pos, z, self.alpha).to(dtype)

    def around(self, attention: Attention, tokens: int) -> Attention:
        """The attention for captions of `join`, whose first `tokens` tokens are the prompt's."""

        def guided(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
            z_pos, z_neg = (  # a copy of the mask, since kernels want it aligned
                attention(q, k[:, part], v[:, part], heads, None if mask is None else mask[..., part].clone())
                for part in (slice(tokens), slice(tokens, None))
            )
            return self.combine(z_pos, z_neg)

        return guided


def join(
    caption: Tensor, mask: Tensor | None, negative: Tensor, negative_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Prompt and negative prompt as one caption [b, m + k, c], and its mask [b, m + k], None where neither has one.

    caption: [b, m, c]; mask: [b, m], 1 = keep; negative: [b or 1, k, c]; negative_mask: [b or 1, k].
    """
    both = torch.cat([caption, negative.to(caption).expand(len(caption), -1, -1)], dim=1)
    if mask is None and negative_mask is None:
        return both, None
    ones = caption.new_ones(both.shape[:2])
    masks = (ones[:, : caption.shape[1]], mask), (ones[:, caption.shape[1] :], negative_mask)
    return both, torch.cat([one if kept is None else kept.to(one).expand_as(one) for one, kept in masks], dim=1)
