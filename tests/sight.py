"""What the judge of emoji sees in an image of the bundled model, by the name of the thing."""

import numpy as np
import torch

from sprint_core.emoji import judge
from sprint_core.emoji.captions import GROUNDS, Requirement
from sprint_core.emoji.concepts import number_of


def shows(image: np.ndarray | torch.Tensor, name: str, **said) -> bool:
    """Whether an image [h, w, 3] shows the thing of that name, once and large, and what else is said."""
    verdicts = judge.judge(_one(image), [Requirement((number_of(name),), **said)])
    return bool(verdicts.names & verdicts.ground)


def ground(image: np.ndarray | torch.Tensor) -> str | None:
    """What an image [h, w, 3] shows its thing on; None: nothing of GROUNDS."""
    number = int(judge.grounds(_one(image))[0])
    return list(GROUNDS)[number] if number >= 0 else None


def _one(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    return (image if isinstance(image, torch.Tensor) else torch.tensor(image))[None]


def middle(image: np.ndarray) -> tuple[float, float, float]:
    """Levels of red, green and blue of the middle quarter of an image [h, w, 3] uint8."""
    h, w, _ = image.shape
    red, green, blue = image[h * 3 // 8 : h * 5 // 8, w * 3 // 8 : w * 5 // 8].mean((0, 1))
    return red, green, blue
