"""Lets the core tests import `sprint_core` from the repository, without installing it, and what lies beside them."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parents[1]), str(HERE.parent), str(HERE)]
torch.set_num_threads(1)  # the models are tiny: threads would only wait for one another


@pytest.fixture(scope="session")
def drawn() -> dict[str, list]:
    """3000 scenes of each split, with their captions."""
    from sprint_core.shapes.captions import SPLITS
    from sprint_core.shapes.examples import scene_and_caption

    return {split: [scene_and_caption(seed, split) for seed in range(3000)] for split in SPLITS}
