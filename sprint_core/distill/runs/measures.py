"""Measures of images: a value with the ends of its 95 % interval, low and high; and whether two of them differ."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...evaluate import frechet

NORMAL_95 = 1.959964  # standard deviations on either side that hold 95 %
BOOTSTRAPS = 50
Measure = Mapping[str, Any]


# --- of one run ---------------------------------------------------------------------------------------


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    share, z2 = right / count, NORMAL_95**2 / count
    half = NORMAL_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, (share + z2 / 2 - half) / (1 + z2)), min(1.0, (share + z2 / 2 + half) / (1 + z2))


def judged(right: int, count: int) -> dict[str, Any]:
    """The measure of a share."""
    low, high = wilson(right, count)
    return {"value": right / count, "low": low, "high": high, "right": right, "prompts": count}


def distance(painted: Tensor, true: Tensor) -> dict[str, Any] | None:
    """Frechet distance of features [n, d], its interval from images drawn again; None for too few of them."""
    if len(true) < frechet.SAMPLES_PER_FEATURE * true.shape[1]:
        return None
    value, n = frechet.frechet(painted, true), len(true)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(n, (2, n), generator=generator) for _ in range(BOOTSTRAPS)]
    again = [frechet.frechet(painted[a], true[b]) for a, b in draws]
    half = NORMAL_95 * statistics.stdev(again)  # their mean lies above the value: their spread alone is meant
    return {"value": value, "low": value - half, "high": value + half}


# --- of all seeds: intervals know of images only, and are widened where seeds differ by more ------------


def pooled_share(shares: Sequence[Measure]) -> dict[str, Any]:
    """Of all images together."""
    seeds = [share["value"] for share in shares]
    total = judged(sum(share["right"] for share in shares), sum(share["prompts"] for share in shares))
    return total | {"low": min(total["low"], *seeds), "high": max(total["high"], *seeds), "seeds": seeds}


def pooled_distance(distances: Sequence[Measure | None]) -> dict[str, Any] | None:
    """The mean, if every seed has one."""
    measures = [one for one in distances if one is not None]
    if len(measures) < len(distances):
        return None
    seeds = [one["value"] for one in measures]
    value = statistics.mean(seeds)
    half = math.hypot(*(one["high"] - one["value"] for one in measures)) / len(measures)
    return {"value": value, "low": min(value - half, *seeds), "high": max(value + half, *seeds), "seeds": seeds}


def order(a: Measure, b: Measure, paper_a: float, paper_b: float) -> str:
    """Whether two measures lie in the order of the paper's numbers."""
    if a["low"] <= b["high"] and b["low"] <= a["high"]:
        return "within noise"
    if paper_a == paper_b:
        return "differs, where the paper's are equal"
    return "agrees" if (a["value"] > b["value"]) == (paper_a > paper_b) else "disagrees"
