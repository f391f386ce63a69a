"""Hours on named cards: from operations that a closed form counts, too."""

import json

import pytest
import standin
import torch
from tiny_recipe import tiny  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from sprint_core.distill import __main__ as command
from sprint_core.distill.runs import estimate, gpus
from sprint_core.models.transformer import SELF_HEAD_DIM, SanaTransformer, TransformerConfig


def forward_flops(config: TransformerConfig, samples: int, tokens: int, words: int) -> int:
    """Two operations for each product of a number with a weight, or with another number in attention."""
    c, d, hidden = config.width, SELF_HEAD_DIM, int(config.mlp_ratio * config.width)
    linear_attention = 2 * tokens * c * (d + 1)  # k^T v and q (k^T v), with the channel of denominators
    block = 4 * tokens * c * c + linear_attention  # q, k, v, out
    block += 2 * tokens * c * c + 2 * words * c * c + 2 * tokens * words * c  # cross-attention
    block += tokens * (c * 2 * hidden + 9 * 2 * hidden + hidden * c)  # Mix-FFN
    ends = 2 * tokens * 32 * c + words * (config.caption_width * c + c * c)
    time = 256 * c + c * c + 6 * c * c
    return 2 * samples * (config.depth * block + ends + time)


def test_operations_are_those_of_a_closed_form():
    samples, side, words = 3, 4, 7
    model = SanaTransformer(standin.TEACHER, device="meta")
    inputs = ((samples, 32, side, side), (samples,), (samples, words, standin.TEACHER.caption_width))
    with FlopCounterMode(display=False) as counter:
        model(*(torch.empty(shape, device="meta") for shape in inputs))
    assert counter.get_total_flops() == forward_flops(standin.TEACHER, samples, side**2, words)


def test_hours_follow_from_the_cards():
    """1e15 operations at 35 % of 989.4e12 a second take 2.888 s."""
    h100 = gpus.parse("H100")
    assert h100 == gpus.Gpus("h100", 1)
    assert h100.hours(1e15, 3600) == pytest.approx(1e15 / 0.35 / 989.4e12)
    assert gpus.parse("8xrtx4090") == gpus.Gpus("rtx4090", 8)
    assert gpus.parse("b200").hours(1.0, 1) == pytest.approx(h100.hours(1.0, 1) * 989.4 / 2250)


@pytest.mark.usefixtures("tiny")
def test_a_dry_run_says_the_hours(tmp_path, capsys, monkeypatch):
    """Twice as many cards need half of them; in fp32 nothing is said."""
    monkeypatch.setattr(estimate, "MATMUL_SIZE", 64)
    hours = {}
    for cards in ("h100", "2xh100"):
        arguments = ["--recipe=tiny", f"--out={tmp_path}", "--dry-run", "--device=cpu", f"--gpu={cards}"]
        assert command.main([*arguments, "--set=teacher.precision=fp32"]) == 0
        out = capsys.readouterr().out
        found = json.loads(out.splitlines()[-1])["dry_run"]
        hours[cards] = found["distill"]["hours"]
        assert "hours" not in found["teacher"]
        assert f"h on {cards[0] if cards[1] == 'x' else 1} x h100, if steps reach 35% of 989.4 TFLOP/s (bf16" in out
    assert hours["2xh100"] == pytest.approx(hours["h100"] / 2) and hours["h100"] > 0
