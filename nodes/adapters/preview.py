"""Colours for ComfyUI's live previews, learnt from the user's own pictures.

ComfyUI paints a preview as a linear map from latent channels to RGB. No such map is published for
DC-AE, so each picture that the VAE decodes improves a least-squares fit, and from the
second run on the previews have colours. Nothing is fitted, stored or downloaded otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...sprint_core.autoencoder_config import DOWNSCALE, SCALE
from ...sprint_core.transformer import LATENT_CHANNELS

RIDGE = 1.0  # in cells; keeps the first, few observations from overshooting


class RGBFit:
    """Running least squares from a scaled latent cell [32] to its mean colour in [-1, 1]."""

    latest: "RGBFit | None" = None  # of the VAE that was last used; a MODEL does not know its VAE

    def __init__(self):
        self.moments = torch.zeros(LATENT_CHANNELS + 1, LATENT_CHANNELS + 1, dtype=torch.float64)
        self.products = torch.zeros(LATENT_CHANNELS + 1, 3, dtype=torch.float64)
        self.solution: Tensor | None = None

    def observe(self, latent: Tensor, image: Tensor) -> None:
        """Learn from raw latents [b, 32, h, w] and their images [b, 32h, 32w, 3] in [0, 1]."""
        cells = F.avg_pool2d(image.movedim(-1, 1).float().cpu(), DOWNSCALE).movedim(1, -1).reshape(-1, 3)
        x = (latent.float().cpu() * SCALE).movedim(1, -1).reshape(-1, LATENT_CHANNELS)
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
        # Not in place: ComfyUI makes this object in inference mode, others may decode outside it.
        self.moments = self.moments + x.T @ x
        self.products = self.products + x.T @ (cells.double() * 2 - 1)
        self.solution = None
        RGBFit.latest = self

    def factors(self) -> tuple[list[list[float]], list[float]]:
        """Rows [32][3] and bias [3]."""
        if self.solution is None:
            ridge = RIDGE * torch.eye(LATENT_CHANNELS + 1, dtype=torch.float64)
            self.solution = torch.linalg.solve(self.moments + ridge, self.products)
        return self.solution[:-1].tolist(), self.solution[-1].tolist()
