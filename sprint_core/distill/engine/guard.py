"""The guard of a training: keeps the best moving average, and ends what has failed.

A distillation that fails does not show it in its loss, whose tangents have length 1 at any error. So a stage may
measure an error of its own now and then (Stage.check). The average with the lowest one is kept in best.safetensors; one
that has doubled since ends the training, rather than its last hours.
"""

import math
import operator
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import messages
from ...weights import tensorfile
from . import sharding

log = messages.logger(__name__)

ERROR = "error"  # what is guarded, among the numbers of Stage.check
SMALL_ERROR = 0.1  # below it no rise ends a training: LADD gives up some of so small an error for sharper images
MOST_LEFT_OUT = 10  # updates in a row whose gradients were not finite


class TrainingFailed(ValueError):
    """A training that is not worth going on with."""


class Guard:
    """Of a stage's folder. stop_factor: how often the lowest error is too much; 0: never."""

    def __init__(self, folder: Path, stop_factor: float, writes: bool):
        self.file = folder / "best.safetensors"
        self.stop_factor, self.writes = stop_factor, writes
        self.step, self.error = 0, math.inf  # of the best average

    @property
    def state(self) -> dict[str, float]:
        """What a resumed run goes on from."""
        return {"step": self.step, ERROR: self.error}

    def load(self, state: Mapping[str, float]) -> None:
        self.step, self.error = int(state["step"]), float(state[ERROR])

    def record(self, step: int, error: float, average: nn.Module, last: bool = False) -> None:
        """Keep the average if its error is the lowest. Raises TrainingFailed if it is too much, or no number.

        last: of a training that has ended anyway, which is warned of.
        """
        if error < self.error:
            self.step, self.error = step, error
            tensors = sharding.state(average, self.writes)
            if self.writes:
                tensorfile.write(self.file, tensors, {"step": str(step), ERROR: repr(error)})
        elif not math.isfinite(error) or (self.stop_factor and error > max(self.stop_factor * self.error, SMALL_ERROR)):
            failed = f"{self.file.parent}: the error is {error:.3g} after step {step}; {self._advice}"
            if not last:
                raise TrainingFailed(failed)
            log.warning("%s", failed)

    def check_left_out(self, step: int, in_a_row: Mapping[str, int]) -> None:
        """Raises TrainingFailed if no update of a phase was possible for too long. in_a_row: of each phase."""
        phase, count = max(in_a_row.items(), key=operator.itemgetter(1))
        if count >= MOST_LEFT_OUT:
            raise TrainingFailed(
                f"{self.file.parent}: after step {step} the last {count} gradients of the {phase} were not finite; "
                f"{self._advice}"
            )

    @property
    def _advice(self) -> str:
        change = "a lower learning rate, or a later and weaker LADD"
        if not math.isfinite(self.error):
            return f"delete the folder, and train anew with {change}"
        return (
            f"it was {self.error:.3g} at step {self.step}, whose average {self.file.name} holds: go on from there by "
            f"--resume-best, with {change}"
        )

    def load_best(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors of the best average, which becomes the latest. Raises ValueError where there is none."""
        if not self.file.is_file():
            raise ValueError(f"{self.file}: no average has been kept there; leave out --resume-best or --export best")
        file = tensorfile.read(self.file)
        try:
            self.load({"step": int(file.metadata["step"]), ERROR: float(file.metadata[ERROR])})
        except (KeyError, ValueError):
            raise ValueError(
                f"{self.file}: its header does not say which step it is of; leave out --resume-best"
            ) from None
        return {name: tensor.to(device, copy=True) for name, tensor in file.tensors.items()}
