"""Training the feature network of the Frechet distance: it learns to say what stands in a picture."""

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ...evaluate.frechet import FeatureNetwork
from ...shapes import scenes
from ...shapes.examples import scene_and_caption
from ..engine.randomness import SampleRandom

# Yes-or-no questions about a scene, in the order of the answers.
LOOKS = list(product(scenes.SHAPES, scenes.COLOURS))
CELLS = list(product(range(3), range(3)))
QUESTIONS = len(LOOKS) + len(CELLS) + len(scenes.RADIUS_PX) + len(scenes.BACKGROUNDS)


def answers(scene: scenes.Scene) -> list[bool]:
    """Which looks, cells, sizes and background a scene has."""
    things = scene.things
    looks, cells = {(thing.shape, thing.colour) for thing in things}, {(thing.row, thing.column) for thing in things}
    sizes = {thing.size for thing in things}
    yes = [look in looks for look in LOOKS] + [cell in cells for cell in CELLS]
    yes += [size in sizes for size in scenes.RADIUS_PX]
    return yes + [scene.background == name for name in scenes.BACKGROUNDS]


def examples(seeds: Sequence[int], split: str = "train") -> tuple[Tensor, Tensor]:
    """Pictures [b, h, w, 3] in [0, 1] and their answers [b, questions]."""
    drawn = [scene_and_caption(seed, split)[0] for seed in seeds]
    images = torch.from_numpy(scenes.render_batch(drawn)).float() / 255.0
    return images, torch.tensor([answers(scene) for scene in drawn]).float()


class FeatureStage:
    """Binary cross-entropy of each answer."""

    name = averaged = "features"

    def __init__(self, model: FeatureNetwork, pool: int):
        self.modules = {self.name: model}
        self.pool, self.settings = pool, {"pool": str(pool)}

    def phases(self, step: int) -> tuple[str, ...]:
        return (self.name,)

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.modules[self.name]
        device = next(model.parameters()).device
        images, targets = (part.to(device) for part in examples(random.integers(self.pool)))
        logits = model(images)
        right = ((logits > 0) == (targets > 0.5)).float().mean()
        return F.binary_cross_entropy_with_logits(logits, targets), {"right": right}

    def samples(self, average: FeatureNetwork) -> None:
        """Nothing to see."""
