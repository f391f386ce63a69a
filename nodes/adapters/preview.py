"""Live previews: how ComfyUI paints a latent while it is sampled.

ComfyUI's RGB previewer is `reshape`, then a linear map. A model paints with the map of its own VAE where that is known
(sprint_core.preview), else with one that is learnt from each picture that a VAE decodes. Where the user asked for TAESD
previews and models/vae_approx has a TAESANA, `reshape` is its decoder, and the map the identity. So every sampler shows
them, and nothing is patched.
"""

import functools
import logging

import comfy.cli_args
import folder_paths
import latent_preview
import torch
from torch import Tensor

from ...sprint_core import tiny_autoencoder
from ...sprint_core.autoencoder_config import SCALE
from ...sprint_core.preview import Factors, RGBFit
from ...sprint_core.tensorfile import CheckpointError

log = logging.getLogger(__name__)

NAME = "taesana_decoder"  # of a file in models/vae_approx
IDENTITY = torch.eye(3).tolist()


class Colours:
    """The map of one VAE: known, or learnt from what it decodes."""

    latest: "Colours | None" = None  # of the VAE that was last used; a MODEL by itself does not know its VAE

    def __init__(self, known: Factors | None = None):
        self.known, self.fit = known, RGBFit()
        if known is not None:
            Colours.latest = self

    def observe(self, latent: Tensor, image: Tensor) -> None:
        """Learn from raw latents [b, 32, h, w] and their images [b, 32h, 32w, 3] in [0, 1]."""
        if self.known is None:
            self.fit.observe(latent, image)
        Colours.latest = self

    def factors(self) -> Factors:
        return self.known or self.fit.factors()


class Painter:
    """What a model's latent format tells ComfyUI's previewer."""

    own: Factors | None = None

    @property
    def factors(self) -> Factors | None:
        return self.own or (Colours.latest and Colours.latest.factors())

    @property
    def rows(self) -> list | None:
        if taesana() is not None:
            return IDENTITY
        return self.factors and [list(row) for row in self.factors.rows]

    @property
    def bias(self) -> list | None:
        return None if taesana() is not None else self.factors and list(self.factors.bias)

    @property
    def reshape(self):
        """x0 of the sampler, scaled latents [b, 32, h, w] -> [b, 3, 32h, 32w], or None for the linear map."""
        decoder = taesana()
        return decoder and functools.partial(_paint, decoder)

    @property
    def stock_name(self) -> str:
        """What ComfyUI looks for when TAESD previews are asked for, and names in the log when it is not there.

        ComfyUI's own TAESD cannot read a TAESANA, so that it must not find one.
        """
        if _file() is None:
            return NAME
        return f"[a stock TAESD for SANA, which does not exist; {NAME} of this folder paints the previews]"


def _paint(decoder: tiny_autoencoder.TinyAutoencoder, x0: Tensor) -> Tensor:
    first = next(decoder.parameters())
    if first.device != x0.device:
        decoder.to(x0.device)
    return decoder.decode(x0[:1].to(first.dtype) / SCALE).to(x0.dtype)


def taesana() -> tiny_autoencoder.TinyAutoencoder | None:
    """The decoder in models/vae_approx, if TAESD previews are asked for and it is there and whole."""
    if latent_preview.args.preview_method != comfy.cli_args.LatentPreviewMethod.TAESD:
        return None
    path = _file()
    return path and _loaded(path)


def _file() -> str | None:
    if "vae_approx" not in folder_paths.folder_names_and_paths:
        return None
    found = [name for name in folder_paths.get_filename_list("vae_approx") if name.startswith(NAME)]
    return folder_paths.get_full_path("vae_approx", found[0]) if found else None


@functools.lru_cache(maxsize=1)
def _loaded(path: str) -> tiny_autoencoder.TinyAutoencoder | None:
    try:
        weights = tiny_autoencoder.load(path)
    except CheckpointError as error:
        log.warning("previews in colours of the latent instead: %s", error)
        return None
    if weights is None or "decoder" not in weights.halves:
        log.warning("previews in colours of the latent instead: %s is no TAESANA decoder", path)
        return None
    return weights.build()
