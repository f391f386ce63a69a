"""What the runs of training share: one folder, one recipe, and stages that resume.

A run's constructor checks its sources and remembers them. Its verbs do the work: train_..., encode_... and export_...
Each continues where it stopped, and costs little once it has ended; what one returns is what the next ones take.
"""

import copy
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ...models.autoencoder import Autoencoder
from ...weights import checkpoint, layouts
from ..engine.compiling import compile_blocks
from ..engine.processes import ProcessGroup
from ..engine.stage import Averaged, Stage
from ..engine.stop import Stop
from ..engine.trainer import Trainer
from ..recipes import Recipe

Network = TypeVar("Network", bound=nn.Module)


class Run:
    """A run in one folder, `out`."""

    resume_best = False  # go back to the best average that the last stage has kept
    stop = Stop()  # what may end a stage early
    keep_every = 0  # steps after which the last stage keeps its average; 0: never
    tracker = ""  # that draws curves beside TensorBoard's
    compiles = False  # the blocks of transformers
    exported = "ema"  # which weights of the last stage are its result: see Trainer.result

    def __init__(self, out: Path, recipe: Recipe, processes: ProcessGroup, seed: int):
        self.out, self.recipe = Path(out), recipe
        self.processes, self.seed = processes, seed

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def train(self, stage: Stage[Averaged]) -> Averaged:
        """Train a stage to its end: its moving average, or of the last stage what is exported, frozen."""
        if self.compiles:
            compile_blocks(stage.compilable)
        is_last = stage.name == self.recipe.last
        schedule, keep_every = self.recipe.stages[stage.name], self.keep_every * is_last
        trainer = Trainer(
            stage,
            schedule,
            self.out,
            self.seed,
            self.processes,
            resume_best=self.resume_best and is_last,
            stop=self.stop,
            keep_every=keep_every,
            tracker=self.tracker,
        )
        trainer.train()
        return trainer.result(self.exported if is_last else "ema").eval().requires_grad_(False)

    def build_copy(self, weights: checkpoint.Weights[Any, Network]) -> Network:
        """The network of a file in fp32, copied out of it: training changes weights in place."""
        return copy.deepcopy(checkpoint.build(weights, dtype=torch.float32, device=self.device))

    def load_autoencoder(self, path: Path) -> Autoencoder:
        """The DC-AE of a file. Raises CheckpointError."""
        weights = checkpoint.load(path, layouts.AUTOENCODER)
        return checkpoint.build(weights, dtype=torch.float32, device=self.device)


def cpu_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A network's tensors as a file is to hold them."""
    return {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
