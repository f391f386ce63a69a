"""Training the contrastive network of emoji: of a batch of images and captions it learns which belong together."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...evaluate.contrastive import ContrastiveNetwork
from ..engine.randomness import SampleRandom
from ..engine.stage import Stage

SMALLEST_TEMPERATURE = 0.01
NOISE = 0.02  # of pixels in 0 to 1, so that no feature hangs on what an auto-encoder leaves out


class ContrastiveStage(Stage[ContrastiveNetwork]):
    """The mean of both cross-entropies: which caption is an image's, which image a caption's (arXiv 2103.00020).

    images: [n, 3, h, w] uint8; tokens: [n, m] of their captions; fingerprint: of both.
    """

    name = averaged = "features"

    def __init__(self, model: ContrastiveNetwork, images: Tensor, tokens: Tensor, fingerprint: str):
        super().__init__({self.name: model}, {"scenes": fingerprint})
        self.model, self.images, self.tokens = model, images, tokens

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = random.integers(len(self.images)).to(self.images.device)
        images = self.images[chosen].movedim(1, -1).float() / 255.0
        images = images + NOISE * random.normal(*images.shape[1:]).to(images)
        with torch.no_grad():
            self.model.log_scale.clamp_(max=-math.log(SMALLEST_TEMPERATURE))
        closeness = self.model(images.to(self.device), self.tokens[chosen].to(self.device))
        own = torch.arange(len(chosen), device=closeness.device)
        right = (closeness.argmax(1) == own).float().mean()
        return (F.cross_entropy(closeness, own) + F.cross_entropy(closeness.T, own)) / 2, {"right": right}
