"""Draw the pack's icon and banner for the registry: assets/icon.png and assets/banner.png.

    python run.py python tools/make_logo.py

Noise that becomes an image along the quarter circle of TrigFlow: x_t = cos t x + sin t z.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ASSETS = Path(__file__).resolve().parents[1] / "assets"
INK = (24, 26, 32)
PAPER = (244, 241, 232)
SUN = (235, 86, 58)
ICON_PX = 400
BANNER_PX = (1260, 540)
SMOOTH = 3


def disc(px: int, angle: float, seed: int) -> Image.Image:
    """A sun on paper, `angle` of the way from image (0) to noise (pi/2), cut to a circle."""
    y, x = (np.mgrid[:px, :px] + 0.5) / px * 2 - 1
    sunset = np.where((np.hypot(x, y + 0.1) < 0.5)[..., None], SUN, PAPER).astype(np.float32)
    sunset[y > 0.45] = (56, 78, 119)
    cell = max(1, px // 24)
    noise = np.random.default_rng(seed).standard_normal((px // cell + 1, px // cell + 1, 3)) * 90 + 128
    noise = noise.repeat(cell, 0).repeat(cell, 1)[:px, :px]
    mixed = 128 + math.cos(angle) * (sunset - 128) + math.sin(angle) * (noise - 128)
    image = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
    mask = Image.new("L", (px * SMOOTH, px * SMOOTH))
    ImageDraw.Draw(mask).ellipse((0, 0, px * SMOOTH - 1, px * SMOOTH - 1), 255)
    image.putalpha(mask.resize((px, px), Image.Resampling.LANCZOS))
    return image


def arc(sheet: Image.Image, centre: tuple[int, int], radius: int, sizes: tuple[int, ...]) -> None:
    """Discs along the quarter circle: the image to the right of the centre, noise above it."""
    for i, size in enumerate(sizes):
        angle = math.pi / 2 * i / (len(sizes) - 1)
        x, y = centre[0] + radius * math.cos(angle), centre[1] - radius * math.sin(angle)
        sheet.alpha_composite(disc(size, angle, i), (round(x - size / 2), round(y - size / 2)))


def main() -> None:
    icon = Image.new("RGBA", (ICON_PX, ICON_PX), (*INK, 255))
    arc(icon, (80, 300), 225, (136, 94, 76, 62))
    icon.convert("RGB").save(ASSETS / "icon.png", optimize=True)
    banner = Image.new("RGBA", BANNER_PX, (*INK, 255))
    arc(banner, (700, 400), 330, (196, 138, 110, 88))
    pen = ImageDraw.Draw(banner)
    pen.text((80, 210), "SANA-Sprint", PAPER, ImageFont.load_default(84))
    pen.text((84, 320), "for ComfyUI: images in 1 to 4 steps", (170, 172, 180), ImageFont.load_default(34))
    banner.convert("RGB").save(ASSETS / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
