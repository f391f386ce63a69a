"""What intervals of a comparison's measures mean."""

import pytest
import torch

from sprint_core.distill.runs import measures


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals(right, count, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert measures.wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    mirrored = measures.wilson(count - right, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_distance_has_an_interval_or_is_left_out():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn((2, 400, 32), generator=generator, dtype=torch.float64)
    near, far = measures.distance(a, b), measures.distance(a + 1.0, b)
    assert near["low"] < near["value"] < near["high"] < far["low"]
    assert measures.distance(a[:300], b[:300]) is None


def measure(value: float, half: float = 0.01) -> dict:
    return {"value": value, "low": value - half, "high": value + half}


def test_order():
    assert measures.order(measure(0.3), measure(0.4), 27.0, 28.0) == "agrees"
    assert measures.order(measure(0.4), measure(0.3), 27.0, 28.0) == "disagrees"
    assert measures.order(measure(0.4), measure(0.3), 28.0, 28.0).startswith("differs")
    assert measures.order(measure(0.4, 0.1), measure(0.3), 27.0, 28.0) == "within noise"


def test_seeds_that_differ_widen_the_interval():
    share = measures.pooled_share([measures.judged(right, 400) for right in (100, 300)])
    assert (share["value"], share["low"], share["high"], share["seeds"]) == (0.5, 0.25, 0.75, [0.25, 0.75])
    distance = measures.pooled_distance([measure(1.0, 0.1), measure(3.0, 0.1)])
    assert (distance["value"], distance["low"], distance["high"]) == (2.0, 1.0, 3.0)
    assert measures.pooled_share([measures.judged(100, 400)] * 2)["low"] == measures.wilson(200, 800)[0]
    assert measures.pooled_distance([measure(1.0, 0.1)] * 2)["high"] == pytest.approx(1.0 + 0.1 / 2**0.5)
    assert measures.pooled_distance([measure(1.0), None]) is None
