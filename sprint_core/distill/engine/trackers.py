"""Where curves and sample grids are drawn beside a run's own files: TensorBoard, and what trackers Accelerate knows.

Accelerate's table of trackers (accelerate.tracking) says what there is: wandb, mlflow, aim, ... and one's own.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

PROJECT = "sana-sprint"
TENSORBOARD = "tensorboard"


class Tracker(Protocol):
    """Draws what it is given; one process of a run has it."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves."""
        ...

    def images(self, step: int, sheet: Tensor) -> None:
        """A sample grid, [h, w, 3] in bytes."""
        ...

    def close(self) -> None:
        """There will be no more."""
        ...


class TensorBoard:
    """Beside the stage's other files. Raises ImportError where it is not installed."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / TENSORBOARD))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, number in values.items():
            self.writer.add_scalar(name, number, step)

    def images(self, step: int, sheet: Tensor) -> None:
        self.writer.add_image("samples", sheet, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Accelerated:
    """A tracker of Accelerate's, by its name there: a project of ours, and in it a run for each stage's command."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, str]):
        from accelerate import PartialState

        PartialState()  # without one, of a process that is alone, their log refuses to be written
        kind = _known()[name]
        place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        own = {"dir": str(folder), "name": folder.name, "group": folder.parent.name} if name == "wandb" else {}
        self.tracker = kind(PROJECT, **place, **own)
        self.tracker.start()
        self.tracker.store_init_configuration(dict(settings))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(dict(values), step=step)

    def images(self, step: int, sheet: Tensor) -> None:
        """Where the tracker takes images."""
        if hasattr(self.tracker, "log_images"):
            self.tracker.log_images({"samples": sheet.numpy()[None]}, step=step)

    def close(self) -> None:
        self.tracker.finish()


def _known() -> dict[str, Any]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return LOGGER_TYPE_TO_CLASS


def check(name: str) -> None:
    """Raises ValueError for one that there is not, or that is not installed."""
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        from accelerate.utils import LoggerType
    except ImportError:
        raise ValueError(f"--tracker {name}: it needs Accelerate: pip install accelerate {name}") from None
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"--tracker {name}: there are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    if name in map(str, LoggerType) and name not in map(str, get_available_trackers()):
        raise ValueError(f"--tracker {name}: it is not installed: pip install {name}")


def opened(name: str, folder: Path, settings: Mapping[str, str]) -> list[Tracker]:
    """TensorBoard where it is installed, and the one of this name, of those that `check` passes; '': no other."""
    trackers: list[Tracker] = []
    with contextlib.suppress(ImportError):
        trackers.append(TensorBoard(folder))
    if name and name != TENSORBOARD:
        trackers.append(Accelerated(name, folder, settings))
    return trackers
