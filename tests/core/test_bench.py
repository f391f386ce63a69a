"""The benchmark's command line: its parts, ratios and refusals. What it measures is no test."""

import json

import pytest
import torch

from sprint_core import bench


def test_every_part_is_measured(capsys):
    assert bench.main(["--runs", "2", "--device", "cpu", "--size", "64"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["parts"]) == set(bench.PARTS) and (result["size_px"], result["dtype"]) == (64, "float32")
    for row in result["parts"].values():
        assert 0 < row["min_sec"] <= row["median_sec"] <= row["max_sec"]
    assert result["parts"]["step"]["steps"] == 1.0


def test_parts_compute_what_they_say(monkeypatch):
    """A controlled step with an untrained ControlNet is the plain one; the full-size row has seven blocks."""
    tiny = bench.presets.PRESETS["sprint-0.6B"]
    small = bench.presets.TransformerConfig(width=64, depth=8, cross_heads=2, caption_width=32)
    monkeypatch.setitem(bench.presets.PRESETS, "sprint-0.6B", bench.presets.Preset(tiny.name, tiny.repo, small, 64))
    one = bench.Bench("0.6B", None, torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(one, "autoencoder", bench.Bench("demo", 64, one.device, one.dtype).autoencoder, raising=False)
    with torch.inference_mode():
        assert len(one.net.transformer_blocks) == 7
        assert torch.equal(one.step(), one.control()) and torch.equal(one.control(), one.hint())
        assert one.step().shape == (1, 32, 2, 2) and one.decode().shape == (1, 3, 64, 64)
        assert one.encode().shape == (1, 32, 2, 2)


def test_medians():
    rows = bench.summary({"step": [1.0, 2.0, 9.0], "control": [3.0, 5.0, 4.0]})
    assert rows["step"] == {"median_sec": 2.0, "min_sec": 1.0, "max_sec": 9.0, "steps": 1.0}
    assert rows["control"]["steps"] == 2.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "step,nap"], "--parts nap: there are step, control"),
        (["--runs", "0"], "--runs is 0"),
        (["--size", "100"], "--size 100: a multiple of 32"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_refused(words, message, caplog):
    assert bench.main(words) == 1
    assert message in caplog.text
