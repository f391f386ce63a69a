"""Image sizes against diffusers' table of the bins that SANA was trained on."""

import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN

from sprint_core.images import sizes


def test_bins_are_the_trained_ones():
    assert [(width, height) for height, width in ASPECT_RATIO_1024_BIN.values()] == list(sizes.BINS)
    assert all(sizes.round_size(*size) == size for size in sizes.BINS)


@pytest.mark.parametrize(
    ("asked", "made"),
    [((1000, 1030), (992, 1024)), ((64, 8192), (64, 8192)), ((79, 81), (64, 96)), ((65, 95), (64, 96))],
)
def test_rounding(asked, made):
    assert sizes.round_size(*asked) == made


@pytest.mark.parametrize("size", [(63, 64), (64, 8193), (0, 64), (-64, 64)])
def test_sizes_out_of_range_are_refused(size):
    with pytest.raises(ValueError, match=f"size {size[0]}x{size[1]}: sides must lie in 64 to 8192 pixels"):
        sizes.round_size(*size)


def test_sizes_of_larger_models():
    assert sizes.scaled(1024, 1024, 4096) == (4096, 4096)
    assert sizes.scaled(1280, 768, 512) == (640, 384)
    with pytest.raises(ValueError, match="64 to 8192"):
        sizes.scaled(4096, 4096, 4096)


def test_aspect_ratios_name_the_nearest_usual_one():
    """Each name is of one size, which has these proportions to 4 %; upright sizes mirror the others."""
    names = {sizes.ratio(*size): size for size in sizes.BINS}
    assert len(names) == len(sizes.BINS) == 33
    assert names["1:1"] == (1024, 1024) and names["2:1"] == (1408, 704)
    for name, (width, height) in names.items():
        across, down = map(int, name.split(":"))
        assert abs(across / down * height / width - 1) < 0.04, name
        assert names.get(f"{down}:{across}", (height, width)) == (height, width)
    for usual in (21 / 9, 16 / 9, 3 / 2, 7 / 5, 4 / 3):
        nearest = min(sizes.BINS, key=lambda size: abs(size[0] / size[1] - usual))
        across, down = map(int, sizes.ratio(*nearest).split(":"))
        assert across / down == usual
