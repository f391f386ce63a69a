"""Training the ControlNet of the emoji world, on things that stand anywhere: only the drawing says where."""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ...emoji import art, scenes
from ...emoji.concepts import learnt
from ...text.loading import find_tokenizer
from ...weights.checkpoint import CheckpointError
from ..dataset import emoji_scenes
from ..dataset import scenes as scene_dataset
from ..dataset.emoji_text import tokenizer
from ..dataset.resident import ResidentLatents
from .control import ControlRun
from .emoji import BATCH, encode, tokenized

WOBBLE_PX = 2.5


class EmojiControlRun(ControlRun):
    """A run on the art of `sources.sprites`."""

    def encode_dataset(self) -> ResidentLatents:
        """Scaled latents of scenes, of their control images, and their captions.

        Raises CheckpointError for a text encoder of another world, OSError and ValueError as art.load does.
        """
        among = learnt(self.trunk.settings)
        if find_tokenizer(self.text_encoder).data not in (tokenizer(among).data, tokenizer().data):
            encoder = self.sources.text_encoder
            raise CheckpointError(f"{encoder}: has other words than scenes of emoji; give their text encoder")
        assert self.sources.sprites is not None
        drawings = art.load(self.sources.sprites).to(self.device)
        autoencoder = self.load_autoencoder(self.sources.autoencoder)
        drawn = emoji_scenes.draw_free(self.pool, among=among)
        latents, hints = [], []
        for number, packed in enumerate(tqdm(drawn.packed.split(BATCH), desc="latents and hints", leave=False)):
            with torch.inference_mode():
                images = scenes.paint(packed, drawings)
                latents.append(encode(autoencoder, images))
                hints.append(encode(autoencoder, control_images(images, number)))
        return ResidentLatents(torch.cat(latents), tokenized(drawn), drawn.fingerprint, torch.cat(hints), self.device)


def control_images(images: Tensor, seed: int) -> Tensor:
    """[b, 3, h, w] uint8 -> control images of the same kind: soft edges and scribbles, half of them as by a hand."""
    edges = scene_dataset.control_images(images.float() / 127.5 - 1)
    generator = torch.Generator(images.device).manual_seed(seed)
    drawn = wobbled(edges, generator)
    half = torch.arange(len(images), device=images.device) // 2 % 2 == 1
    edges = torch.where(half[:, None, None, None], drawn, edges)
    return edges.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def wobbled(edges: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by a smooth random field of some px, as by an unsteady hand: [b, 3, h, w] in [-1, 1]."""
    b, _, h, w = edges.shape
    field = torch.randn(b, 2, 7, 7, generator=generator, device=edges.device) * (WOBBLE_PX * 2 / w)
    field = F.interpolate(field, (h, w), mode="bicubic", align_corners=True).movedim(1, -1)
    identity = torch.eye(2, 3, device=edges.device).expand(b, -1, -1)
    grid = F.affine_grid(identity, [b, 1, h, w], align_corners=False)
    return F.grid_sample(edges + 1, grid + field, align_corners=False) - 1
