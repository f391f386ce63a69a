"""Edges of images, as ControlNets were trained to read them: white on black.

    image -> HED, where its weights are, or soft edges without weights -> scribble, on request

HED (arXiv 1504.06375) in the Apache-2.0 retraining that the ControlNet authors published as ControlNetHED.pth. The
soft edges without weights are gradients of the image at three scales, each normalised to a step's height. The
scribble is that of SANA's authors (NVlabs/Sana, tools/controlnet): ridges, thinned, drawn as even lines.
Images are [b, h, w, 3] in [0, 1], edges [b, h, w] in [0, 1].
"""

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..models.hed import HED
from ..weights import tensorfile
from ..weights.tensorfile import CheckpointError

RESOLUTION = 512  # px of the shorter side at which edges are looked for, as the authors do
SCALES = (1.0, 2.0, 4.0)  # px of blur at that resolution
CONTRAST = 0.15  # the step that becomes an edge of 1 - 1/e
# Of the authors' scribble.
RIDGE_BLUR = 3.0
RIDGE_LEVEL = 127 / 255
LINE_LEVEL = 4 / 255


def detect(image: Tensor, hed: HED | None = None, scribble: bool = False, resolution: int = RESOLUTION) -> Tensor:
    """Edges of an image, as an image of its size. resolution: px of the shorter side to look at, if that is smaller."""
    pixels = rearrange(image, "b h w c -> b c h w")
    size = pixels.shape[-2:]
    if (shorter := min(size)) > resolution:
        small = [max(1, round(side * resolution / shorter)) for side in size]
        pixels = F.interpolate(pixels, small, mode="bilinear", antialias=True)
    edges = soft_edges(pixels) if hed is None else hed(pixels)
    if scribble:
        edges = scribbled(edges)
    if edges.shape[-2:] != size:
        edges = F.interpolate(edges[:, None], size, mode="bilinear").squeeze(1)
    return edges.clamp(0.0, 1.0)[..., None].expand(-1, -1, -1, 3).contiguous()


def _relative_size(image: Tensor) -> float:
    """To the size for which the constants above are meant, so that small images get thin lines."""
    return min(1.0, min(image.shape[-2:]) / RESOLUTION)


def _gaussian(sigma: float) -> Tensor:
    """Taps of a blur, [2 r + 1] with r = 3 sigma or more."""
    reach = max(1, math.ceil(3 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    return taps / taps.sum()


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [b, c, h, w]; the border's pixels go on outside."""
    taps = _gaussian(sigma).to(x)
    reach, channels = len(taps) // 2, x.shape[1]
    x = F.pad(x, (reach,) * 4, mode="replicate")
    x = F.conv2d(x, taps.expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(x, taps[:, None].expand(channels, 1, -1, 1), groups=channels)


def sobel(x: Tensor) -> Tensor:
    """Length of the gradient per pixel, [b, c, h, w] -> [b, c, h, w]."""
    along = torch.tensor([-0.5, 0.0, 0.5]).to(x)
    across = torch.tensor([0.25, 0.5, 0.25]).to(x)
    channels = x.shape[1]
    x = F.pad(x, (1,) * 4, mode="replicate")
    kernels = [across[:, None] * along, along[:, None] * across]
    dx, dy = (F.conv2d(x, kernel.expand(channels, 1, 3, 3), groups=channels) for kernel in kernels)
    return torch.hypot(dx, dy)


def soft_edges(pixels: Tensor) -> Tensor:
    """[b, 3, h, w] in [0, 1] -> [b, h, w]: the mean over scales of the strongest colour's step, saturating."""
    steps = []
    for scale in SCALES:
        sigma = scale * _relative_size(pixels)
        taps = _gaussian(sigma)
        middle = taps[len(taps) // 2 :]
        height = (middle[0] + middle[1]).item() / 2  # the gradient of a blurred step from 0 to 1
        steps.append(sobel(blur(pixels, sigma)).amax(1) / height)
    return 1 - torch.exp(-torch.stack(steps).mean(0) / CONTRAST)


def scribbled(edges: Tensor) -> Tensor:
    """Lines of even width along the ridges of edges: [b, h, w] -> [b, h, w], of 0 and 1."""
    sigma = RIDGE_BLUR * _relative_size(edges)
    smooth = blur(edges[:, None], sigma)
    ridge = (smooth > RIDGE_LEVEL) & _is_ridge(smooth)
    return (blur(ridge.to(edges.dtype), sigma) > LINE_LEVEL).to(edges.dtype).squeeze(1)


def _is_ridge(x: Tensor) -> Tensor:
    """Where [b, 1, h, w] is at its highest along one of the four lines through a pixel."""
    height, width = x.shape[-2:]
    around = F.pad(x, (1,) * 4, mode="replicate")
    on_ridge = torch.zeros_like(x, dtype=torch.bool)
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        ahead = around[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]
        behind = around[..., 1 - down : 1 - down + height, 1 - right : 1 - right + width]
        on_ridge |= (x >= ahead) & (x >= behind)
    return on_ridge


# --- a hand -------------------------------------------------------------------------------------------


def wobbled(drawing: Tensor, generator: torch.Generator, wobble_px: float, padding_mode: str = "zeros") -> Tensor:
    """Moved by a smooth random field of so many px, as by an unsteady hand: [b, c, h, w].

    padding_mode: what lies outside, as F.grid_sample names it; black by default.
    """
    b, _, h, w = drawing.shape
    field = torch.randn(b, 2, 7, 7, generator=generator, device=drawing.device) * (wobble_px * 2 / w)
    field = F.interpolate(field, (h, w), mode="bicubic", align_corners=True).movedim(1, -1)
    identity = torch.eye(2, 3, device=drawing.device).expand(b, -1, -1)
    grid = F.affine_grid(identity, [b, 1, h, w], align_corners=False)
    return F.grid_sample(drawing, grid + field, padding_mode=padding_mode, align_corners=False)


# --- HED ----------------------------------------------------------------------------------------------


def load_hed(path: str | os.PathLike, ops: Any = nn) -> HED:
    """The network of a ControlNetHED file, of layers from ops. Raises CheckpointError for another or half a file."""
    tensors = tensorfile.read(path).tensors
    with torch.device("meta"):
        model = HED(ops)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        wrong = sorted(name for name in {*expected, *shapes} if expected.get(name) != shapes.get(name))
        raise CheckpointError(
            f"{path}: not the HED network of ControlNetHED.pth: {len(wrong)} tensors are missing, too many or of "
            f"another shape, the first {wrong[0]}; download it again"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)
