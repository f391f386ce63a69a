"""Reading ahead: the same training in less time, and no thread that outlives it."""

import contextlib
import dataclasses
import itertools
import threading
import time
from pathlib import Path

import pytest
import standin
import torch
from latent_caches import WIDTH, latent_cache
from torch import nn

from sprint_core.distill.dataset.batch import Batch
from sprint_core.distill.dataset.latent_cache import LatentCache, Shard
from sprint_core.distill.dataset.read_ahead import reading_ahead
from sprint_core.distill.engine.processes import ProcessGroup
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.engine.stage import Stage
from sprint_core.distill.engine.stop import Stop, Stopped
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.recipes import Objective, Schedule, with_method
from sprint_core.distill.stages.base import Embedded
from sprint_core.distill.stages.control import ControlStage
from sprint_core.distill.stages.rivals import distill_stage
from sprint_core.distill.stages.teacher import TeacherStage
from sprint_core.models.transformer import SanaTransformer

SCHEDULE = Schedule(steps=4, batch=2, lr=1e-3, micro_batch=1, warmup_steps=1)
STAGES = ("teacher", "dmd2", "control")
CPU = torch.device("cpu")


def stage(name: str, folder: Path) -> Stage:
    config = dataclasses.replace(standin.TEACHER, guidance_embed=name == "control", depth=2)
    transformer = SanaTransformer(config)
    transformer.load_state_dict(standin.random_model(transformer))
    cache = latent_cache(folder, hints=name == "control")
    model = Embedded(transformer, cache.null)
    if name == "teacher":
        return TeacherStage(model, cache)
    if name == "control":
        return ControlStage(model, cache, Objective(tangent_warmup_steps=1))
    return distill_stage(model, cache, Objective(**with_method({"method": name, "tangent_warmup_steps": 1})))


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [tensor for module in trainer.stage.modules.values() for tensor in module.state_dict().values()]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reading ahead")]


def randoms(count: int = 100) -> list[SampleRandom]:
    return [SampleRandom(0, step, "test", range(4)) for step in range(count)]


@pytest.mark.parametrize("name", STAGES)
def test_training_is_the_same_bit_for_bit(name, tmp_path, monkeypatch):
    """Also where it is interrupted, and where nothing is read ahead: each stage says how often it reads."""
    out, batches = iter(tmp_path / n for n in "abc"), []
    read = LatentCache._read
    monkeypatch.setattr(LatentCache, "_read", lambda *args: batches.append(threading.current_thread()) or read(*args))
    whole = Trainer(stage(name, tmp_path), SCHEDULE, next(out))
    whole.train()
    reads, in_threads = len(batches), {thread.name.startswith("reading ahead") for thread in batches}
    parts = next(out)
    Trainer(stage(name, tmp_path), SCHEDULE, parts).train(until=2)
    resumed = Trainer(stage(name, tmp_path), SCHEDULE, parts)
    resumed.train()
    assert in_threads == {True} and not threads()
    batches.clear()
    monkeypatch.setattr(LatentCache, "reading_ahead", lambda *args: contextlib.nullcontext())
    plain = Trainer(stage(name, tmp_path), SCHEDULE, next(out))
    plain.train()
    assert len(batches) == reads and set(batches) == {threading.main_thread()}
    for a, b, c in zip(weights(whole), weights(resumed), weights(plain), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_batch_is_that_of_the_same_numbers(tmp_path):
    cache, asked = latent_cache(tmp_path), randoms(5)
    expected = [cache.batch(random) for random in randoms(5)]
    with cache.reading_ahead(iter(randoms(5)), CPU):
        batches = [cache.batch(random) for random in asked]
    for a, b in zip(batches, expected, strict=True):
        assert torch.equal(a.latents, b.latents) and a.hints is None
        assert all(torch.equal(one, other) for one, other in zip(a.captions, b.captions, strict=True))
    # in memory, rather than views of a mapped file, which would be read in the step
    rows = batches[0].captions
    assert rows[0].untyped_storage().nbytes() == sum(row.nbytes for row in rows)


def test_another_order_is_an_error(tmp_path):
    cache, asked = latent_cache(tmp_path), randoms(3)
    with pytest.raises(AssertionError, match="in another order"), cache.reading_ahead(iter(randoms()), CPU):
        cache.batch(asked[1])
    assert not threads()


def test_what_fails_in_the_thread_is_raised_where_it_is_needed(tmp_path, monkeypatch):
    read, calls = Shard.caption, itertools.count()

    def fail(self, i):
        if next(calls) == 6:
            raise OSError("the disk is gone")
        return read(self, i)

    monkeypatch.setattr(Shard, "caption", fail)
    trainer = Trainer(stage("teacher", tmp_path), SCHEDULE, tmp_path / "out")
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    assert trainer.step == 3 and not threads()  # of two samples a step: all before were good


def test_a_training_that_stops_leaves_no_thread(tmp_path):
    with pytest.raises(Stopped):
        Trainer(stage("teacher", tmp_path), SCHEDULE, tmp_path / "out", stop=Stop(1e-9)).train()
    assert not threads()


def test_no_more_is_read_than_is_needed_next(tmp_path, monkeypatch):
    cache, read = latent_cache(tmp_path), []
    original = LatentCache._read
    monkeypatch.setattr(LatentCache, "_read", lambda self, random: read.append(0) or original(self, random))
    asked = randoms()
    with cache.reading_ahead(iter(randoms()), CPU):
        cache.batch(asked[0])
        time.sleep(0.05)
        assert len(read) == 3  # one is taken, and two wait


def test_numbers_of_data_are_nobody_elses():
    """The same for any device and number of processes, and moved by no draw."""
    whole, draws = SampleRandom(1, 2, "a", range(4)), ProcessGroup(draws_on_device=True)
    whole.normal(3)
    first, second = (whole.of_data().integers(1000).tolist() for _ in range(2))
    assert first != second
    mine, other = (draws.random(1, 2, "a", samples) for samples in (range(2), range(2, 4)))
    assert mine.of_data().integers(1000).tolist() + other.of_data().integers(1000).tolist() == first


class SlowDisk(LatentCache):
    """A read takes 20 ms."""

    def _read(self, random: SampleRandom) -> Batch:
        time.sleep(0.02)
        return super()._read(random)


class Reader(Stage):
    """A step takes 30 ms; counts the seconds that it waits for its data."""

    name = averaged = "reader"

    def __init__(self, dataset: LatentCache, ahead: bool):
        super().__init__({self.name: nn.Linear(WIDTH, 1)}, {})
        self.dataset, self.ahead, self.waited_sec = dataset, ahead, 0.0

    def reading_ahead(self, asked):
        randoms = (random for _, random in asked)
        return reading_ahead(self.dataset, randoms, CPU) if self.ahead else contextlib.nullcontext()

    def loss(self, phase, step, random):
        started = time.monotonic()
        batch = self.dataset.batch(random)
        self.waited_sec += time.monotonic() - started
        time.sleep(0.03)
        return self.modules[self.name](torch.cat(list(batch.captions)).float()).mean(), {}


def test_a_slow_disk_is_not_waited_for(tmp_path):
    schedule, waited = Schedule(steps=12, batch=2, lr=1e-3), {}
    for ahead in (False, True):
        reader = Reader(latent_cache(tmp_path, kind=SlowDisk), ahead)
        Trainer(reader, schedule, tmp_path / str(ahead)).train()
        waited[ahead] = reader.waited_sec
    assert waited[False] > 12 * 0.02 and waited[True] < 0.5 * waited[False], waited


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_batch_is_there(tmp_path):
    cache, device, asked = latent_cache(tmp_path, hints=True), torch.device("cuda", 0), randoms(20)
    expected = [cache.batch(random) for random in randoms(20)]
    with cache.reading_ahead(iter(randoms(20)), device):
        for random, direct in zip(asked, expected, strict=True):
            batch = cache.batch(random)
            assert batch.latents.device == device and torch.equal(batch.latents.cpu(), direct.latents)
            assert torch.equal(batch.hints.cpu(), direct.hints)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(batch.captions, direct.captions, strict=True))
