"""Image sizes: the aspect ratios SANA was trained on, and rounding to what the model can make."""

import math
from collections.abc import Sequence

from ..latent import DOWNSCALE

MIN_PX, MAX_PX = 64, 8192
SIDE_PX = 1024  # of the models whose bins these are

# (width, height) of the 1024px models' resolution bins, wide to tall; about a megapixel each.
BINS = (
    (2048, 512), (1856, 512), (1792, 576), (1728, 576), (1664, 576), (1600, 640), (1536, 640), (1472, 704),
    (1408, 704), (1344, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 832), (1152, 896), (1088, 896),
    (1088, 960), (1024, 960), (1024, 1024), (960, 1024), (960, 1088), (896, 1088), (896, 1152), (832, 1152),
    (832, 1216), (768, 1280), (768, 1344), (704, 1408), (704, 1472), (640, 1536), (640, 1600), (576, 1728),
    (512, 2048),
)  # fmt: skip

# Of the usual aspect ratios, those which no bin has exactly: the bin that is nearest to each.
NEAREST = {
    (1536, 640): (21, 9), (1344, 768): (16, 9), (1216, 832): (3, 2), (1152, 832): (7, 5), (1152, 896): (4, 3),
    (1088, 896): (5, 4),
}  # fmt: skip


def ratio(width: int, height: int) -> str:
    """The aspect ratio of a size, such as '16:9': the usual one that it is nearest to, else exactly."""
    if width < height:
        return ":".join(reversed(ratio(height, width).split(":")))
    common = math.gcd(width, height)
    across, down = NEAREST.get((width, height), (width // common, height // common))
    return f"{across}:{down}"


def label(width: int, height: int) -> str:
    return f"{width} x {height}"


def choices() -> dict[str, tuple[int, int]]:
    """What the nodes offer, of which the first is the default: {'16:9, 1344 x 768': (1344, 768)}."""
    return {f"{ratio(*size)}, {label(*size)}": size for size in ((SIDE_PX, SIDE_PX), *BINS)}


def round_size(width: int, height: int) -> tuple[int, int]:
    """The nearest (width, height) in multiples of 32. Raises ValueError outside 64 to 8192 pixels."""
    if not all(MIN_PX <= pixels <= MAX_PX for pixels in (width, height)):
        raise ValueError(f"size {width}x{height}: sides must lie in {MIN_PX} to {MAX_PX} pixels")
    width, height = (DOWNSCALE * round(pixels / DOWNSCALE) for pixels in (width, height))
    return width, height


def bins(size_px: int) -> tuple[tuple[int, int], ...]:
    """The bins, (width, height), of models of that size: of small ones as many as lie in multiples of 32."""
    scale = size_px / SIDE_PX / DOWNSCALE
    scaled_bins = ((DOWNSCALE * round(width * scale), DOWNSCALE * round(height * scale)) for width, height in BINS)
    return tuple(dict.fromkeys(size for size in scaled_bins if min(size) >= MIN_PX))


def nearest(width: int, height: int, among: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bin that is nearest in height over width, which the authors' tables round to two digits."""
    return min(among, key=lambda size: abs(round(size[1] / size[0], 2) - height / width))


def scaled(width: int, height: int, size_px: int) -> tuple[int, int]:
    """A size of the 1024px models for a model whose own is another, in multiples of 32. Raises ValueError."""
    return round_size(round(width * size_px / 1024), round(height * size_px / 1024))
