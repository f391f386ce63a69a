"""The training loop that every stage shares: steps, gradients, averages, saving and resuming.

A stage (stage.py) says what is learnt and what its loss is; `Trainer` does the rest. All that a run is lies
in one state file, written atomically, and randomness belongs to samples (randomness.py): the same command
after any interruption continues as if there had been none, bit for bit on the CPU.
"""

import copy
import functools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn

from ... import disk
from ...weights import tensorfile
from ..recipes import Objective, Schedule
from . import optimizers, sharding
from .graphs import LossGraphs
from .guard import ERROR, Guard
from .phase import Phase
from .processes import SINGLE_PROCESS, ProcessGroup
from .randomness import DeviceRandom, SampleRandom
from .records import Record
from .stage import LOG_EVERY, Averaged, Stage
from .stop import Stop, Stopped

SAVE_EVERY_SEC = 60
SAVE_SHARE = 0.05  # of the time at most
MIB = 2**20


class Trainer(Generic[Averaged]):
    """Trains one stage in one folder. Raises ValueError if that belongs to another run, OSError for want of disk.

    resume_best: go back to the average with the lowest error, with moments of zero; its schedule and objective may
    differ from what they were. stop: what may end it early. keep_every: steps after which the average is kept in a
    file of its own; 0: never. tracker: draws curves beside TensorBoard's (trackers.py).
    """

    def __init__(
        self,
        stage: Stage[Averaged],
        schedule: Schedule,
        out: Path,
        seed: int = 0,
        processes: ProcessGroup = SINGLE_PROCESS,
        resume_best: bool = False,
        stop: Stop | None = None,
        keep_every: int = 0,
        tracker: str = "",
    ):
        self.stage = stage
        self.stop, self.keep_every, self.tracker = stop or Stop(), keep_every, tracker
        self.schedule = schedule
        self.seed = seed
        self.processes = processes
        self.folder = Path(out) / stage.name
        for module in stage.modules.values():
            module.to(processes.device)
        self.average = copy.deepcopy(stage.average_source).requires_grad_(False)
        self._empty = sharding.like(self.average) if processes.shards else None
        if processes.shards:
            self._shard()
        self.optimizers = self._fresh_optimizers()
        self._averaged = _learnt_pairs(self.average, stage.average_source)
        self.step = 0
        parameters = (p for module in stage.modules.values() for p in module.parameters())
        self.graphs = None if processes.device.type != "cuda" or processes.shards else LossGraphs(parameters)
        self._left_out = {phase.module: _LeftOut(processes.device) for phase in stage.plan}
        self.guard = Guard(self.folder, schedule.stop_factor, writes=processes.rank == 0)
        self.run = {"stage": stage.name, "schedule": schedule.chosen, "seed": seed, **stage.settings}
        if self.state_file.is_file():
            self._load(others=resume_best)
        elif processes.rank == 0:
            self._check_disk()
        if resume_best:
            self._go_back()

    @property
    def skipped(self) -> int:
        """How many updates were left out, as their gradients were not finite."""
        return sum(int(left_out.count) for left_out in self._left_out.values())

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def train(self, until: int | None = None) -> Averaged:
        """Train to the end, or to a step; returns the moving average. Raises TrainingFailed, Stopped."""
        end = min(self.schedule.steps, until or self.schedule.steps)
        if self.step >= end:
            return self.result()
        saved = time.monotonic()
        pause = SAVE_EVERY_SEC
        metrics = {}
        record = Record(self.folder, self.schedule, self.step, self.processes.rank == 0, self.tracker)
        with record, self.stop.listening(), self.stage.reading_ahead(self._asked(self.step, end)):
            if self.step == 0:
                self._report(record, metrics, end)
            while self.step < end:
                metrics |= self._one_step()  # of phases that take turns, the latest of each
                self.step += 1
                record.step()
                self._report(record, metrics, end)
                if self._is_due(self.stage.sample_every, end):
                    self._sample(record)
                if self.keep_every and self.step % self.keep_every == 0:
                    self._keep()
                if self._is_to_save(time.monotonic() - saved > pause):
                    pause = max(SAVE_EVERY_SEC, self.save() / SAVE_SHARE)
                    saved = time.monotonic()
                if self.step < end and self._is_to_stop():
                    self.save()
                    raise Stopped(self.stage.name, self.step, self.stop.reason or "as another process was asked to")
        self.save()
        if not all(sharding.whole(p).isfinite().all() for p in self.average.parameters()):
            raise ValueError(
                f"{self.folder}: the result is not finite after {self.step} steps, {self.skipped} of them skipped; "
                f"lower the rate, --set {self.stage.name}.lr=..., and delete the folder"
            )
        return self.result()

    def result(self, which: str = "ema") -> Averaged:
        """After training: the average, "raw" the network itself, "best" the average that the guard kept, or a step's.

        Whole, where this process trains a part. Raises ValueError where that was not kept.
        """
        if which == "best":
            sharding.load(self.average, self.guard.load_best(self.processes.device))
        elif which not in ("ema", "raw"):
            path = self._kept(int(which))
            if not path.is_file():
                kept = sorted(int(file.stem) for file in path.parent.glob("*.safetensors"))
                raise ValueError(f"{path}: no average was kept after that step; there are {kept}")
            sharding.load(self.average, tensorfile.read(path).tensors)
        network = self.stage.average_source if which == "raw" else self.average
        return network if self._empty is None else sharding.gathered(network, self._empty, self.processes.device)

    def _shard(self) -> None:
        """Leave to this process its part of all networks. Raises ValueError for an optimizer that needs all."""
        if self.schedule.optimizer == "muon":
            raise ValueError(
                f"--shard: Muon needs whole matrices; --set {self.stage.name}.optimizer=adamw with a rate of its own"
            )
        for module in (*self.stage.modules.values(), self.average):
            sharding.shard(module, self.processes)

    def _is_to_stop(self) -> bool:
        """The same in all processes."""
        return self._ask_all(bool(self.stop.reason))

    def _is_to_save(self, due: bool) -> bool:
        """The same in all processes, if all have a part in it."""
        return self._ask_all(due) if self.processes.shards else due

    def _ask_all(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return self.processes.any(flag) if self.processes.world_size > 1 else flag

    def _kept(self, step: int) -> Path:
        return self.folder / "kept" / f"{step:06d}.safetensors"

    def _keep(self) -> None:
        tensors = sharding.state(self.average, self.processes.rank == 0)
        if self.processes.rank == 0:
            tensorfile.write(self._kept(self.step), tensors, {"step": str(self.step)})

    def _one_step(self) -> dict[str, Tensor]:
        metrics = {}
        phases = self.stage.phases(self.step)
        for phase in phases:
            for module in self.stage.modules.values():
                module.zero_grad(set_to_none=True)
            metrics |= {f"{phase.module}/{name}": value for name, value in self._gradients(phase.module).items()}
            metrics[f"{phase.module}/grad_norm"] = self._descend(phase)
        if any(phase.averaged for phase in phases):
            self._update_average()
        return metrics

    def _gradients(self, phase: str) -> dict[str, Tensor]:
        """Gradients of the mean loss over this process's samples, in micro-batches that fit the memory."""
        parts = [*self._micro_batches(phase, self.step)]
        constant = self.stage.constant(phase, self.step) if len(parts) == 1 else None
        if self.graphs is not None and constant is not None:
            (random,) = parts
            assert isinstance(random, DeviceRandom)
            return self.graphs.run((phase, constant), functools.partial(self._backward, phase), random)
        totals = {}
        for random in parts:
            for name, value in self._backward(phase, random).items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def _backward(self, phase: str, random: SampleRandom) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch: its share of the loss and the metrics."""
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.schedule.precision == "bf16"):
            loss, metrics = self.stage.loss(phase, self.step, random)
        share = len(random) * self.processes.world_size / self.schedule.batch
        (loss * share).backward()
        return {name: value * share for name, value in {"loss": loss.detach(), **metrics}.items()}

    def _micro_batches(self, phase: str, step: int) -> Iterator[SampleRandom]:
        """The numbers of this process's samples, as many at a time as fit the memory."""
        samples = self.processes.share(self.schedule.batch)
        size = self.schedule.micro_batch or len(samples)
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            yield self.processes.random(self.seed, step, f"{self.stage.name}/{phase}", part)

    def _asked(self, start: int, end: int) -> Iterator[tuple[str, SampleRandom]]:
        """Phases and numbers of all losses of these steps, in order."""
        for step in range(start, end):
            for phase in self.stage.phases(step):
                yield from ((phase.module, random) for random in self._micro_batches(phase.module, step))

    def _descend(self, phase: Phase) -> Tensor:
        """One optimizer step; one with a gradient that is not finite changes nothing, and is counted.

        Nothing here waits for the device: the optimizers themselves look whether they are to leave the step out.
        """
        parts = [
            [p for p in part.parameters() if p.grad is not None] for part in self.stage.clipped_apart(phase.module)
        ]
        copies = [p for part in parts for p in part if not sharding.is_part(p)]  # parts have mean gradients already
        self.processes.average_gradients(copies)
        clipped = (nn.utils.clip_grad_norm_(part, self.schedule.clip) for part in parts if part)
        norms = torch.stack([sharding.whole(norm) for norm in clipped])
        norm = norms.square().sum().sqrt()
        left_out = ~norm.isfinite()
        self._left_out[phase.module].record(left_out)
        for name, optimizer in self.optimizers.items():
            if name.partition("/")[0] == phase.module:
                optimizer.found_inf = left_out.float()
                optimizers.set_rate(optimizer, phase.rate * self.schedule.rate(self.step))
                optimizer.step()
        return norm

    @torch.no_grad()
    def _update_average(self) -> None:
        """Exponential moving average; early on over fewer updates, so that the start is forgotten."""
        updates = sum(phase.count(self.step) for phase in self.stage.plan if phase.averaged)
        decay = min(self.schedule.ema, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(*self._averaged, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def _is_due(self, every: int, end: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == end)

    def _report(self, record: Record, metrics: dict[str, Tensor], end: int) -> None:
        """Log, and let the guard see what the stage says of its average, where either is due. Raises TrainingFailed."""
        checked = self.stage.check(self.average) if self._is_due(self.schedule.check_every, end) else {}
        checked = dict(zip(checked, self.processes.of_first([*checked.values()]), strict=True))
        if checked or (self.step and self._is_due(LOG_EVERY, end)):
            numbers = torch.tensor(list(checked.values()), device=self.processes.device)
            checks = {f"check/{name}": number for name, number in zip(checked, numbers, strict=True)}
            skipped = {f"{name}/skipped": one.count for name, one in self._left_out.items()}
            record.metrics(self.step, self.skipped, metrics | checks | skipped)
            self.guard.check_left_out(self.step, {name: int(one.in_a_row) for name, one in self._left_out.items()})
        if checked:
            self.guard.record(self.step, checked[ERROR], self.average, last=self.step == self.schedule.steps)

    def _fresh_optimizers(self) -> dict[str, Any]:
        phases = self.stage.modules.items()
        each = (optimizers.fresh(phase, module, self.schedule) for phase, module in phases)
        return {name: optimizer for made in each for name, optimizer in made.items()}

    def _go_back(self) -> None:
        """To the best average, as the network and its average; all other networks are as at the start."""
        tensors = self.guard.load_best(self.processes.device)
        for network in (self.average, self.stage.average_source):
            sharding.load(network, tensors)
        self.step = self.guard.step
        self.optimizers = self._fresh_optimizers()
        self.save()

    @torch.no_grad()
    def _sample(self, record: Record) -> None:
        """By process 0, and by all where each has a part of what paints."""
        if self.processes.rank and not self.processes.shards:
            return
        images = self.stage.samples(self.average)
        if self.processes.rank == 0 and images is not None:
            record.samples(self.step, images)

    # --- the state file -------------------------------------------------------------------------------

    def save(self) -> float:
        """Write the state; a full disk or an interruption leaves the last good one. Returns the seconds it took."""
        if self.processes.rank and not self.processes.shards:
            return 0.0
        started, writes = time.monotonic(), self.processes.rank == 0
        state = {
            "run": self.run,
            "step": self.step,
            "skipped": self.skipped,
            "left_out": {name: one.state for name, one in self._left_out.items()},
            "guard": self.guard.state,
            "modules": {name: sharding.state(module, writes) for name, module in self.stage.modules.items()},
            "optimizers": {name: sharding.optimizer_state(one, writes) for name, one in self.optimizers.items()},
            "average": sharding.state(self.average, writes),
        }
        if writes:
            tensorfile.write_pickle(self.state_file, state)
        return time.monotonic() - started

    def _load(self, others: bool) -> None:
        """others: also the state of a run whose schedule and objective are others."""
        try:
            place = "cpu" if self.processes.shards else self.processes.device  # all of it, of which most is let go
            state = torch.load(self.state_file, weights_only=True, map_location=place)
            known = {**state["run"]}
        except Exception as error:  # on damaged input the unpickler raises anything, IndexError included
            if isinstance(error, OSError) and error.filename is not None:  # the system's: it may be whole
                raise
            raise self._damaged(error) from None
        ignored = {"schedule", *Objective.__dataclass_fields__} - {"method"} if others else set()
        if any(known.get(k) != self.run.get(k) for k in (known.keys() | self.run.keys()) - ignored):
            raise ValueError(
                f"{self.folder} holds another run ({known}, not {self.run}); choose another --out, or delete it"
            )
        try:
            self._take(state, others)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> ValueError:
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        return ValueError(f"{self.state_file} is damaged ({why}); delete {self.folder} to train this stage anew")

    def _take(self, state: dict[str, Any], others: bool) -> None:
        self.step = state["step"]
        for name, left_out in self._left_out.items():
            # before there was a count for each phase, one counted all
            left_out.load(*state.get("left_out", {self.stage.averaged: (state["skipped"], 0)}).get(name, (0, 0)))
        self.guard.load(state.get("guard", self.guard.state))
        sharding.load(self.average, state["average"])
        if others:  # whoever goes back begins with the critic, or the fake network, as it was at first
            return
        for name, module in self.stage.modules.items():
            sharding.load(module, state["modules"][name])
        for name, optimizer in self.optimizers.items():
            sharding.load_optimizer(optimizer, state["optimizers"][name])

    def _check_disk(self) -> None:
        """A state twice, as the old one stays until the new one is whole: weights, average and up to two moments."""
        disk.check_writable(self.folder / "state.pt")
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = 2 * 4 * sum(p.nbytes for module in self.stage.modules.values() for p in module.parameters())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder} needs {needed / MIB:.0f} MiB for its state, and {free / MIB:.0f} MiB are free"
            )


class _LeftOut:
    """A phase's updates that were left out, and how many of them in a row to the last; counted on the device."""

    def __init__(self, device: torch.device):
        self.count, self.in_a_row = torch.zeros(2, dtype=torch.int64, device=device)

    def record(self, left_out: Tensor) -> None:
        self.count += left_out
        self.in_a_row.add_(1).mul_(left_out)

    @property
    def state(self) -> tuple[int, int]:
        return int(self.count), int(self.in_a_row)

    def load(self, count: int, in_a_row: int) -> None:
        self.count.fill_(count)
        self.in_a_row.fill_(in_a_row)


def _learnt_pairs(average: nn.Module, source: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of both networks, but for frozen ones, which are the same in both."""
    pairs = zip(average.parameters(), source.parameters(), strict=True)
    mine, theirs = zip(*((one, other) for one, other in pairs if other.requires_grad), strict=True)
    return list(mine), list(theirs)
