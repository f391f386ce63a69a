"""Lets the core tests import `sprint_core` from the repository, without installing it, and their own `oracles`."""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parents[1]), str(HERE.parent), str(HERE)]
torch.set_num_threads(1)  # the models are tiny: threads would only wait for one another
