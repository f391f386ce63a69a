"""HED, holistically-nested edge detection (arXiv 1504.06375), as the ControlNet authors retrained it."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and layers of HED's blocks


class _Block(nn.Module):
    """Convolutions of one scale, and its map of edge logits: [b, before, h, w] -> [b, channels, h, w], [b, 1, h, w]."""

    def __init__(self, before: int, channels: int, layers: int, ops: Any):
        super().__init__()
        widths = [before, *[channels] * layers]
        self.convs = nn.ModuleList(ops.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.projection = ops.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.projection(x)


class HED(nn.Module):
    """The edge detector, named as ControlNetHED.pth: image [b, 3, h, w] in [0, 1] -> edges [b, h, w] in [0, 1]."""

    def __init__(self, ops: Any = nn) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        before = 3
        for i, (channels, layers) in enumerate(VGG, 1):
            setattr(self, f"block{i}", _Block(before, channels, layers, ops))
            before = channels

    def forward(self, pixels: Tensor) -> Tensor:
        x, maps = 255.0 * pixels - self.norm.to(pixels), []  # no layer's, so that no layer moves it
        for i in range(1, len(VGG) + 1):
            x, edges = getattr(self, f"block{i}")(x if i == 1 or min(x.shape[-2:]) < 2 else F.max_pool2d(x, 2))
            maps.append(F.interpolate(edges, pixels.shape[-2:], mode="bilinear"))
        return torch.cat(maps, dim=1).mean(1).sigmoid()
