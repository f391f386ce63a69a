"""Training the ControlNet of the emoji world, on things that stand anywhere: only the drawing says where."""

import torch
from torch import Tensor
from tqdm import tqdm

from ...emoji import art, scenes
from ...emoji.concepts import learnt
from ...images import edges
from ...text.loading import find_tokenizer
from ...weights.checkpoint import CheckpointError
from ..dataset import emoji_scenes
from ..dataset.emoji_text import tokenizer
from ..dataset.resident import ResidentLatents
from .control import ControlRun
from .emoji import BATCH, CPU_BATCH, encode, tokenized

WOBBLE_PX = 2.5
KINDS = 4  # of drawings


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
        batch = CPU_BATCH if self.device.type == "cpu" else BATCH
        latents, hints = [], []
        for number, packed in enumerate(tqdm(drawn.packed.split(batch), desc="latents and hints", leave=False)):
            with torch.inference_mode():
                images = scenes.paint(packed, drawings)
                latents.append(encode(autoencoder, images))
                covered = scenes.silhouettes(packed, drawings)
                hints.append(encode(autoencoder, control_images(images, covered, number)))
        return ResidentLatents(torch.cat(latents), tokenized(drawn), drawn.fingerprint, torch.cat(hints), self.device)


def control_images(images: Tensor, covered: Tensor, seed: int) -> Tensor:
    """Images [b, 3, h, w] uint8, and how much of them things cover [b, h, w], -> control images of the same kind.

    In turn soft edges, a scribble, a scribble by an unsteady hand, and such a hand's outlines alone.
    """
    pictures, shapes = images.movedim(1, -1).float() / 255.0, covered[..., None].expand(-1, -1, -1, 3)
    drawn = torch.empty_like(images, dtype=torch.float32)
    generator = torch.Generator(images.device).manual_seed(seed)
    for turn, (shown, scribble, by_hand) in enumerate(
        ((pictures, False, False), (pictures, True, False), (pictures, True, True), (shapes, True, True))
    ):
        if len(chosen := shown[turn::KINDS]):
            lines = edges.detect(chosen, scribble=scribble).movedim(-1, 1)
            drawn[turn::KINDS] = edges.wobbled(lines, generator, WOBBLE_PX) if by_hand else lines
    return drawn.mul(255).round().clamp(0, 255).to(torch.uint8)
