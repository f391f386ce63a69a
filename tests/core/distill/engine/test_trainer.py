"""The training loop: resuming, skipping, averaging and sharing a batch, on a toy stage."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from processes import run_two
from torch import nn
from toy_stage import SCHEDULE, Toy, weights

from sprint_core.distill.engine.processes import ProcessGroup, launched_processes
from sprint_core.distill.engine.randomness import SampleRandom, initialise
from sprint_core.distill.engine.records import Record
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.recipes import RECIPES, SHAPES_AUTOENCODER, Schedule, override
from sprint_core.distill.stages import autoencoder as stages
from sprint_core.latent import SCALE
from sprint_core.models.autoencoder import Autoencoder


def test_resume_equals_uninterrupted_bit_for_bit(tmp_path):
    whole = Trainer(Toy(), SCHEDULE, tmp_path / "whole")
    whole.train()
    Trainer(Toy(), SCHEDULE, tmp_path / "parts").train(until=5)
    resumed = Trainer(Toy(), SCHEDULE, tmp_path / "parts")
    assert resumed.step == 5
    resumed.train()
    for (name, a), b in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_that_has_ended_does_nothing(tmp_path):
    first = Trainer(Toy(), SCHEDULE, tmp_path)
    first.train()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = Trainer(Toy(), SCHEDULE, tmp_path)
    again.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(again).values(), strict=True))
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_damaged_state_is_named(tmp_path):
    first = Trainer(Toy(), SCHEDULE, tmp_path)
    first.train(until=1)
    first.state_file.write_bytes(first.state_file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"state.pt is damaged .* delete"):
        Trainer(Toy(), SCHEDULE, tmp_path)


STATES = {
    "nothing": lambda state: None,
    "a list": lambda state: [1, 2],
    "no run": lambda state: {k: v for k, v in state.items() if k != "run"},
    "no step": lambda state: {k: v for k, v in state.items() if k != "step"},
    "no weights": lambda state: state | {"modules": {}},
    "other weights": lambda state: state | {"average": {"x": torch.zeros(3)}},
    "no moments": lambda state: state | {"optimizers": dict.fromkeys(state["optimizers"], 5)},
}


@pytest.mark.parametrize("damage", STATES)
def test_a_state_that_is_none_is_named(tmp_path, damage):
    """A file that PyTorch reads, with something else in it."""
    first = Trainer(Toy(), SCHEDULE, tmp_path)
    first.train(until=1)
    torch.save(STATES[damage](torch.load(first.state_file, weights_only=True)), first.state_file)
    with pytest.raises(ValueError, match=r"state.pt is damaged .* delete") as error:
        Trainer(Toy(), SCHEDULE, tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_numbers_of_a_training_are_left_out(tmp_path):
    """Half a line of an interruption, and what is no line of a training at all, in any bytes."""
    record = Trainer(Toy(), SCHEDULE, tmp_path).folder
    good, late = b'{"step": 1, "a": 2}\n', b'{"step": 9}\n'
    lines = (good, b"[5]}\n", b"\xff}\n", b'{"steps": 1}\n', b'{"step": "1"}\n', late, b'{"step": 1')
    (record / "metrics.jsonl").write_bytes(b"".join(lines))
    with Record(record, SCHEDULE, 4, writes=True):
        assert (record / "metrics.jsonl").read_bytes() == good


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


def test_the_first_step_is_clipped_and_warmed_up(tmp_path):
    """Adam keeps a tenth of the clipped gradient, and moves every weight by the rate of step 0; nothing decays."""
    trainer = Trainer(Toy(), dataclasses.replace(SCHEDULE, clip=1e-3, warmup_steps=4), tmp_path)
    before = weights(trainer)
    trainer.train(until=1)
    kept = torch.cat([state["exp_avg"].flatten() for state in trainer.optimizers["student"].state.values()])
    assert kept.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)
    moved = [(before[f"student.{k}"] - v).abs() for k, v in trainer.stage.modules["student"].state_dict().items()]
    torch.testing.assert_close(torch.cat([m.flatten() for m in moved]), torch.full((8,), 0.05 / 4), rtol=1e-3, atol=0)


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
    assert {file.suffix for file in (tmp_path / "toy").iterdir()} <= {".jsonl", ".pt", ""}
    assert Trainer(Toy(), SCHEDULE, tmp_path).step == 3


def one_of_two(out: str) -> None:
    """What each process of the next test runs."""
    processes = launched_processes("cpu")
    trainer = Trainer(Toy(), SCHEDULE, f"{out}/shared", processes=processes)
    trainer.train()
    torch.save(weights(trainer), f"{out}/rank{processes.rank}.pt")


def test_two_processes_equal_one(tmp_path):
    run_two(__file__, tmp_path)
    single = Trainer(Toy(), SCHEDULE, tmp_path / "single")
    single.train()
    for rank in range(2):
        shared = torch.load(tmp_path / f"rank{rank}.pt")
        for name, value in weights(single).items():
            torch.testing.assert_close(shared[name], value, rtol=1e-5, atol=1e-6)
    lines = (tmp_path / "shared" / "toy" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1  # one process writes


def test_batches_split_without_loss():
    assert [list(ProcessGroup(rank=rank, world_size=2).share(4)) for rank in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="does not divide"):
        ProcessGroup(world_size=2).share(3)


def test_micro_batches_equal_the_whole_batch(tmp_path):
    whole = Trainer(Toy(), SCHEDULE, tmp_path / "whole")
    parts = Trainer(Toy(), dataclasses.replace(SCHEDULE, micro_batch=3), tmp_path / "parts")
    for trainer in (whole, parts):
        trainer.train()
    for (name, a), b in zip(weights(whole).items(), weights(parts).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_numbers_and_pictures_are_recorded(tmp_path):
    """As JSON lines, PNG and for TensorBoard; a resumed run leaves no line twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "toy"
    Trainer(Toy(bad_step=11), SCHEDULE, tmp_path).train(until=12)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12 and lines[-1]["skipped"] == 2  # both phases
    assert lines[-1]["student/loss"] is None  # NaN is no JSON
    assert {"student/grad_norm", "critic/loss", "critic/x", "images_per_sec"} <= set(lines[-1])
    assert Image.open(folder / "samples" / "000012.png").size == (4, 4)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert "critic/x" in events.Tags()["scalars"] and events.Tags()["images"] == ["samples"]
    (folder / "metrics.jsonl").write_text('{"step": 12}\n{"step": 20}\n{"step')
    with Record(folder, SCHEDULE, step=12, writes=True):
        pass
    assert (folder / "metrics.jsonl").read_text() == '{"step": 12}\n'


def test_too_little_disk_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(OSError, match="MiB for its state, and 0 MiB are free"):
        Trainer(Toy(), SCHEDULE, tmp_path)


def test_came_trains_and_resumes(tmp_path):
    schedule = dataclasses.replace(SCHEDULE, optimizer="came", betas=(0.9, 0.999, 0.9999))
    whole = Trainer(Toy(), schedule, tmp_path / "whole")
    start = weights(whole)
    whole.train()
    Trainer(Toy(), schedule, tmp_path / "parts").train(until=5)
    resumed = Trainer(Toy(), schedule, tmp_path / "parts")
    resumed.train()
    for (name, a), b in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, start[name]), name


class Wide(Toy):
    """The same with matrices that Muon takes."""

    def __init__(self, bad_step: int = -1):
        super().__init__(bad_step)
        self.modules = {"student": nn.Linear(3, 2), "critic": nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 8))}
        for seed, module in enumerate(self.modules.values()):
            initialise(module, seed)


def test_muon_trains_skips_and_resumes(tmp_path):
    schedule = dataclasses.replace(SCHEDULE, optimizer="muon")
    whole = Trainer(Wide(), schedule, tmp_path / "whole")
    start = weights(whole)
    assert {name: type(optimizer).__name__ for name, optimizer in whole.optimizers.items()} == {
        "student/rest": "AdamW", "critic": "Muon", "critic/rest": "AdamW"
    }  # fmt: skip
    whole.train()
    Trainer(Wide(), schedule, tmp_path / "parts").train(until=6)
    resumed = Trainer(Wide(), schedule, tmp_path / "parts")
    resumed.train()
    for (name, a), b in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, start[name]), name
    bad = Trainer(Wide(bad_step=3), schedule, tmp_path / "bad")
    bad.train(until=3)
    before = weights(bad)
    bad.train(until=4)
    assert bad.skipped == 2
    assert all(torch.equal(before[k], v) for k, v in weights(bad).items() if not k.startswith("average"))


def test_the_critic_may_have_betas_of_its_own(tmp_path):
    trainer = Trainer(Toy(), dataclasses.replace(SCHEDULE, betas=(0.0, 0.9), critic_betas=(0.5, 0.8)), tmp_path)
    betas = {name: optimizer.param_groups[0]["betas"] for name, optimizer in trainer.optimizers.items()}
    assert betas == {"student": (0.0, 0.9), "critic": (0.5, 0.8)}
    with pytest.raises(ValueError, match="adamw does not take 3 betas"):
        dataclasses.replace(SCHEDULE, critic_betas=(0.5, 0.8, 0.9))


def test_a_fake_network_may_have_betas_of_its_own():
    own = dataclasses.replace(SCHEDULE, betas=(0.0, 0.9), fake_betas=(0.9, 0.99))
    assert {module: own.betas_of(module) for module in ("student", "critic", "fake")} == {
        "student": (0.0, 0.9),
        "critic": (0.0, 0.9),
        "fake": (0.9, 0.99),
    }
    with pytest.raises(ValueError, match="adamw does not take 1 betas"):
        dataclasses.replace(SCHEDULE, fake_betas=(0.5,))
    with pytest.raises(ValueError, match="betas must lie in 0 to 1"):
        dataclasses.replace(SCHEDULE, fake_betas=(0.5, 1.0))


class Parts(Toy):
    """Two layers, each of which is clipped by itself."""

    def __init__(self):
        super().__init__()
        self.modules["student"] = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))

    def samples(self, average):
        return None

    def clipped_apart(self, phase):
        return tuple(self.modules[phase].children())


def test_parts_are_clipped_apart(tmp_path):
    schedule = dataclasses.replace(SCHEDULE, clip=1e-3, betas=(0.0, 0.9))
    trainer = Trainer(Parts(), schedule, tmp_path)
    trainer.train(until=1)
    for part in trainer.stage.modules["student"]:
        kept = torch.cat([trainer.optimizers["student"].state[p]["exp_avg"].flatten() for p in part.parameters()])
        assert kept.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_numbers_drawn_on_a_device_resume(tmp_path):
    """One generator for all samples, with the key of the phase: other numbers, and no trace of an interruption."""
    device = ProcessGroup(draws_on_device=True)
    whole, plain = Trainer(Toy(), SCHEDULE, tmp_path / "a", 0, device), Trainer(Toy(), SCHEDULE, tmp_path / "b")
    Trainer(Toy(), SCHEDULE, tmp_path / "c", 0, device).train(until=5)
    resumed = Trainer(Toy(), SCHEDULE, tmp_path / "c", 0, device)
    for trainer in (whole, plain, resumed):
        trainer.train()
    found, other, again = (weights(trainer) for trainer in (whole, plain, resumed))
    assert all(torch.equal(value, again[name]) for name, value in found.items())
    assert not any(torch.equal(value, other[name]) for name, value in found.items())


def test_a_device_draws_what_a_sample_does():
    """The same distributions and shapes; other keys, other numbers."""
    device = ProcessGroup(draws_on_device=True)
    drawn = lambda *key: device.random(*key, range(4, 2004))  # noqa: E731
    random = drawn(1, 2, "a")
    normal, uniform, integers, choice = (
        random.normal(3),
        random.uniform(),
        random.integers(7),
        random.choice((2.0, 5.0)),
    )
    assert len(random) == 2000 and normal.shape == (2000, 3) and uniform.shape == (2000,)
    assert normal.mean().abs() < 0.05 and normal.std().sub(1).abs() < 0.05
    assert uniform.min() >= 0 and uniform.max() < 1 and uniform.mean().sub(0.5).abs() < 0.03
    assert integers.unique().tolist() == list(range(7)) and choice.unique().tolist() == [2.0, 5.0]
    assert torch.equal(normal, drawn(1, 2, "a").normal(3))
    others = [drawn(2, 2, "a"), drawn(1, 3, "a"), drawn(1, 2, "b"), device.random(1, 2, "a", range(8, 2008))]
    assert not any(torch.equal(normal, other.normal(3)) for other in others)


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
    settings = ["teacher.steps=7", "teacher.lr=1e-3", "distill.guidance=2,3", "distill.activation_checkpointing=true"]
    recipe = override(RECIPES["demo"], settings)
    assert recipe.stages["teacher"] == dataclasses.replace(RECIPES["demo"].stages["teacher"], steps=7, lr=1e-3)
    assert recipe.objective.guidance == (2.0, 3.0) and recipe.stages["distill"].activation_checkpointing is True
    together = override(RECIPES["demo"], ["distill.optimizer=came", "distill.betas=0.9,0.99,0.999"])
    assert together.stages["distill"].betas == (0.9, 0.99, 0.999)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("teacher.stepz=1", "no setting stepz; there are steps"),
        ("teacher.steps", "STAGE.KEY=VALUE"),
        ("nurse.steps=1", "with a stage of autoencoder"),
        ("teacher.steps=many", "'many' is no int"),
        ("teacher.steps=0", "teacher: steps and batch must be 1 or more"),
        ("teacher.lr=inf", "lr must lie in 0 to 1"),
        ("teacher.ema=1", "ema and betas"),
        ("teacher.decay=2", "decay in 0 to 1"),
        ("distill.max_time_share=50", "distill: max_time_share must lie in 0 to 1"),
        ("distill.guidance=nan", "guidance scales"),
        ("distill.noise_std=-1", "noise_std and critic_std"),
        ("distill.noise_mean=inf", "must be numbers"),
        ("distill.steps=100", "lower distill.ladd_from"),
        ("teacher.activation_checkpointing=perhaps", "'perhaps' is no bool"),
        ("distill.precision=fp8", "there are fp32 and bf16"),
        ("distill.optimizer=came", "does not take 2 betas"),
        ("distill.guidance=", "STAGE.KEY=VALUE"),
    ],
)
def test_bad_overrides_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        override(RECIPES["demo"], [setting])


def test_published_recipes_are_the_published_numbers():
    """NVlabs/Sana configs/sana_sprint_config, and the paper's appendix where it differs."""
    for name in ("sprint-0.6B", "sprint-1.6B"):
        recipe = RECIPES[name]
        distill, objective = recipe.stages["distill"], recipe.objective
        assert (distill.steps, distill.batch, distill.lr, distill.clip) == (20000, 512, 2e-6, 0.1)
        assert (distill.optimizer, distill.betas) == ("came", (0.9, 0.999, 0.9999))
        assert distill.rate(10000) == distill.rate(19999) == 2e-6  # constant after the warm-up
        assert (recipe.stages["teacher"].lr, recipe.stages["teacher"].batch) == (2e-5, 1024)
        assert (objective.scm_weight, objective.ladd_weight, objective.max_time_share) == (1.0, 0.5, 0.5)
        assert objective.guidance == (4.0, 4.5, 5.0) and objective.tangent_warmup_steps == 4000
        assert (objective.noise_mean, objective.noise_std) == (0.2, 1.6)
        assert (objective.critic_mean, objective.critic_std) == (-0.6, 1.0)


def test_small_worlds_have_the_objective_that_holds():
    """The measured ratio of both weights, LADD from where the tangent is warm, and a student without momentum."""
    for name, warm in (("demo", 100), ("shapes", 150), ("shapes-control", 150)):
        recipe = RECIPES[name]
        aim, schedule = recipe.objective, recipe.stages[recipe.last]
        assert (aim.form, aim.tangent, aim.scm_weight, aim.ladd_weight) == ("cosine", "difference", 0.2, 0.5)
        assert aim.ladd_from == aim.tangent_warmup_steps == warm and schedule.betas == (0.0, 0.99)
    control = RECIPES["demo-control"]
    aim = control.objective
    assert (aim.form, aim.scm_weight, aim.ladd_weight, aim.noise_mean) == ("flow", 1.0, 0.0, 2.0)
    published = RECIPES["sprint-1.6B"].objective
    assert (published.form, published.tangent) == ("published", "jvp")


def test_folding_normalises_latents_and_keeps_images():
    """Channels come out with std 1/SCALE and mean 0; inside the border the image stays what it was."""
    model = Autoencoder(SHAPES_AUTOENCODER).eval()
    initialise(model, 0)
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
    model = Autoencoder(SHAPES_AUTOENCODER)
    initialise(model, 0)
    stage = stages.WholeStage(
        model, stages.SeededImages(lambda seeds: picture.expand(len(seeds), -1, -1, -1), 10), steps=4
    )
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
    one_of_two(sys.argv[1])
