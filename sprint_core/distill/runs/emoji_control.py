"""Training the ControlNet of the emoji world, on things that stand anywhere: only the drawing says where."""

import hashlib

import torch
from torch import Tensor
from tqdm import tqdm

from ...emoji import art, captions, scenes
from ...emoji.art import Art
from ...emoji.concepts import learnt
from ...images import edges
from ...models.autoencoder import Autoencoder
from ...text.loading import find_tokenizer
from ...weights import tensorfile
from ...weights.checkpoint import CheckpointError
from ..dataset import emoji_scenes
from ..dataset.batch import weights_fingerprint
from ..dataset.emoji_scenes import CaptionedScenes
from ..dataset.emoji_text import tokenizer
from ..dataset.resident import ResidentLatents
from ..dataset.scene_latents import stored_latents
from .control import ControlRun
from .emoji import BATCH, CPU_BATCH, encode, tokenized

POOL = 24_000  # scenes
SHARD = 500  # scenes; a multiple of both batches, as each batch has a seed
WOBBLE_PX = 2.5
KINDS = 4  # of drawings


class EmojiControlRun(ControlRun):
    """A run on the art of `sources.sprites`. pairs: how often a caption names two things."""

    pairs: float = captions.PAIRS

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
        drawn = emoji_scenes.draw_free(self.pool, among=among, pairs=self.pairs)
        pairs = self._encoded(autoencoder, drawn, drawings)
        return ResidentLatents(pairs[:, 0], tokenized(drawn), drawn.fingerprint, pairs[:, 1], self.device)

    @torch.inference_mode()
    def _encoded(self, autoencoder: Autoencoder, drawn: CaptionedScenes, drawings: Art) -> Tensor:
        """Scaled latents of scenes and of their control images [scenes, 2, 32, 8, 8], in shards that are kept."""
        batch = CPU_BATCH if self.device.type == "cpu" else BATCH
        source = {"autoencoder": weights_fingerprint(autoencoder), "scenes": drawn.fingerprint, "batch": str(batch)}
        source |= {"hints": _hash(_controlled(drawn.packed[: 2 * KINDS], drawings, 0)[1])}
        shards = []
        for first in tqdm(range(0, self.pool, SHARD), desc="latents and hints", leave=False):
            packed = drawn.packed[first : first + SHARD]
            path = self.out / "latents" / f"controlled_{first // SHARD:04d}.safetensors"
            pairs = stored_latents(path, source, len(packed))
            if pairs is None:
                scaled = [
                    torch.stack([encode(autoencoder, images) for images in _controlled(part, drawings, seed)], 1)
                    for seed, part in enumerate(packed.split(batch), first // batch)
                ]
                pairs = torch.cat(scaled).cpu()
                tensorfile.write(path, {"latents": pairs}, source)
            shards.append(pairs.to(self.device))
        return torch.cat(shards)


def _controlled(packed: Tensor, drawings: Art, seed: int) -> tuple[Tensor, Tensor]:
    """Scenes as images [b, 3, 256, 256] uint8, and their control images."""
    images = scenes.paint(packed, drawings)
    return images, control_images(images, scenes.silhouettes(packed, drawings), seed)


def _hash(images: Tensor) -> str:
    return hashlib.blake2b(images.cpu().numpy().tobytes(), digest_size=16).hexdigest()


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
