"""Images of the emoji world to train on, painted where the art is: crops that aim at things, and whole scenes."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ...emoji import scenes
from ...emoji.art import SPRITE_PX, Art
from ...shapes import examples
from ...shapes import scenes as shapes
from ..engine.randomness import SampleRandom
from .scenes import as_tensor

CROP_PX = 128
CROPPED_PX = (SPRITE_PX, 104, 200, 120, 176, 96, 144, 112, 208, 128, 160)  # of the first thing: one size a step
SECOND_PX, SECOND_SHARE = 112, 0.4  # of a second thing, in some crops
GROUND_NOISE = 6.0  # of 255, so that grounds are not always the same few colours
SHAPE_SHARE = 8  # one image in eight shows plain shapes
PAINTED = 64  # scenes at a time


class EmojiImages:
    """Random crops without end, and a pool of whole scenes 0 to pool - 1, painted once."""

    crop_share = 0.9

    def __init__(self, art: Art, pool: int, shape_pool: int):
        self.art = art
        self.grounds = scenes.backdrops(art.sprites.device)
        drawn = scenes.pack([scenes.scene_and_caption(seed)[0] for seed in range(pool)])
        self.pool = torch.cat([scenes.paint(drawn[i : i + PAINTED], art) for i in range(0, pool, PAINTED)])
        renders = [shapes.render(examples.scene_and_caption(seed)[0]) for seed in range(shape_pool)]
        self.shapes = as_tensor(renders).to(art.sprites.device) if renders else torch.zeros(0, 3, 0, 0)
        self.fingerprint = hashlib.sha256(self.pool[:16].cpu().numpy().tobytes()).hexdigest()[:32] + f" {pool}"

    def crops(self, random: SampleRandom, step: int) -> Tensor:
        """Squares of CROP_PX through one or two things, [b, 3, CROP_PX, CROP_PX] in [-1, 1]."""
        device = self.art.sprites.device
        count = len(random)

        def integers(high: int) -> Tensor:
            return torch.as_tensor(random.integers(high), device=device)

        ground = self.grounds[integers(len(self.grounds))]
        room = scenes.CANVAS_PX - CROP_PX
        top = integers(room)
        canvas = ground.gather(
            2,
            (top[:, None] + torch.arange(CROP_PX, device=device))[:, None, :, None].expand(
                count, 3, -1, scenes.CANVAS_PX
            ),
        )
        canvas = canvas[..., :CROP_PX] + GROUND_NOISE * random.normal(3, 1, 1).to(canvas)
        size = CROPPED_PX[step % len(CROPPED_PX)]
        self._paste(canvas, integers, size, torch.ones(count, device=device))
        self._paste(canvas, integers, SECOND_PX, (random.uniform().to(device) < SECOND_SHARE).float())
        canvas = canvas.clamp_(0, 255).div_(127.5).sub_(1)
        return self._with_shapes(canvas, random, integers)

    def _paste(self, canvas: Tensor, integers, size: int, shown: Tensor) -> None:
        """One thing of a size anywhere over each crop, such that its centre is inside."""
        styles, concepts = self.art.has.shape
        sprites = self.art.resized(integers(styles), integers(concepts), size)
        x, y = (integers(CROP_PX) - size // 2 for _ in range(2))
        side = torch.arange(CROP_PX, device=canvas.device)
        rows, columns = side - y[:, None], side - x[:, None]
        inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
        rows, columns = rows.clamp(0, size - 1), columns.clamp(0, size - 1)
        image = torch.arange(len(canvas), device=canvas.device)[:, None, None]
        moved = sprites.movedim(1, -1)[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
        moved = moved * (inside * shown[:, None, None])[:, None]
        canvas.mul_(1 - moved[:, 3:] / 255).add_(moved[:, :3])

    def _with_shapes(self, images: Tensor, random: SampleRandom, integers) -> Tensor:
        """Every SHAPE_SHARE-th image replaced by one of plain shapes, or a crop of it."""
        if not len(self.shapes):
            return images
        chosen = self.shapes[integers(len(self.shapes))[::SHAPE_SHARE]]
        if images.shape[-1] == CROP_PX:
            chosen = chosen[..., 64 : 64 + CROP_PX, 64 : 64 + CROP_PX]
        images[::SHAPE_SHARE] = chosen
        return images

    def whole(self, random: SampleRandom) -> Tensor:
        def integers(high: int) -> Tensor:
            return torch.as_tensor(random.integers(high), device=self.pool.device)

        images = self.pool[integers(len(self.pool))].float().div_(127.5).sub_(1)
        return self._with_shapes(images, random, integers)

    def shown(self, count: int) -> Tensor:
        return self.pool[:count].float() / 127.5 - 1

    def batches(self, size: int, count: int) -> Iterator[Tensor]:
        """The first scenes, [size, 3, 256, 256] in [-1, 1] each."""
        return (self.pool[i : i + size].float() / 127.5 - 1 for i in range(0, min(count, len(self.pool)), size))
