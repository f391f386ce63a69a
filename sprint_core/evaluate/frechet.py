"""Frechet distance between two sets of images, in the features of a small fixed network.

The network (demo/features.safetensors, trained by distill/stages/features.py) names what stands in an image of
shapes/scenes.py; its last hidden layer is the feature. For images of the real world pass InceptionV3 instead.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..weights import tensorfile
from ..weights.finite import first_and_count, not_finite
from ..weights.tensorfile import CheckpointError

FILE = Path(__file__).parents[1] / "demo" / "features.safetensors"
INPUT_PX = 64
WIDTH = 32
CHANNELS = (3, 16, 32, 64, 96)
SAMPLES_PER_FEATURE = 10  # fewer, and the covariances are noise
BATCH = 50
TRIAL_PX = 128
WORLD = "world"  # which the network was trained on, in a file's metadata

Moments = tuple[Tensor, Tensor]
Network = TypeVar("Network", bound=nn.Module)
Extractor = Callable[[Tensor], Tensor]  # images [b, h, w, 3] in [0, 1] -> features [b, d]


class FeatureNetwork(nn.Module):
    """Convolutions with stride 2, then two layers: images [b, h, w, 3] in [0, 1] -> logits [b, labels], of
    yes-or-no questions about a scene."""

    def __init__(self, labels: int, channels: Sequence[int] = CHANNELS):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairwise(channels))
        self.hidden = nn.Linear(channels[-1] * (INPUT_PX // 2 ** len(self.convs)) ** 2, WIDTH)
        self.out = nn.Linear(WIDTH, labels)

    def features(self, images: Tensor) -> Tensor:
        """[b, h, w, 3] in [0, 1] -> [b, 32]."""
        x = rearrange(images, "b h w c -> b c h w") * 2.0 - 1.0
        x = F.interpolate(x, (INPUT_PX, INPUT_PX), mode="area")
        for conv in self.convs:
            x = F.silu(conv(x))
        return F.silu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.features(images))


def load(path: Path, world: str, build: Callable[[dict[str, Tensor]], Network], kind: str) -> Network:
    """A network of this world from its file, in fp32. build: makes one of the shape of these tensors.

    Raises CheckpointError.
    """
    file = tensorfile.read(path)
    if (own := file.metadata.get(WORLD, "shapes")) != world:
        raise CheckpointError(f"{path}: features of the world of {own}, not of {world}; train them anew")
    tensors = {name: tensor.float() for name, tensor in file.tensors.items()}
    if broken := not_finite(tensors):
        raise CheckpointError(f"{path}: its tensor {first_and_count(broken)} holds NaN or infinity; train it anew")
    try:
        model = build(tensors)
        model.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError):
        raise CheckpointError(f"{path}: its tensors are not those of a {kind} network; train it anew") from None
    return model.eval().requires_grad_(False)


@cache
def bundled(path: Path = FILE) -> Extractor:
    """The features of plain shapes. Raises CheckpointError, also for a network of another world."""
    return load(path, "shapes", lambda tensors: FeatureNetwork(len(tensors["out.bias"])), "feature").features


def inception(path: str | Path, device: torch.device | str = "cpu") -> Extractor:
    """A TorchScript InceptionV3 that maps uint8 images [b, 3, h, w] to features, as StyleGAN3's metrics use it.

    Raises CheckpointError.
    """
    try:
        model = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a TorchScript file; inception-2015-12-05.pt is one ({error})") from None
    try:
        model(torch.zeros(1, 3, TRIAL_PX, TRIAL_PX, dtype=torch.uint8, device=device), return_features=True)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"{path}: it does not take bytes and return_features=True ({last})") from None

    def features(images: Tensor) -> Tensor:
        pixels = rearrange(images.mul(255.0).round().to(torch.uint8), "b h w c -> b c h w")
        return model(pixels.to(device), return_features=True).float().cpu()

    return features


@torch.inference_mode()
def extract(extractor: Extractor, images: Tensor) -> Tensor:
    """Features [n, d] of images [n, h, w, 3] in [0, 1], in float64."""
    return torch.cat([extractor(images[i : i + BATCH]).double() for i in range(0, len(images), BATCH)])


def frechet(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features [n, d] and [m, d] (arXiv 1706.08500).

    Raises ValueError as `check_count` does.
    """
    return distance(moments(a), moments(b))


def moments(features: Tensor) -> Moments:
    """The mean [d] and covariance [d, d] of features [n, d]. Raises ValueError as `check_count` does."""
    check_count(*features.shape)
    return features.mean(0), features.T.cov()


def distance(a: Moments, b: Moments) -> float:
    """The Frechet distance of two sets of features by their moments."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root = _root(cov_a)
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap)


def check_count(samples: int, width: int) -> None:
    """Raises ValueError for fewer samples than an estimate in so many features needs."""
    least = SAMPLES_PER_FEATURE * width
    if samples < least:
        raise ValueError(f"a Frechet distance in {width} features needs {least} images or more; these are {samples}")


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
