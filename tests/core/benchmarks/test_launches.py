"""What a GPU would launch, counted without one."""

import importlib.util

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks import launches

LIMITS = {  # docs/benchmarks.md has what was counted; more fail
    "step": 840, "controlnet": 366, "decode": 417, "encode": 349, "taesana_decode": 132,
    "text": 1300, "long_text": 1300,
}  # fmt: skip
WITH_KERNELS = {
    "step": 478, "controlnet": 222, "decode": 274, "encode": 214, "taesana_decode": 132, "text": 542, "long_text": 542,
}  # fmt: skip


def test_operations_are_counted_and_views_are_not():
    with FakeTensorMode(), launches.Launches() as counted:
        x = torch.empty(4, 8, device="cuda", dtype=torch.bfloat16)
        (x.t()[:2].expand(2, 4) + 1).sum()
        torch.ones(3) + 1  # on the CPU
    row = counted.row()
    assert row["operations"] == {"add": 1, "sum": 1} and row["launches"] == 2
    assert counted.bytes == {"add": 2 * 8 * 2, "sum": 8 * 2 + 2}


@pytest.fixture(scope="module")
def counted():
    return launches.count("1.6B", 1024, torch.bfloat16)


@pytest.mark.parametrize("part", LIMITS)
def test_no_part_launches_more_than_it_did(counted, part):
    assert 0 < counted[part]["launches"] <= LIMITS[part], counted[part]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="only Linux's torch comes with Triton")
def test_fused_kernels_take_the_places_of_chains():
    counted = launches.count("1.6B", 1024, torch.bfloat16, kernels=True)
    assert {part: row["launches"] for part, row in counted.items()} == WITH_KERNELS


def test_heads_are_no_groups_of_a_convolution(counted):
    """A GPU takes group by group; with those of DC-AE's nine blocks of attention there would be 52 convolutions."""
    assert counted["decode"]["operations"]["convolution"] == 43
