"""Image networks run on overlapping tiles, in the memory of one, whose feathered weights sum to 1 everywhere."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Progress = Callable[[int, int], None]  # (tiles done, tiles in all)


def tile_windows(cells: int, tile: int, overlap: int, scale: int = 1) -> list[tuple[int, Tensor]]:
    """Tiles along one axis: (first cell, weights [min(tile, cells) * scale] in fp32) each.

    Tiles are spread evenly, overlapping by at least `overlap` cells. Weights rise and fall linearly
    over the overlap and sum to 1 at every one of the cells * scale output positions. Tiles of a
    plane are products of two axes, so their weights sum to 1 as well.
    """
    if cells <= tile:
        return [(0, torch.ones(cells * scale))]
    count = math.ceil((cells - overlap) / (tile - overlap))
    starts = [i * (cells - tile) // (count - 1) for i in range(count)]
    ramp = ((torch.arange(tile * scale) + 0.5) / max(overlap * scale, 1)).clamp(max=1.0)
    rise, fall = ramp, ramp.flip(0)
    shapes = [(rise if i > 0 else 1.0) * (fall if i < count - 1 else torch.ones_like(fall)) for i in range(count)]
    total = torch.zeros(cells * scale)
    for start, shape in zip(starts, shapes, strict=True):
        total[start * scale : (start + tile) * scale] += shape
    return [(a, shape / total[a * scale : (a + tile) * scale]) for a, shape in zip(starts, shapes, strict=True)]


def run_tiled(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    unit: int,
    scale: int,
    tile: int,
    overlap: int,
    progress: Progress | None,
) -> Tensor:
    """Sum of `run` over feathered tiles of x [b, c, h*unit, w*unit] -> [b, c', h*scale, w*scale], in x's dtype.

    unit, scale: pixels a cell of x and of the result; tile, overlap: in cells, of which x has h by w. A single tile
    is `run(x)` itself.
    """
    height, width = x.shape[-2] // unit, x.shape[-1] // unit
    rows, columns = (tile_windows(n, tile, overlap, scale) for n in (height, width))
    jobs = [(row, column) for row in rows for column in columns]
    out = None
    for done, ((top, weight_y), (left, weight_x)) in enumerate(jobs, 1):
        part = run(x[..., top * unit :, left * unit :][..., : tile * unit, : tile * unit])
        if len(jobs) > 1:
            if out is None:
                out = part.new_zeros((*part.shape[:2], height * scale, width * scale), dtype=torch.float32)
            weight = weight_y.to(part.device)[:, None] * weight_x.to(part.device)
            h, w = part.shape[-2:]
            out[..., top * scale :, left * scale :][..., :h, :w] += part * weight
        if progress:
            progress(done, len(jobs))
    return part if out is None else out.to(part.dtype)


class TiledCodec(nn.Module):
    """An auto-encoder of images: a subclass has `encode` and `decode`, and gets both on tiles and their checks."""

    image_channels: int
    latent_channels: int
    cell_px: int  # a side of a latent cell

    def encode(self, image: Tensor) -> Tensor:
        """image [b, image_channels, h, w] -> latent [b, latent_channels, h/cell_px, w/cell_px]."""
        raise NotImplementedError

    def decode(self, latent: Tensor) -> Tensor:
        """latent [b, latent_channels, h, w] -> image [b, image_channels, h*cell_px, w*cell_px]."""
        raise NotImplementedError

    def encode_tiled(
        self, image: Tensor, tile_px: int = 1024, overlap_px: int = 256, progress: Progress | None = None
    ) -> Tensor:
        """`encode` on tiles. Attention sees one tile at a time, so results differ a little.

        tile_px, overlap_px: in pixels of the image, multiples of cell_px, the overlap below the tile.
        progress: called after each tile. Raises ValueError on other sizes, and as check_image does.
        """
        self.check_image(image)
        tile, overlap = self._cells(tile_px, overlap_px)
        return run_tiled(self.encode, image, self.cell_px, 1, tile, overlap, progress)

    def decode_tiled(
        self, latent: Tensor, tile_px: int = 1024, overlap_px: int = 256, progress: Progress | None = None
    ) -> Tensor:
        """`decode` on tiles; sizes are in pixels of the image, as in `encode_tiled`. Raises ValueError."""
        self.check_latent(latent)
        tile, overlap = self._cells(tile_px, overlap_px)
        return run_tiled(self.decode, latent, 1, self.cell_px, tile, overlap, progress)

    def check_image(self, image: Tensor) -> None:
        """Raise ValueError where image is not [b, image_channels, h, w] of whole cells."""
        c, n = self.image_channels, self.cell_px
        if image.ndim != 4 or image.shape[1] != c or image.shape[2] % n or image.shape[3] % n:
            raise ValueError(f"image must be [b, {c}, h, w] with h and w multiples of {n}, not {list(image.shape)}")

    def check_latent(self, latent: Tensor) -> None:
        """Raise ValueError where latent is not [b, latent_channels, h, w]."""
        c = self.latent_channels
        if latent.ndim != 4 or latent.shape[1] != c:
            raise ValueError(f"latent must be [b, {c}, h, w], not {list(latent.shape)}")

    def _cells(self, tile_px: int, overlap_px: int) -> tuple[int, int]:
        n = self.cell_px
        if tile_px % n or overlap_px % n or not 0 <= overlap_px < tile_px:
            raise ValueError(f"tile {tile_px} px and overlap {overlap_px} px must be multiples of {n}, overlap < tile")
        return tile_px // n, overlap_px // n
