"""Image sizes against diffusers' table of the bins that SANA was trained on."""

import numpy as np
import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN

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


def test_bins_of_smaller_and_larger_models():
    """diffusers' table of 512 px; four times the bins' sides; of tiny models what lies in multiples of 32."""
    assert [(width, height) for height, width in ASPECT_RATIO_512_BIN.values()] == list(sizes.bins(512))
    assert sizes.bins(1024) == sizes.BINS
    assert max(width * height for width, height in sizes.BINS) == 1024**2  # what estimates take for the largest
    assert sizes.bins(4096) == tuple((4 * width, 4 * height) for width, height in sizes.BINS)
    assert sizes.bins(64) == ((96, 64), (64, 64), (64, 96))


@pytest.mark.parametrize(("px", "table"), [(1024, ASPECT_RATIO_1024_BIN), (512, ASPECT_RATIO_512_BIN)])
def test_the_nearest_bin_is_that_of_the_authors(px, table):
    """As diffusers' pipelines of the same table choose it, at ratios from 1 : 9000 on."""
    random = np.random.default_rng(0)
    for height, width in np.exp(random.uniform(0, 9, (2000, 2))).astype(int).tolist():
        expected = PixArtImageProcessor.classify_height_width_bin(height, width, table)
        assert sizes.nearest(width, height, sizes.bins(px)) == expected[::-1], (width, height)


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
