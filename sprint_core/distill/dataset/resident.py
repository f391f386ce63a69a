"""A dataset that lies whole on the training's device: latents, and captions as tokens.

A batch is then some gathers there, and its captions are one forward pass of the text encoder: nothing is tokenized,
sent or waited for, which for a small network on a GPU takes longer than its step.
"""

import torch
from torch import Tensor

from ..engine.randomness import SampleRandom
from .batch import Batch
from .tokenized import TokenizedCaptions


class ResidentLatents:
    """Scaled latents [n, 32, h, w], in fp16 for instance, with `wordings` captions of each, on one device.

    captions: n * wordings of them, all of the first latent's before those of the second; each batch draws one.
    hints: latents of control images, as `latents`. Raises ValueError if they do not belong together.
    """

    def __init__(
        self,
        latents: Tensor,
        captions: TokenizedCaptions,
        fingerprint: str,
        hints: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        device = torch.device(device)
        self.wordings, rest = divmod(len(captions), len(latents))
        if rest or not self.wordings or (hints is not None and len(hints) != len(latents)):
            raise ValueError(f"{len(latents)} latents, {len(captions)} captions: as many wordings of each are needed")
        self.latents, self.captions = latents.to(device), captions.to(device)
        self.hints = None if hints is None else hints.to(device)
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, random: SampleRandom) -> Batch:
        """On the device, in fp32."""
        chosen = random.integers(len(self)).to(self.latents.device)
        rows = chosen
        if self.wordings > 1:
            rows = chosen * self.wordings + random.integers(self.wordings).to(chosen)
        hints = None if self.hints is None else self.hints[chosen].float()
        return Batch(self.latents[chosen].float(), self.captions[rows], hints)
