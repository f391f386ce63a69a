"""The training loop: resuming, skipping, averaging and sharing a batch, on a toy stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sprint_core.autoencoder import Autoencoder
from sprint_core.autoencoder_config import SCALE
from sprint_core.distill import autoencoder as stages
from sprint_core.distill.randomness import SampleRandom
from sprint_core.distill.recipes import DEMO_AUTOENCODER, Schedule, override
from sprint_core.distill.trainer import Trainer, batch_samples

ROOT = Path(__file__).resolve().parents[2]
SCHEDULE = Schedule(steps=12, batch=4, lr=0.05, warmup_steps=3, ema=0.9)


class Toy:
    """Two modules, trained in turn, on noise."""

    name, averaged = "toy", "student"

    def __init__(self, bad_step: int = -1):
        self.modules = {"student": nn.Linear(3, 2), "critic": nn.Linear(2, 1)}
        for seed, module in enumerate(self.modules.values()):
            stages.initialise(module, seed)
        self.bad_step = bad_step

    def phases(self, step):
        return ("student",) if step % 2 == 0 else ("student", "critic")

    def loss(self, phase, step, random):
        x = random.normal(3)
        loss = self.modules["critic"](self.modules["student"](x)).square().mean() + random.uniform().mean()
        return (loss * float("nan") if step == self.bad_step else loss), {"x": x.mean()}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    parts = {**trainer.stage.modules, "average": trainer.average}
    return {f"{n}.{k}": v.clone() for n, module in parts.items() for k, v in module.state_dict().items()}


def test_resume_equals_uninterrupted_bit_for_bit(tmp_path):
    whole = Trainer(Toy(), SCHEDULE, tmp_path / "whole")
    whole.train()
    Trainer(Toy(), SCHEDULE, tmp_path / "parts").train(until=5)
    resumed = Trainer(Toy(), SCHEDULE, tmp_path / "parts")
    assert resumed.step == 5
    resumed.train()
    for (name, a), b in zip(weights(whole).items(), weights(resumed).values()):
        assert torch.equal(a, b), name


def test_a_run_that_has_ended_does_nothing(tmp_path):
    first = Trainer(Toy(), SCHEDULE, tmp_path)
    first.train()
    again = Trainer(Toy(), SCHEDULE, tmp_path)
    again.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(again).values()))


def test_folder_of_another_run_is_refused(tmp_path):
    Trainer(Toy(), SCHEDULE, tmp_path).train(until=1)
    with pytest.raises(ValueError, match="another run"):
        Trainer(Toy(), SCHEDULE, tmp_path, seed=1)


def test_nan_steps_are_skipped_and_counted(tmp_path):
    trainer = Trainer(Toy(bad_step=4), SCHEDULE, tmp_path)
    trainer.train(until=4)
    before = weights(trainer)
    trainer.train(until=5)
    student = {k: v for k, v in weights(trainer).items() if k.startswith("student")}
    assert trainer.skipped == 1
    assert all(torch.equal(before[name], value) for name, value in student.items())
    trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_average_is_the_closed_form(tmp_path):
    trainer = Trainer(Toy(), SCHEDULE, tmp_path)
    expected = trainer.average.weight.clone()
    for step in range(6):
        trainer.train(until=step + 1)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trainer.stage.modules["student"].weight.detach()
    torch.testing.assert_close(trainer.average.weight, expected)


def test_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch):
    trainer = Trainer(Toy(), SCHEDULE, tmp_path)
    trainer.train(until=3)

    def fail(state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        trainer.train(until=6)
    assert [file.name for file in sorted((tmp_path / "toy").iterdir())] == ["metrics.jsonl", "state.pt"]
    assert Trainer(Toy(), SCHEDULE, tmp_path).step == 3


def test_metrics_are_json_lines(tmp_path):
    Trainer(Toy(), SCHEDULE, tmp_path).train()
    lines = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12
    assert {"student/loss", "student/grad_norm", "critic/loss", "critic/x", "skipped"} <= set(lines[-1])


def two_processes(rank: int, out: str) -> None:
    address = f"file://{out}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    trainer = Trainer(Toy(), SCHEDULE, f"{out}/shared", rank=rank, world=2)
    trainer.train()
    torch.save(weights(trainer), f"{out}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(2)]
    workers = [subprocess.Popen(command, env=environment) for command in commands]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    single = Trainer(Toy(), SCHEDULE, tmp_path / "single")
    single.train()
    for rank in range(2):
        shared = torch.load(tmp_path / f"rank{rank}.pt")
        for name, value in weights(single).items():
            torch.testing.assert_close(shared[name], value, rtol=1e-5, atol=1e-6)


def test_batches_split_without_loss():
    assert [list(batch_samples(4, rank, 2)) for rank in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="does not divide"):
        batch_samples(3, 0, 2)


def test_randomness_belongs_to_the_sample():
    whole = SampleRandom(1, 2, "a", range(4)).normal(5)
    assert torch.equal(whole[2:], SampleRandom(1, 2, "a", range(2, 4)).normal(5))
    for other in (
        SampleRandom(2, 2, "a", range(4)),
        SampleRandom(1, 3, "a", range(4)),
        SampleRandom(1, 2, "b", range(4)),
    ):
        assert not torch.equal(whole, other.normal(5))


def test_learning_rate_rises_and_falls():
    rates = [Schedule(100, 1, 1.0, warmup_steps=10, decay=0.5).rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[40] == 1.0 and rates[99] == pytest.approx(0.02)


def test_overrides_keep_their_type():
    assert override(SCHEDULE, {"steps": "7", "lr": "1e-3"}) == Schedule(7, 4, 1e-3, warmup_steps=3, ema=0.9)
    with pytest.raises(ValueError, match="no setting stepz; there are steps"):
        override(SCHEDULE, {"stepz": "1"})


def test_folding_normalises_latents_and_keeps_images():
    """Channels come out with std 1/SCALE and mean 0; inside the border the image stays what it was."""
    model = Autoencoder(DEMO_AUTOENCODER).eval()
    stages.initialise(model, 0)
    images = torch.rand((2, 3, 256, 256), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        model.encoder.conv_out.bias.add_(torch.linspace(-2, 2, 32))
        latent = model.encode(images)
        before = model.decoder.conv_in(latent)
        mean, std = stages.latent_statistics(model, [images])
        stages.fold(model, mean, std)
        folded = model.encode(images)
        after = model.decoder.conv_in(folded)
    flat = folded.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(flat.std(0) * SCALE, torch.ones(32), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flat.mean(0), torch.zeros(32), rtol=0, atol=1e-4)
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(after[inside], before[inside], rtol=1e-4, atol=1e-4)


def test_autoencoder_stage_learns():
    """A few steps on one picture lower the loss, through crops as well as whole images."""
    picture = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture = nn.functional.interpolate(picture, size=(256, 256), mode="bilinear")
    model = Autoencoder(DEMO_AUTOENCODER)
    stages.initialise(model, 0)
    stage = stages.WholeStage(model, lambda seeds: picture.expand(len(seeds), -1, -1, -1), steps=4, pool=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in (0, 0, 0, 0, 3):
        loss, metrics = stage.loss(stage.name, step, SampleRandom(0, 0, "", range(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[3] < losses[0] and metrics["psnr"].isfinite()


if __name__ == "__main__":
    two_processes(int(sys.argv[1]), sys.argv[2])
