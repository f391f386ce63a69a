"""Pictures to show the judge."""

import numpy as np
from PIL import Image, ImageFilter

from sprint_core.shapes.scenes import COLOURS, Scene, Thing, backdrop, render


def blurred(image: np.ndarray, sigma: float = 2) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(image: np.ndarray, sigma: float = 0.03) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(image.shape, np.float32)
    return (image.astype(np.float32) / 255 + sigma * noise).clip(0, 1)


def picture(*things: tuple, background: str = "grey") -> np.ndarray:
    """A picture of (shape, colour, row, column[, size]) things."""
    return render(Scene(tuple(Thing(*t[:2], *(t[4:] or ("small",)), *t[2:4]) for t in things), background))


def painted(inside, colour: str = "red", background: str = "grey") -> np.ndarray:
    """A picture of whatever `inside(x, y)` says, x and y in units of 38 px from the centre."""
    y, x = (np.mgrid[:256, :256] - 127.5) / 38
    image = backdrop(background, 256).copy()
    image[inside(x, y)] = COLOURS[colour]
    return image.astype(np.uint8)
