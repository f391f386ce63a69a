"""Live previews: how ComfyUI paints a latent while it is sampled.

ComfyUI's RGB previewer is `reshape`, then a linear map. A model paints with the map of its own VAE where that is known
(sprint_core.images.preview), else with one that is learnt from each image that a VAE decodes. Where the user asked
for TAESD previews and models/vae_approx has a TAESANA, `reshape` is its decoder, and the map the identity. So every
sampler shows them, and nothing is patched.
"""

import functools
import os
from collections.abc import Callable

import comfy.cli_args
import comfy.model_management as mm
import folder_paths
import latent_preview
import torch
import torch.nn.functional as F
from torch import Tensor

from ...sprint_core import messages
from ...sprint_core.images import preview
from ...sprint_core.images.preview import Factors, RGBFit
from ...sprint_core.latent import SCALE
from ...sprint_core.models import tiny_autoencoder
from ...sprint_core.weights import checkpoint
from ...sprint_core.weights.checkpoint import Weights
from ...sprint_core.weights.tensorfile import CheckpointError
from .folders import APPROXIMATE, TINY_DECODER

log = messages.logger(__name__)

IDENTITY = torch.eye(3).tolist()


class Colours:
    """The map of one VAE: stored with it, or learnt from what it decodes."""

    latest: "Colours | None" = None  # of the VAE that was last used; a MODEL by itself does not know its VAE

    def __init__(self, stored: Factors | None):
        self.stored, self.fit = stored, RGBFit()
        if stored is not None:
            Colours.latest = self

    def observe(self, latent: Tensor, image: Tensor) -> None:
        """Learn from raw latents [b, 32, h, w] and their images [b, 32h, 32w, 3] in [0, 1]."""
        if self.stored is None:
            self.fit.observe(latent, image)
        Colours.latest = self

    def factors(self) -> Factors:
        return self.stored or self.fit.factors()


class Painter:
    """What a model's latent format tells ComfyUI's previewer."""

    own: Factors | None = None

    @property
    def factors(self) -> Factors | None:
        return self.own or (Colours.latest and Colours.latest.factors())

    @property
    def rows(self) -> list[list[float]] | None:
        if taesana() is not None:
            return IDENTITY
        return self.factors and [list(row) for row in self.factors.rows]

    @property
    def bias(self) -> list[float] | None:
        return None if taesana() is not None else self.factors and list(self.factors.bias)

    @property
    def reshape(self) -> Callable[[Tensor], Tensor] | None:
        """x0 of the sampler, scaled latents [b, 32, h, w] -> [1, 3, height, width], or None for the linear map."""
        decoder = taesana()
        return decoder and functools.partial(_paint, decoder)

    @property
    def stock_name(self) -> str:
        """What ComfyUI looks for when TAESD previews are asked for, and names in the log when it is not there.

        ComfyUI's own TAESD cannot read a TAESANA, so that it must not find one.
        """
        if _file() is None:
            return TINY_DECODER
        return f"[no stock TAESD reads {TINY_DECODER}; SANA-Sprint paints the previews]"


def factors_of(source: Weights | checkpoint.Source) -> Factors | None:
    """The map of a VAE, or of the VAE in a file or folder; none where it is damaged, which the log says."""
    try:
        return preview.read_factors(source) if isinstance(source, Weights) else preview.find(source)
    except CheckpointError as error:
        log.warning("previews learn their colours anew: %s", error)
        return None


def _paint(decoder: tiny_autoencoder.TinyAutoencoder, x0: Tensor) -> Tensor:
    """The first of scaled latents [b, 32, h, w] as an image [1, 3, height, width] in [-1, 1], as large as it is shown.

    It is shrunk where it was made, as every pixel would travel else. A latent cannot be shrunk instead: a cell tells
    what is in its 32 x 32 pixels, and the average of four is four images in one.
    """
    dtype = torch.bfloat16 if mm.should_use_bf16(x0.device) else torch.float32
    decoder.to(x0.device, dtype)
    image = decoder.decode_tiled(x0[:1].to(dtype) / SCALE).float()
    height, width = image.shape[-2:]
    shown = latent_preview.MAX_PREVIEW_RESOLUTION / max(height, width)
    size = [max(1, round(side * shown)) for side in (height, width)]
    return image if shown >= 1 else F.interpolate(image, size, mode="area")


def taesana() -> tiny_autoencoder.TinyAutoencoder | None:
    """The decoder in models/vae_approx, if TAESD previews are asked for and it is there and whole."""
    if latent_preview.args.preview_method != comfy.cli_args.LatentPreviewMethod.TAESD:
        return None
    path = _file()
    return None if path is None else _loaded(path, os.stat(path).st_mtime_ns)


def _file() -> str | None:
    names = [name for name in folder_paths.get_filename_list(APPROXIMATE) if name.startswith(TINY_DECODER)]
    return folder_paths.get_full_path(APPROXIMATE, names[0]) if names else None


@functools.lru_cache(maxsize=1)
def _loaded(path: str, changed_ns: int) -> tiny_autoencoder.TinyAutoencoder | None:
    """changed_ns: when the file was, so that a repaired one is read."""
    try:
        weights = checkpoint.load_tiny(path)
    except CheckpointError as error:
        log.warning("previews in colours of the latent instead: %s", error)
        return None
    if weights is None or "decoder" not in weights.config.halves:
        log.warning("previews in colours of the latent instead: %s is no TAESANA decoder", path)
        return None
    return checkpoint.build(weights, dtype=torch.float32)
