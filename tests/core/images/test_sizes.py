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
