"""Stopping a training: at a signal, when its hours are over, in all processes at once; and what is kept of it."""

import json
import os
import signal
import sys

import pytest
import torch
from processes import run_alone, run_two
from toy_stage import SCHEDULE, Toy, weights

from sprint_core.distill import __main__ as command
from sprint_core.distill.engine.processes import launched_processes
from sprint_core.distill.engine.stop import SIGNALS, Stop, Stopped
from sprint_core.distill.engine.trainer import Trainer

QUESTIONS = ["--recipe", "shapes", "--stage", "captioning", "--pool", "4", "--device", "cpu"]
QUESTIONS += ["--set=captioning.steps=3", "--set=captioning.batch=2"]


class Asked(Toy):
    """Signals reach the process within its fifth step."""

    def __init__(self, *numbers: int):
        super().__init__()
        self.numbers = numbers

    def loss(self, phase, step, random):
        if step == 4 and phase == "student":
            for number in self.numbers:
                os.kill(os.getpid(), number)
        return super().loss(phase, step, random)


def asked_by_signals(out: str) -> None:
    """What a process of the next test's own runs: with each signal, what ended it, and whether its handler is back."""
    for number in SIGNALS:
        before = signal.getsignal(number)
        try:
            Trainer(Asked(number), SCHEDULE, f"{out}/{number.name}").train()
        except Stopped as stopped:
            ended = [stopped.stage, stopped.step, str(stopped), signal.getsignal(number) is before]
            with open(f"{out}/{number.name}.json", "w", encoding="utf-8") as file:
                json.dump(ended, file)


def test_a_signal_stops_after_the_step_and_loses_nothing(tmp_path):
    whole = Trainer(Toy(), SCHEDULE, tmp_path / "whole")
    whole.train()
    run_alone(__file__, "signals", tmp_path)
    for number in SIGNALS:
        ended = json.loads((tmp_path / f"{number.name}.json").read_text())
        why = f"toy stopped after step 5, as asked by {number.name}: the same command continues"
        assert ended == ["toy", 5, why, True]
        resumed = Trainer(Toy(), SCHEDULE, tmp_path / number.name)
        assert resumed.step == 5
        resumed.train()
        assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))


def asked_twice(out: str) -> None:
    """The same of two signals."""
    try:
        Trainer(Asked(signal.SIGINT, signal.SIGINT), SCHEDULE, out).train()
    except KeyboardInterrupt:
        with open(f"{out}/interrupted", "w"):
            pass


def test_a_second_signal_does_not_wait(tmp_path):
    run_alone(__file__, "twice", tmp_path)
    assert (tmp_path / "interrupted").is_file()


def test_hours_that_are_over(tmp_path):
    with pytest.raises(Stopped, match="its 1e-09 hours being over"):
        Trainer(Toy(), SCHEDULE, tmp_path, stop=Stop(1e-9)).train()
    assert Trainer(Toy(), SCHEDULE, tmp_path).step == 1
    Trainer(Toy(), SCHEDULE, tmp_path, stop=Stop(1)).train()


@pytest.mark.parametrize("hours", [0, -1, float("nan")])
def test_no_hours(hours):
    with pytest.raises(ValueError, match="more than 0"):
        Stop(hours)


def one_of_two(out: str) -> None:
    """What each process of the next test runs: the second alone is asked."""
    processes = launched_processes("cpu")
    asked = Asked(*[signal.SIGTERM] * processes.rank)
    try:
        Trainer(asked, SCHEDULE, f"{out}/shared", processes=processes).train()
    except Stopped as stopped:
        with open(f"{out}/{processes.rank}.json", "w", encoding="utf-8") as file:
            json.dump([stopped.step, str(stopped)], file)


def test_processes_stop_after_the_same_step(tmp_path):
    run_two(__file__, tmp_path)
    (first, why), (second, _) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01")
    assert first == second == 5 and "as another process was asked to" in why
    assert Trainer(Toy(), SCHEDULE, tmp_path / "shared").step == 5


def test_averages_are_kept(tmp_path):
    trainer = Trainer(Toy(), SCHEDULE, tmp_path, keep_every=4)
    trainer.train(until=4)
    early = trainer.average.weight.clone()
    trainer.train()
    raw, late = trainer.stage.modules["student"], trainer.average.weight.clone()
    assert trainer.result("raw") is raw and torch.equal(trainer.result().weight, late)
    assert not torch.equal(raw.weight, late)
    assert torch.equal(trainer.result("4").weight, early)
    assert sorted(path.name for path in (tmp_path / "toy" / "kept").iterdir()) == [
        "000004.safetensors",
        "000008.safetensors",
        "000012.safetensors",
    ]
    with pytest.raises(ValueError, match=r"000005.safetensors: no average was kept after that step; .*\[4, 8, 12\]"):
        trainer.result("5")
    with pytest.raises(ValueError, match="no average has been kept there"):
        trainer.result("best")


def test_a_command_that_is_stopped_goes_on(tmp_path, capsys, caplog):
    assert command.main([*QUESTIONS, "--out", str(tmp_path), "--max-hours", "1e-9"]) == 75
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["stopped"] == {"stage": "captioning", "step": 1} and "the same command continues" in caplog.text
    assert command.main([*QUESTIONS, "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-hours", "0"], "--max-hours 0.0: more than 0"),
        (["--export", "last"], "--export last: it is ema, raw, best"),
        (["--keep-every", "-1"], "--keep-every -1"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, caplog, more, message):
    assert command.main([*QUESTIONS, "--out", str(tmp_path), *more]) == 1
    assert message in caplog.text


if __name__ == "__main__":
    {"signals": asked_by_signals, "twice": asked_twice}.get(sys.argv[1], one_of_two)(sys.argv[-1])
