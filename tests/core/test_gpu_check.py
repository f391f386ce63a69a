"""The checks of a GPU, rehearsed on the CPU: their lines, and that neither a failure nor a limit stops the next one."""

import json
import time
import warnings
from unittest import mock

import pytest
import torch

from sprint_core.kernels import fused
from tools import gpu_check
from tools.gpu import speed, timing, training
from tools.gpu.world import World

CPU = torch.device("cpu")
PARTS = {"step_0.6B", "step_0.6B_batch_8", "step_1.6B", "step_1.6B_batch_8", "controlnet", "decode", "encode"}
PARTS |= {"taesana_decode", "text_20", "text_298", "prefill"}


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_two_sections_in_a_rehearsal(tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    command = ["--device", "cpu", "--tiny", "--only", "parts,kernels,card", "--out", str(out), "--total", "400"]
    assert gpu_check.main([*command, "--limit", "200"]) == 0
    card, parts, kernels, everything = rows = lines(capsys)
    assert [row["section"] for row in rows] == ["card", "parts", "kernels", "all"] and everything["failed"] == []
    assert card["copy_gb_per_sec"] > 0 and card["torch"] == torch.__version__
    assert set(parts) == {"section", "seconds", *PARTS}
    assert all(parts[name]["eager"]["ms"] > 0 and parts[name]["graph"] == {} for name in PARTS)
    assert set(kernels) == set(parts) and all(
        kernels[name]["launched"] == kernels[name]["difference"] == 0 for name in PARTS
    )
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


def test_kernels_are_switched_on_and_counted(monkeypatch):
    asked = []

    def call() -> torch.Tensor:
        asked.append(fused.enabled)
        if fused.enabled:
            fused.launch(mock.MagicMock(), (1,), torch.zeros(1))
        return torch.full((2,), 3.0 + fused.enabled)

    def broken() -> torch.Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(speed, "_parts", lambda world: [("broken", broken), ("step", call)])
    row: dict = {}
    speed.kernels_of_ours(World(CPU, True, gpu_check.PACK), row)
    assert "no such instruction" in row["broken"]["error"]
    assert row["step"]["launched"] == 1 and row["step"]["largest"] == 3 and row["step"]["difference"] == 1
    turns = (len(asked) - 2) // 2
    assert asked == [False, True, *[False] * turns, *[True] * turns] and not fused.enabled


def test_a_process_that_dies_is_told_of(capsys):
    assert gpu_check.main(["--device", "nonsense", "--only", "card"]) == 0
    card, everything = lines(capsys)
    assert card == {"section": "card", "error": "its process ended (status 1)"}
    assert everything["failed"] == ["card"]


def test_what_a_failed_section_measured_is_kept():
    def work(row):
        row["before"] = 1
        raise RuntimeError("an illegal memory access")

    row = gpu_check.run_section("card", work, 60)
    assert (
        row["before"] == 1 and "RuntimeError: an illegal memory access" in row["error"] and "work(row)" in row["error"]
    )


def test_a_section_ends_at_its_limit():
    def work(row):
        row["before"] = 1
        try:
            time.sleep(60)
        except Exception:
            row["caught"] = True

    row = gpu_check.run_section("card", work, 0.05)
    assert row["error"].startswith("stopped after 0 s: test_gpu_check.py:")
    assert row["seconds"] < 30 and row["before"] == 1 and "caught" not in row


@pytest.mark.parametrize("name", training._BUILDERS)
def test_stages_are_compared_with_the_cpu(name):
    """The CPU agrees with itself to the last digit."""
    numbers = training._agreement(name, CPU)
    assert {"loss", "grad_norm"} <= set(numbers)
    assert all(number["off"] == 0 for number in numbers.values())


def test_waits_are_counted_by_their_line():
    with timing.synchronisations(CPU) as waits:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation")
        warnings.warn("something else")
    ((line, count),) = waits.items()
    assert count == 2 and line.startswith("tests/core/test_gpu_check.py:")


@pytest.mark.parametrize("inference", [False, True])
def test_casts_are_counted_by_their_line(inference):
    x = torch.zeros(2)
    with torch.inference_mode(inference), timing.Casts() as casts:
        for _ in range(2):
            (x.bfloat16() + 1).float()
        x.to(torch.float32)  # is already
    places, casted = zip(*(line.split() for line in casts.lines), strict=True)
    assert casted == ("float32>bfloat16", "bfloat16>float32") and list(casts.lines.values()) == [2, 2]
    assert all(place.startswith("tests/core/test_gpu_check.py:") for place in places)
