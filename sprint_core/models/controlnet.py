"""SANA's ControlNet (arXiv 2410.10629; 2503.09641, section 3.3): copied blocks that steer a trunk by an image.

The hint is the latent of a control image, of edges, from the same auto-encoder as all latents. A branch of copies of
the trunk's first blocks reads it beside the noisy latent; each copy ends in a projection, zero before training, whose
output, a residual, is added to the trunk. Two wirings of the same weights are published:

    authors    the branch starts from the output of trunk block 0, of which it keeps a frozen copy;
               residual k is added before trunk block k + 1
    diffusers  the branch starts from its own patch embedding; residual k is added after trunk block k + 1

Weights were trained in the authors' wiring, so that is the better one wherever block 0 is at hand.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from ..config import Depth, PositiveNumber
from .layers import Attention, sdpa
from .transformer import AroundBlock, SanaBlock, SanaInputs, SanaTransformer, TransformerConfig, run_block

AUTHORS: Final = "authors"
DIFFUSERS: Final = "diffusers"
WIRINGS = (AUTHORS, DIFFUSERS)
PUBLISHED_BLOCKS = 7
MAX_STRENGTH = 10.0  # ComfyUI's own limit
SHARED = ("patch_embed.", "time_embed.", "caption_projection.", "caption_norm.", "base_block.")  # with the trunk
OWN = ("input_block.", "controlnet_blocks.")  # modules that only the branch has
TRUNK_TIME_SCALE = 1000.0  # the published ControlNets belong to SANA 1.0, which embeds 1000 s


@dataclass(frozen=True)
class ControlNetConfig(TransformerConfig):
    """A branch of `depth` blocks; the other fields but `wiring` are those of the trunk that it was copied from.

    Raises ValueError on fields that describe no branch.
    """

    depth: Depth = PUBLISHED_BLOCKS
    qk_norm: bool = False
    guidance_embed: bool = False
    time_scale: PositiveNumber = TRUNK_TIME_SCALE
    wiring: Literal["authors", "diffusers"] = AUTHORS


class SanaControlNet(SanaInputs):
    """The branch. Modules are named like diffusers' SanaControlNetModel; base_block is the authors' frozen block 0."""

    config: ControlNetConfig

    def __init__(
        self,
        config: ControlNetConfig,
        *,
        ops: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        factory = {"dtype": dtype, "device": device}
        super().__init__(config, ops, **factory)
        width = config.width
        self.base_block = SanaBlock(config, ops, **factory) if config.wiring == AUTHORS else None
        self.input_block = ops.Linear(width, width, **factory)
        self.transformer_blocks = nn.ModuleList(SanaBlock(config, ops, **factory) for _ in range(config.depth))
        self.controlnet_blocks = nn.ModuleList(ops.Linear(width, width, **factory) for _ in range(config.depth))

    def forward(
        self,
        x_s: Tensor,
        s: Tensor,
        caption: Tensor,
        hint: Tensor,
        guidance: Tensor | None = None,
        mask: Tensor | None = None,
        attention: Attention = sdpa,
        around_block: AroundBlock | None = None,
    ) -> list[Tensor | None]:
        """Residuals [b, h*w, c] for SanaTransformer's `control`: entry i is added after block i.

        hint: [b or 1, 32, h, w], scaled latent of the control image; the rest as the trunk takes it.
        Raises ValueError when hint and latent do not fit, and as the trunk does.
        """
        if hint.shape[1:] != x_s.shape[1:] or hint.shape[0] not in (1, x_s.shape[0]):
            raise ValueError(f"the control image's latent is {list(hint.shape)}, the image's {list(x_s.shape)}")
        conditioning = self.embed_conditioning(x_s, s, caption, guidance, mask, attention)
        x = self.patch_embed(x_s)
        if self.base_block is not None:
            x = self.base_block(x, conditioning.caption, conditioning)
        x = x + self.input_block(self.patch_embed(hint))
        residuals: list[Tensor | None] = [] if self.config.wiring == AUTHORS else [None]
        for i, (block, project) in enumerate(zip(self.transformer_blocks, self.controlnet_blocks, strict=True)):
            x = run_block(block, i, x, conditioning, around_block)
            residuals.append(project(x))
        return residuals


def shared_tensors(trunk: Mapping[str, Tensor], wiring: str) -> dict[str, Tensor]:
    """The tensors that a branch shares with its trunk, by the branch's names, out of all the trunk's tensors.

    They are the embedders' and, in the authors' wiring, block 0's.
    """
    shared = {name: tensor for name, tensor in trunk.items() if name.startswith(SHARED)}
    first = "transformer_blocks.0."
    if wiring == AUTHORS:
        shared |= {f"base_block.{k.removeprefix(first)}": v for k, v in trunk.items() if k.startswith(first)}
    return shared


def copy_trunk(trunk: SanaTransformer, blocks: int, wiring: str = AUTHORS) -> SanaControlNet:
    """An untrained branch of the trunk's first `blocks` blocks: its residuals are zero, as its projections are."""
    fields = {**dataclasses.asdict(trunk.config), "depth": blocks, "wiring": wiring}
    like = next(trunk.parameters())
    branch = SanaControlNet(ControlNetConfig(**fields), dtype=like.dtype, device=like.device)
    tensors = trunk.state_dict()
    zeros = {k: torch.zeros_like(v) for k, v in branch.state_dict().items() if k.startswith(OWN)}
    copies = {k: tensors[k] for k in branch.state_dict() if k.startswith("transformer_blocks.")}
    branch.load_state_dict(shared_tensors(tensors, wiring) | copies | zeros)
    return branch


def check_strength_and_range(strength: float, start: float, end: float) -> None:
    """Raise ValueError unless 0 <= strength <= MAX_STRENGTH and 0 <= start <= end <= 1.

    start, end: shares of the way from noise to image, between which a ControlNet acts.
    """
    if not 0 <= strength <= MAX_STRENGTH:
        raise ValueError(f"the control strength is {strength:g}; it must lie in 0 to {MAX_STRENGTH:g}")
    if not 0 <= start <= end <= 1:
        raise ValueError(f"control from {start:g} to {end:g}: start must not exceed end, and both lie in 0 to 1")


def sum_residuals(branches: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """The sum of several branches' residuals, of either wiring; None for a block that nothing is added to."""
    total: list[Tensor | None] = [None] * max((len(residuals) for residuals in branches), default=0)
    for residuals in branches:
        for i, residual in enumerate(residuals):
            before = total[i]
            if residual is not None:
                total[i] = residual if before is None else before + residual
    return total
