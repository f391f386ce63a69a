"""Curves beside TensorBoard's, by trackers of Accelerate: a real one of its interface, registered in its table."""

import pytest
import torch
from accelerate import PartialState, tracking
from accelerate.logging import get_logger
from toy_stage import SCHEDULE, Toy

from sprint_core.distill.engine import trackers
from sprint_core.distill.engine.trainer import Trainer


class Lines(tracking.GeneralTracker):
    """Keeps what it is given in lines of text in its folder."""

    name = "lines"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str, **_):
        super().__init__()
        self.path = f"{logging_dir}/lines.txt"
        self.project = run_name

    @property
    def tracker(self):
        return self.path

    def write(self, *words) -> None:
        with open(self.path, "a") as file:
            print(*words, file=file)

    def start(self):
        get_logger(__name__).debug("as Accelerate's own do")
        self.write("start", self.project)

    def store_init_configuration(self, values):
        self.write("settings", values)

    def log(self, values, step=None, **_):
        self.write("log", step, *(f"{name}={number}" for name, number in values.items()))

    def log_images(self, values, step=None, **_):
        self.write("images", step, *(f"{name}={array.shape}" for name, array in values.items()))

    def finish(self):
        self.write("finish")


@pytest.fixture(autouse=True)
def alone():
    """A process without Accelerate's state, before and after."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


def test_a_tracker_of_accelerate_gets_numbers_and_images(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "lines", Lines)
    trackers.check("lines")
    Trainer(Toy(bad_step=11), SCHEDULE, tmp_path, tracker="lines").train()
    lines = (tmp_path / "toy" / "lines.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["start", "settings", "log", "images", "finish"]
    assert lines[0] == "start sana-sprint" and "'steps': '12'" in lines[1]
    assert lines[2].startswith("log 12 ") and "critic/x=" in lines[2] and "student/loss=" not in lines[2]  # NaN
    assert lines[3] == "images 12 samples=(1, 4, 4, 3)"
    assert (tmp_path / "toy" / "tensorboard").is_dir()


def test_none_is_opened_that_nobody_asked_for(tmp_path):
    (only,) = trackers.opened("", tmp_path, {})
    (same,) = trackers.opened("tensorboard", tmp_path, {})
    assert type(only) is type(same) is trackers.TensorBoard
    for one in (only, same):
        one.close()


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match="--tracker lines: there are aim, clearml, comet_ml"):
        trackers.check("lines")
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match="--tracker wandb: it is not installed: pip install wandb"):
        trackers.check("wandb")


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    one = trackers.Accelerated("wandb", tmp_path, {"steps": "3"})
    one.numbers(1, {"loss": 0.5})
    one.images(1, torch.zeros(4, 4, 3, dtype=torch.uint8))
    one.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
