"""Training the feature network of the Frechet distance: it learns to say what stands in an image."""

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ...evaluate.frechet import FeatureNetwork
from ...shapes import scenes
from ...shapes.examples import scene_and_caption
from ..engine.randomness import SampleRandom
from ..engine.stage import Stage

# Yes-or-no questions about a scene, in the order of the labels.
LOOKS = list(product(scenes.SHAPES, scenes.COLOURS))
CELLS = list(product(range(3), range(3)))
QUESTIONS = len(LOOKS) + len(CELLS) + len(scenes.RADIUS_PX) + len(scenes.BACKGROUNDS)


def labels(scene: scenes.Scene) -> list[bool]:
    """The answer to each question: which looks, cells, sizes and background a scene has."""
    things = scene.things
    looks, cells = {(thing.shape, thing.colour) for thing in things}, {(thing.row, thing.column) for thing in things}
    sizes = {thing.size for thing in things}
    yes = [look in looks for look in LOOKS] + [cell in cells for cell in CELLS]
    yes += [size in sizes for size in scenes.RADIUS_PX]
    return yes + [scene.background == name for name in scenes.BACKGROUNDS]


def examples(seeds: Sequence[int], split: str = "train") -> tuple[Tensor, Tensor]:
    """Images [b, h, w, 3] in [0, 1] and their labels [b, questions] of 0 and 1."""
    drawn = [scene_and_caption(seed, split)[0] for seed in seeds]
    images = torch.from_numpy(scenes.render_batch(drawn)).float() / 255.0
    return images, torch.tensor([labels(scene) for scene in drawn]).float()


class FeatureStage(Stage[FeatureNetwork]):
    """Binary cross-entropy of each label."""

    name = averaged = "features"

    def __init__(self, model: FeatureNetwork, pool: int):
        super().__init__({self.name: model}, {"pool": str(pool)})
        self.model, self.pool = model, pool

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = (part.to(self.device) for part in examples(random.integers(self.pool).tolist()))
        logits = self.model(images)
        right = ((logits > 0) == (targets > 0.5)).float().mean()
        return F.binary_cross_entropy_with_logits(logits, targets), {"right": right}
