"""The training loop that every stage shares: steps, gradients, averages, saving and resuming.

A stage says what is learnt and what it costs (`Stage`); `Trainer` does the rest. All that a run is lies
in one state file, written atomically, and randomness belongs to samples (randomness.py): the same command
after any interruption continues as if there had been none, bit for bit on the CPU.
"""

import copy
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .randomness import SampleRandom
from .recipes import Schedule

SAVE_EVERY_SEC = 120
LOG_EVERY = 20


class Stage(Protocol):
    """What a stage of training is to the trainer."""

    name: str
    modules: Mapping[str, nn.Module]  # what is trained and saved; one optimiser each
    averaged: str  # the module whose moving average is the result

    def phases(self, step: int) -> tuple[str, ...]:
        """The modules that this step trains, in order."""

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that module `phase` is to lower, and metrics."""


def batch_samples(batch: int, rank: int = 0, world: int = 1) -> range:
    """The samples of a batch that fall to one of `world` processes. Raises ValueError."""
    if batch % world:
        raise ValueError(f"a batch of {batch} does not divide among {world} processes")
    share = batch // world
    return range(rank * share, (rank + 1) * share)


class Trainer:
    """Trains one stage in one folder. Raises ValueError if the folder belongs to another run."""

    def __init__(self, stage: Stage, schedule: Schedule, out: Path, seed: int = 0, rank: int = 0, world: int = 1):
        self.stage, self.schedule, self.seed = stage, schedule, seed
        self.rank, self.world = rank, world
        self.folder = Path(out) / stage.name
        self.optimizers = {
            name: torch.optim.AdamW(module.parameters(), lr=schedule.lr, betas=schedule.betas, weight_decay=0.0)
            for name, module in stage.modules.items()
        }
        self.average = copy.deepcopy(stage.modules[stage.averaged]).requires_grad_(False)
        self.step, self.skipped = 0, 0
        self.run = {"stage": stage.name, "schedule": repr(schedule), "seed": seed}
        if self.state_file.is_file():
            self._load()

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def train(self, until: int | None = None) -> nn.Module:
        """Train to the end, or to a step; returns the moving average."""
        end = min(self.schedule.steps, until or self.schedule.steps)
        saved, quiet = time.monotonic(), self.rank > 0 or not sys.stderr.isatty()
        with tqdm(total=self.schedule.steps, initial=self.step, desc=self.stage.name, disable=quiet) as bar:
            while self.step < end:
                metrics = self._one_step()
                self.step += 1
                bar.update()
                if self.step % LOG_EVERY == 0 or self.step == end:
                    line = {name: round(float(value), 6) for name, value in metrics.items()}
                    bar.set_postfix(loss=next(iter(line.values()), None), skipped=self.skipped)
                    self._log(line)
                if time.monotonic() - saved > SAVE_EVERY_SEC:
                    self.save()
                    saved = time.monotonic()
        self.save()
        return self.average

    def _one_step(self) -> dict[str, Tensor]:
        metrics = {}
        samples = batch_samples(self.schedule.batch, self.rank, self.world)
        for phase in self.stage.phases(self.step):
            random = SampleRandom(self.seed, self.step, f"{self.stage.name}/{phase}", samples)
            loss, found = self.stage.loss(phase, self.step, random)
            metrics |= {f"{phase}/loss": loss.detach(), **{f"{phase}/{k}": v for k, v in found.items()}}
            metrics[f"{phase}/grad_norm"] = self._descend(phase, loss)
        self._update_average()
        return metrics

    def _descend(self, phase: str, loss: Tensor) -> Tensor:
        """One optimiser step; a step with a gradient that is not finite is skipped and counted."""
        module, optimizer = self.stage.modules[phase], self.optimizers[phase]
        for other in self.stage.modules.values():
            other.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for p in module.parameters() if p.grad is not None]
        if self.world > 1:
            _average_gradients(parameters, self.world)
        norm = nn.utils.clip_grad_norm_(parameters, self.schedule.clip)
        if not torch.isfinite(norm):
            self.skipped += 1
            return norm
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        optimizer.step()
        return norm

    @torch.no_grad()
    def _update_average(self) -> None:
        """Exponential moving average; early on over fewer steps, so that the start is forgotten."""
        decay = min(self.schedule.ema, (1 + self.step) / (10 + self.step))
        source = dict(self.stage.modules[self.stage.averaged].named_parameters())
        for name, parameter in self.average.named_parameters():
            parameter.lerp_(source[name], 1 - decay)

    def _log(self, line: dict[str, float]) -> None:
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            entry = {"step": self.step, "skipped": self.skipped, "time": round(time.time(), 1), **line}
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def save(self) -> None:
        """Write the state; a full disk or an interruption leaves the last good one."""
        if self.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.state_file.with_suffix(".tmp")
        state = {
            "run": self.run,
            "step": self.step,
            "skipped": self.skipped,
            "modules": {name: module.state_dict() for name, module in self.stage.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "average": self.average.state_dict(),
        }
        try:
            torch.save(state, temporary)
            os.replace(temporary, self.state_file)
        finally:
            temporary.unlink(missing_ok=True)

    def _load(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        if state["run"] != self.run:
            raise ValueError(
                f"{self.folder} holds another run ({state['run']}, not {self.run}); choose another --out, or delete it"
            )
        self.step, self.skipped = state["step"], state["skipped"]
        for name, module in self.stage.modules.items():
            module.load_state_dict(state["modules"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        self.average.load_state_dict(state["average"])


def _average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """Mean over processes, in one message."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    flat /= world
    for p, grad in zip(parameters, _split(flat, parameters)):
        p.grad.copy_(grad)


def _split(flat: Tensor, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        yield part.view_as(p)
