"""What evaluating the bundled model needs of files that a user does not have: the teacher, and the true art.

demo/records.json holds the teacher's share and the moments of true images' features, for one set of prompts.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import disk
from . import frechet

FILE = Path(__file__).parents[1] / "demo" / "records.json"


@dataclass(frozen=True)
class Records:
    """teacher20: its top-1 over the ceiling, None where it was not measured. mean [d] and covariance [d, d]: of the
    features of true images, by the network whose hash is `features`."""

    teacher20: float | None
    features: str | None
    mean: list[float]
    covariance: list[list[float]]

    @property
    def moments(self) -> frechet.Moments:
        return torch.tensor(self.mean).double(), torch.tensor(self.covariance).double()


def make(teacher20: float | None, features: str | None, true: frechet.Moments | None) -> Records:
    """true: moments of the true images, None where no feature network knows this world."""
    mean, covariance = true or (torch.zeros(0), torch.zeros(0, 0))
    return Records(teacher20, features if true else None, mean.tolist(), covariance.tolist())


def load(path: Path = FILE) -> Records | None:
    """None where there is no such file. Raises ValueError for a damaged one."""
    if not path.is_file():
        return None
    try:
        records = Records(**disk.read_json(path))
        _check(records)
        return records
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: not records of an evaluation ({error}); write them anew with --record") from None


def _check(records: Records) -> None:
    """Raises ValueError, TypeError or RuntimeError for what is not as `of` makes it."""
    mean, covariance = records.moments
    if mean.ndim != 1 or covariance.numel() != len(mean) ** 2 or (len(mean) and covariance.ndim != 2):
        raise ValueError(f"a mean of shape {list(mean.shape)} and a covariance of {list(covariance.shape)}")
    share = 0.0 if records.teacher20 is None else records.teacher20
    if not (math.isfinite(share) and mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("NaN or infinity among its numbers")


def save(records: Records, path: Path = FILE) -> None:
    """Write them. Raises OSError."""
    with disk.replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(records)) + "\n", encoding="utf-8")
