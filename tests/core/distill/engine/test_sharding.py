"""Weights in parts over two processes: they save what one process saves, and either goes on from the other's."""

import dataclasses
import logging
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from processes import run_two
from small_stages import CONFIG, SCHEDULE, Noise, assert_equal, flat, stage, teacher

from sprint_core.distill import __main__ as command
from sprint_core.distill.engine.processes import SINGLE_PROCESS, ProcessGroup, launched_processes
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.recipes import Objective, Schedule
from sprint_core.distill.stages.base import Preview, Watch
from sprint_core.distill.stages.student import DistillStage

HALF = 2  # of the schedule's steps
CHECKED = dataclasses.replace(SCHEDULE, check_every=1)
CAME = dataclasses.replace(SCHEDULE, optimizer="came", betas=(0.9, 0.999, 0.9999))


def watched() -> DistillStage:
    """A distillation that the guard checks, and that shows samples."""
    captions = torch.randn(2, 4, CONFIG.caption_width, generator=torch.Generator().manual_seed(3)).unbind()
    preview = Preview(captions, (32, 2, 3), lambda latents: latents[:, :3].movedim(1, -1).sigmoid())
    made = DistillStage(
        teacher(), Noise(), Objective(tangent_warmup_steps=1), preview, watch=Watch(captions, (32, 2, 3), 3.0)
    )
    made.sample_every = HALF
    return made


def trained(out: Path, until: int, processes: ProcessGroup = SINGLE_PROCESS, schedule: Schedule = CHECKED) -> Trainer:
    trainer = Trainer(watched(), schedule, out, processes=processes, keep_every=HALF)
    trainer.train(until=until)
    return trainer


def learnt(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All weights, and the average."""
    modules = {"average": trainer.average, **trainer.stage.modules}
    return {name: flat(module.parameters()) for name, module in modules.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run of one process that two go on with in parts, and the reverse; and the first half of each."""
    folder = tmp_path_factory.mktemp("sharding")
    trained(folder / "one-two", HALF)
    trained(folder / "came", HALF, schedule=CAME)
    run_two(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return folder, learnt(trained(folder, SCHEDULE.steps))


def test_two_processes_go_on_with_a_run_of_one(folders, single):
    for rank in range(2):
        assert_equal(torch.load(folders / f"one-two-{rank}.pt"), single[1])


def test_one_process_goes_on_with_a_run_of_two(folders, single):
    trainer = trained(folders / "two-one", SCHEDULE.steps)
    assert_equal(learnt(trainer), single[1])


def test_a_state_survives_its_parts_bit_for_bit(folders):
    """CAME's, whose moments are matrices, their rows and their columns."""
    before, after = (torch.load(folders / "came" / "distill" / name) for name in ("state.pt", "again/state.pt"))
    moments = before["optimizers"]["student"]["state"]
    assert {key for of in moments.values() for key in of} == {"m", "v", "r", "c", "R", "C"}
    assert after.pop("run") == before.pop("run")
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("file", ["best.safetensors", f"kept/{HALF:06d}.safetensors"])
def test_averages_are_kept_whole(folders, single, file):
    paths = (folder / "distill" / file for folder in (folders / "two", single[0]))
    assert_equal(*map(safetensors.torch.load_file, paths))


def test_samples_are_painted(folders):
    assert [path.name for path in sorted((folders / "two" / "distill" / "samples").iterdir())] == [
        "000002.png",
        "000004.png",
    ]


def test_results_are_whole_in_each_process(folders, single):
    for rank in range(2):
        for which, expected in {"ema": "average", "raw": "student"}.items():
            found = torch.load(folders / f"result-{which}-{rank}.pt")
            torch.testing.assert_close(found, single[1][expected], rtol=0, atol=1e-5)
        best, kept = (torch.load(folders / f"result-{which}-{rank}.pt") for which in ("best", str(HALF)))
        assert best.shape == kept.shape == found.shape and best.isfinite().all() and kept.isfinite().all()


def test_each_process_holds_a_part(folders):
    """Of the student, about half."""
    whole = sum(p.numel() for p in watched().student.parameters())
    for rank in range(2):
        held = torch.load(folders / f"held-{rank}.pt")
        assert 0.4 * whole < held < 0.6 * whole


def test_muon_needs_whole_matrices(tmp_path):
    schedule = dataclasses.replace(SCHEDULE, optimizer="muon")
    with pytest.raises(ValueError, match="--shard: Muon needs whole matrices"):
        Trainer(stage("teacher"), schedule, tmp_path, processes=ProcessGroup(world_size=2, shards=True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--shard: one process has no others to share with; start it by accelerate launch"),
        (["--compile"], "--shard: its parts and --compile's blocks were not tried together"),
        (["--compare"], "--compile, --shard and --tracker are of one model"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, caplog, more, message):
    with caplog.at_level(logging.ERROR):
        assert command.main(["--out", str(tmp_path), "--data", "sprites.zip", "--shard", *more]) == 1
    assert message in caplog.text


def by_two(out: Path) -> None:
    """What each process runs."""
    processes = launched_processes("cpu", shards=True)
    torch.save(learnt(trained(out / "one-two", SCHEDULE.steps, processes)), out / f"one-two-{processes.rank}.pt")
    trained(out / "two-one", HALF, processes)
    came = Trainer(watched(), CAME, out / "came", processes=processes)
    came.folder = came.folder / "again"
    came.save()
    trainer = trained(out / "two", SCHEDULE.steps, processes)
    local = (getattr(p, "to_local", lambda p=p: p)() for p in trainer.stage.modules["student"].parameters())
    torch.save(sum(p.numel() for p in local), out / f"held-{processes.rank}.pt")
    for which in ("ema", "raw", "best", str(HALF)):
        torch.save(flat(trainer.result(which).parameters()), out / f"result-{which}-{processes.rank}.pt")


if __name__ == "__main__":
    by_two(Path(sys.argv[1]))
