"""The painter of a live canvas by ComfyUI's own objects: what a graph of stock nodes would do, and no more."""

from collections.abc import Sequence

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import node_helpers
import torch
from torch import Tensor

from ...sprint_core.images.frames import Frame
from ...sprint_core.latent import DOWNSCALE, LATENT_CHANNELS
from ...sprint_core.live import SeedNoise, sigmas_of
from . import control, sampling
from .vae import SanaVAE, bf16_copy


class ComfyPainter:
    """`sprint_core.live.Painter` of a MODEL, a CLIP, a VAE and perhaps a CONTROL_NET. Raises ValueError."""

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        clip: comfy.sd.CLIP,
        vae: comfy.sd.VAE,
        control_net: control.SanaControl | None = None,
    ):
        sampling.require_sprint(model)
        if control_net is not None:
            control.require_own(control_net, vae)
        self.model, self.clip, self.vae, self.control_net = model, clip, vae, control_net
        self.steers = control_net is not None
        self.on_cpu = mm.get_torch_device().type == "cpu"
        branches = [] if control_net is None else [control_net.control_model]
        self.networks: Sequence[torch.nn.Module] = [model.model.diffusion_model, vae.first_stage_model, *branches]

    def encode_text(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def encode_lines(self, image: Tensor) -> Tensor:
        assert self.control_net is not None
        self.control_net.hints.encode(self.vae, image)  # which sampling then finds there
        return image

    def encode_paint(self, image: Tensor) -> Tensor:
        return self.vae.encode(image)

    def sample(
        self, frame: Frame, caption: list, noise: SeedNoise, hint: Tensor | None, start: Tensor | None
    ) -> Tensor:
        positive = node_helpers.conditioning_set_values(caption, {"guidance": frame.guidance})
        if hint is not None and self.control_net is not None:
            positive, _ = control.apply(positive, None, self.control_net, hint, self.vae, frame.strength, 0.0, 1.0)
        if start is None:
            shape = (1, LATENT_CHANNELS, frame.height // DOWNSCALE, frame.width // DOWNSCALE)
            start = torch.zeros(shape, device=mm.intermediate_device())
        drawn = (noise.initial, noise.steps())
        return sampling.sample_quietly(self.model, positive, start, sigmas_of(frame), frame.seed, drawn)

    def decode(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent)

    def in_bf16(self) -> "ComfyPainter | None":
        vae = bf16_copy(self.vae) if self.on_cpu and isinstance(self.vae, SanaVAE) else None
        return None if vae is None else ComfyPainter(self.model, self.clip, vae, self.control_net)
