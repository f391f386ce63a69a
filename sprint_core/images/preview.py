"""Colours of a latent: the linear map from a scaled latent cell to its mean RGB, for live previews.

No such map is published for DC-AE. The bundled model's was fitted on its scenes and lies in its file; for other
weights `python -m sprint_core.convert --fit-preview VAE IMAGES` fits one on the user's own images and puts it
beside the VAE. Nothing is invented.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .. import disk
from ..latent import DOWNSCALE, LATENT_CHANNELS, SCALE
from ..models.autoencoder import Autoencoder
from ..weights import checkpoint, layouts, tensorfile
from ..weights.tensorfile import CheckpointError
from . import files as image_files

SUFFIX = ".preview.json"
SETTING = "preview"  # of an auto-encoder in a native file
RIDGE = 1.0  # in cells; keeps the first, few observations from overshooting
SIDE_PX = 512  # the longer side that images are scaled down to
LEAST_CELLS = 10 * LATENT_CHANNELS


@dataclass(frozen=True)
class Factors:
    """RGB in [-1, 1] = rows^T latent + bias. rows [32][3], bias [3]. Raises ValueError on other shapes."""

    rows: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(tuple(map(float, row)) for row in self.rows))
        object.__setattr__(self, "bias", tuple(map(float, self.bias)))
        numbers = [*self.bias, *(n for row in self.rows for n in row)]
        if [len(row) for row in self.rows] != [3] * LATENT_CHANNELS or len(self.bias) != 3:
            raise ValueError(f"expected {LATENT_CHANNELS} rows of 3 numbers and a bias of 3")
        if not all(map(math.isfinite, numbers)):
            raise ValueError("not all of its numbers are finite")

    def paint(self, latent: Tensor) -> Tensor:
        """Raw latents [b, 32, h, w] -> colours [b, h, w, 3] in [0, 1]."""
        rows, bias = torch.tensor(self.rows), torch.tensor(self.bias)
        return ((latent.float().movedim(1, -1) * SCALE @ rows + bias) / 2 + 0.5).clamp(0, 1)


class RGBFit:
    """Running least squares from latents and their images."""

    def __init__(self):
        self.moments = torch.zeros(LATENT_CHANNELS + 1, LATENT_CHANNELS + 1, dtype=torch.float64)
        self.products = torch.zeros(LATENT_CHANNELS + 1, 3, dtype=torch.float64)
        self.squares = torch.zeros(3, dtype=torch.float64)
        self._factors: Factors | None = None

    @property
    def cells(self) -> int:
        return int(self.moments[-1, -1])

    def observe(self, latent: Tensor, image: Tensor) -> None:
        """Learn from raw latents [b, 32, h, w] and their images [b, 32h, 32w, 3] in [0, 1]."""
        y = F.avg_pool2d(image.movedim(-1, 1).float().cpu(), DOWNSCALE).movedim(1, -1).reshape(-1, 3).double() * 2 - 1
        x = (latent.float().cpu() * SCALE).movedim(1, -1).reshape(-1, LATENT_CHANNELS)
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
        # Not in place: a host may make this object in inference mode, and others decode outside it.
        self.moments = self.moments + x.T @ x
        self.products = self.products + x.T @ y
        self.squares = self.squares + y.square().sum(0)
        self._factors = None

    def factors(self) -> Factors:
        if self._factors is None:
            ridge = RIDGE * torch.eye(LATENT_CHANNELS + 1, dtype=torch.float64)
            solution = torch.linalg.solve(self.moments + ridge, self.products)
            self._factors = Factors(solution[:-1].tolist(), solution[-1].tolist())
        return self._factors

    def explained(self) -> float:
        """The share of the colours' variance that the map explains, of what it has seen: R^2; 0 where all are equal."""
        factors = self.factors()
        solution = torch.tensor([*factors.rows, factors.bias], dtype=torch.float64)
        error = self.squares - 2 * (solution * self.products).sum(0) + (solution * (self.moments @ solution)).sum(0)
        variance = self.squares - self.products[-1].square() / self.cells
        return float(1 - error.sum() / variance.sum()) if variance.sum() > 1e-6 * self.cells else 0.0


def find(source: checkpoint.Source) -> Factors | None:
    """The map of the VAE in a file or folder, if there is a VAE, and a map. Raises CheckpointError."""
    return read_factors(checkpoint.load(source, layouts.AUTOENCODER)) if source.holds(layouts.AUTOENCODER) else None


def read_factors(weights: checkpoint.Weights) -> Factors | None:
    """The map that belongs to a VAE: beside its file, where the user fitted one, or in the header. Raises
    CheckpointError."""
    where, stored = weights.path, weights.settings.get(SETTING)
    if fit_path(where).is_file():
        where = fit_path(where)
        stored = tensorfile.read_json(where)
    return None if stored is None else _checked(stored, where)


def _checked(stored: Any, where: Path) -> Factors:
    """The map that JSON describes. Raises CheckpointError."""
    try:
        return Factors(stored["rows"], stored["bias"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: its preview colours cannot be used ({error}); fit them anew") from None


def fit_path(path: Path) -> Path:
    """Where the fit of a VAE's file or folder lies."""
    return path / f"vae{SUFFIX}" if path.is_dir() else path.with_suffix(SUFFIX)


def fit(model: Autoencoder, batches: Iterable[Tensor]) -> RGBFit:
    """The map of a VAE by images [b, 3, h, w] in [-1, 1], whose sides are multiples of 32."""
    fitted, first = RGBFit(), next(model.parameters())
    with torch.inference_mode():
        for images in batches:
            fitted.observe(model.encode(images.to(first.device, first.dtype)), (images.movedim(1, -1) + 1) / 2)
    return fitted


def fit_file(vae: Path, folder: Path, force: bool) -> dict:
    """Fit the map of a VAE on a folder of images, and write it beside the VAE. Raises ValueError, OSError."""
    weights = checkpoint.load(vae, layouts.AUTOENCODER)
    target = fit_path(weights.path)
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists; overwrite it with --force")
    files = sorted(file for file in folder.rglob("*") if file.suffix[1:].lower() in image_files.READ and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    disk.check_writable(target)
    if not files:
        raise ValueError(f"{folder}: no folder with images ({', '.join(image_files.READ)})")
    model = checkpoint.build(weights, dtype=torch.float32)
    fitted = fit(model, map(_read_image, tqdm(files, unit="images", leave=False)))
    if fitted.cells < LEAST_CELLS:
        raise ValueError(
            f"{folder}: its images have {fitted.cells} cells of 32x32 pixels, and a fit needs {LEAST_CELLS}; add some"
        )
    with disk.replacing(target) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(fitted.factors())), encoding="utf-8")
    explained = round(fitted.explained(), 4)
    return {"file": str(target), "pictures": len(files), "cells": fitted.cells, "explained": explained}


def _read_image(path: Path) -> Tensor:
    """[1, 3, h, w] in [-1, 1], scaled down, cropped to whole cells."""
    image = image_files.read(path, "--fit-preview")
    shrink = min(1.0, SIDE_PX / max(image.size))
    size = [max(DOWNSCALE, round(length * shrink) // DOWNSCALE * DOWNSCALE) for length in image.size]
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float32)
    return torch.from_numpy(pixels).movedim(-1, 0)[None] / 127.5 - 1
