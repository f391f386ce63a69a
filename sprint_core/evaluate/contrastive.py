"""A small contrastive network of images and captions (CLIP's way, arXiv 2103.00020): a second opinion on emoji.

It embeds images and captions in one space, where a caption lies closest to its image. Recall at k: how often the
caption that an image was painted from is among the k closest of all captions. The hidden layer of its image tower is
the feature of the Frechet distance. Trained by distill/stages/contrastive.py.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..text.tokenizers import PAD
from ..weights import tensorfile
from . import frechet
from .frechet import BATCH, WORLD, FeatureNetwork

FILE = Path(__file__).parents[1] / "demo" / "emoji_features.safetensors"
CHANNELS = (3, 32, 64, 128, 192)
EMBEDDING = 64
TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS, MAX_TOKENS = 64, 4, 2, 32
TEMPERATURE = 0.07  # at first


class TextTower(nn.Module):
    """Tokens [b, m], padded with PAD, -> [b, embedding]: a transformer's mean over what is no padding."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, TEXT_WIDTH)
        self.positions = nn.Parameter(torch.zeros(MAX_TOKENS, TEXT_WIDTH))
        layer = nn.TransformerEncoderLayer(
            TEXT_WIDTH, TEXT_HEADS, 2 * TEXT_WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, TEXT_LAYERS, enable_nested_tensor=False)
        self.out = nn.Linear(TEXT_WIDTH, EMBEDDING)

    def forward(self, tokens: Tensor) -> Tensor:
        is_padding = tokens == PAD
        x = self.layers(self.tokens(tokens) + self.positions[: tokens.shape[1]], src_key_padding_mask=is_padding)
        kept = (~is_padding)[..., None]
        return self.out((x * kept).sum(1) / kept.sum(1))


class ContrastiveNetwork(nn.Module):
    """Embeds images [b, h, w, 3] in [0, 1] and tokens [b, m] as unit vectors [b, 64]."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.image, self.text = FeatureNetwork(EMBEDDING, CHANNELS), TextTower(vocabulary)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(self.image(images), dim=-1)

    def embed_captions(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text(tokens), dim=-1)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """How close each image is to each caption: [images, captions], over the temperature."""
        return self.log_scale.exp() * self.embed_images(images) @ self.embed_captions(tokens).T


def load(path: Path = FILE) -> ContrastiveNetwork:
    """Raises CheckpointError."""
    return frechet.load(path, "emoji", lambda t: ContrastiveNetwork(len(t["text.tokens.weight"])), "contrastive")


def save(model: ContrastiveNetwork, path: Path, provenance: str) -> None:
    """In fp16. Raises OSError."""
    tensors = {name: tensor.detach().cpu().half() for name, tensor in model.state_dict().items()}
    tensorfile.write(path, tensors, {WORLD: "emoji", "provenance": provenance})


def padded(tokens: Sequence[Sequence[int]]) -> Tensor:
    """Rows of tokens as one tensor [n, MAX_TOKENS]."""
    rows = torch.full((len(tokens), MAX_TOKENS), PAD)
    for row, ids in zip(rows, tokens, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return rows


@torch.inference_mode()
def recall(model: ContrastiveNetwork, images: Tensor, tokens: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Share of images [n, h, w, 3] uint8 whose own caption, of tokens [n, m], is among the k closest of all n."""
    embedded = torch.cat([model.embed_images(part.float() / 255.0) for part in images.split(BATCH)])
    closeness = embedded @ model.embed_captions(tokens).T
    closer = (closeness > closeness.diagonal()[:, None]).sum(1)
    return {f"R@{k}": round((closer < k).float().mean().item(), 4) for k in ks}
