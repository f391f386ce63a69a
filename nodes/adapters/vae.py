"""A DC-AE, or a TAESANA, as ComfyUI's VAE: raw latents on the wires, feathered tiles, never fp16."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...sprint_core import messages
from ...sprint_core.devices import copied, cpu_multiplies_bf16
from ...sprint_core.latent import DOWNSCALE, LATENT_CHANNELS
from ...sprint_core.models import compiled
from ...sprint_core.weights import checkpoint, layouts
from ...sprint_core.weights.finite import is_finite
from . import finite, residence, screen, sources
from .options import DEFAULT, LoaderOptions
from .preview import Colours, factors_of

log = messages.logger(__name__)

# Bytes of activations per pixel and byte of dtype: 640 and 790 measured on the CPU, and a third.
ENCODE_FACTOR, DECODE_FACTOR = 850, 1050
TINY_ENCODE_FACTOR, TINY_DECODE_FACTOR = 31, 340  # of a TAESANA: 23 and 257 measured, and a third
RETRY_TILE, RETRY_OVERLAP = 16, 4  # latent cells: what ComfyUI falls back to when memory runs out


@contextlib.contextmanager
def without_log_line(part: str) -> Iterator[None]:
    """Drop the lines that hold `part` from what ComfyUI logs to the root logger, where they would mislead."""

    def keep(record: logging.LogRecord) -> bool:
        return part not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


def _never_fp16(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """bf16 or fp32 where ComfyUI runs VAEs in fp16 (--fp16-vae), which DC-AE's activations overflow."""
    if dtype != torch.float16:
        return dtype
    return torch.bfloat16 if mm.should_use_bf16(device) else torch.float32


class SanaVAE(comfy.sd.VAE):
    """VAE of a DC-AE, or of a TAESANA, which encodes and decodes the same latents.

    dtype: None leaves it to ComfyUI. plain: with ComfyUI's patcher that streams no weights, however large they are.
    Images on the wires are [b, h, w, 3] in [0, 1], latents [b, 32, h/32, w/32], raw. Raises ValueError for other
    latents, images without a whole cell, and results that are not finite.
    """

    def __init__(
        self,
        weights: checkpoint.Weights,
        dtype: torch.dtype | None,
        plain: bool,
    ):
        with without_log_line("No VAE weights detected"):
            super().__init__(sd={})  # sets every field of this ComfyUI's version, then stops for want of weights
        tiny = weights.layout is layouts.TINY_AUTOENCODER
        encode, decode = (TINY_ENCODE_FACTOR, TINY_DECODE_FACTOR) if tiny else (ENCODE_FACTOR, DECODE_FACTOR)
        self.downscale_ratio = self.upscale_ratio = DOWNSCALE
        self.latent_channels = LATENT_CHANNELS if tiny else weights.config.latent_channels
        self.working_dtypes = [torch.bfloat16, torch.float32]
        self.memory_used_encode = lambda shape, dtype: encode * shape[2] * shape[3] * mm.dtype_size(dtype)
        self.memory_used_decode = lambda shape, dtype: (
            decode * shape[2] * shape[3] * DOWNSCALE**2 * mm.dtype_size(dtype)
        )
        self.description = {} if tiny else {checkpoint.TENSOR_KEY: checkpoint.describe_tensor(weights)}
        self.path = weights.path
        self.colours = None if tiny else Colours(factors_of(weights))
        self.device = mm.vae_device()
        self.vae_dtype = dtype or _never_fp16(mm.vae_dtype(self.device, self.working_dtypes), self.device)
        self.output_device = mm.intermediate_device()
        ops = comfy.ops.disable_weight_init
        model = weights.layout.network(weights.config, ops=ops, dtype=self.vae_dtype)
        self.first_stage_model = model.eval().requires_grad_(False)
        mm.archive_model_dtypes(self.first_stage_model)
        make = residence.patcher_class(weights.tensors, self.device, self.vae_dtype, plain)
        self.patcher = make(self.first_stage_model, load_device=self.device, offload_device=mm.vae_offload_device())
        self.first_stage_model.load_state_dict(weights.tensors, strict=True, assign=self.patcher.is_dynamic())
        if not self.patcher.is_dynamic():
            self.first_stage_model.to(self.vae_dtype)  # layers that ComfyUI fills late keep the file's dtype
        self.model_size()

    @screen.one_sentence
    def decode(self, samples_in: Tensor, *args, **kwargs) -> Tensor:
        self._require_own(samples_in)
        return self._checked(samples_in, super().decode(samples_in, *args, **kwargs))

    @screen.one_sentence
    def decode_tiled(self, samples: Tensor, *args, **kwargs) -> Tensor:
        self._require_own(samples)
        return self._checked(samples, super().decode_tiled(samples, *args, **kwargs))

    @screen.one_sentence
    def encode(self, pixel_samples: Tensor, *args, **kwargs) -> Tensor:
        self._require_a_cell(pixel_samples)
        latent = super().encode(pixel_samples, *args, **kwargs)
        self._require_finite(pixel_samples, latent)
        return latent

    @screen.one_sentence
    def encode_tiled(self, pixel_samples: Tensor, *args, **kwargs) -> Tensor:
        self._require_a_cell(pixel_samples)
        latent = super().encode_tiled(pixel_samples, *args, **kwargs)
        self._require_finite(pixel_samples, latent)
        return latent

    def _require_a_cell(self, image: Tensor) -> None:
        """image [b, h, w, c]; ComfyUI crops it to multiples of 32."""
        height, width = image.shape[1:3]
        if min(height, width) < DOWNSCALE:
            raise ValueError(f"this image is {width} x {height} pixels; enlarge it to at least 32 x 32 for SANA's VAE")

    def _require_own(self, latent: Tensor) -> None:
        if latent.ndim != 4 or latent.shape[1] != self.latent_channels or 0 in latent.shape:
            raise ValueError(
                f"this latent has shape {list(latent.shape)}; SANA's VAE decodes [batch, {self.latent_channels}, "
                "height/32, width/32], so connect the VAE of the model that made the latent"
            )

    def _require_finite(self, source: Tensor, result: Tensor) -> None:
        """Of an image and its latent, either way: say where NaN in the result is from. Raises ValueError."""
        if is_finite(result):
            return
        if not is_finite(source):
            raise ValueError("what came into the VAE holds NaN or infinity; check the node that made it")
        if fault := finite.weights_fault(self.patcher, self.first_stage_model):
            raise ValueError(fault)
        advice = "send another image" if self.vae_dtype == torch.float32 else "load it in fp32"
        raise ValueError(
            f"{self.path}: this VAE makes NaN or infinity in {self.vae_dtype}, though its weights hold none; {advice}"
        )

    def _checked(self, latent: Tensor, image: Tensor) -> Tensor:
        """The decoded image, if all of it is finite; the previews' colours learn from it. Raises ValueError."""
        self._require_finite(latent, image)
        if self.colours is not None:
            self.colours.observe(latent, image)
        return image

    def decode_tiled_(
        self, samples: Tensor, tile_x: int = RETRY_TILE, tile_y: int = RETRY_TILE, overlap: int = RETRY_OVERLAP
    ) -> Tensor:
        """Sizes in latent cells. Square tiles, feathered, one pass."""
        tile = max(2, min(tile_x, tile_y))

        def run(latent: Tensor, progress: Callable[[int, int], None]) -> Tensor:
            overlap_px = min(overlap, tile - 1) * DOWNSCALE
            image = self.first_stage_model.decode_tiled(latent, tile * DOWNSCALE, overlap_px, progress)
            return self.process_output(image.to(self.output_device, torch.float32))

        return self._by_image(samples, run)

    def encode_tiled_(self, pixel_samples: Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 128) -> Tensor:
        """Sizes in pixels, rounded to whole latent cells."""
        tile = max(2, min(tile_x, tile_y) // DOWNSCALE) * DOWNSCALE
        overlap_px = min(overlap // DOWNSCALE * DOWNSCALE, tile - DOWNSCALE)

        def run(image: Tensor, progress: Callable[[int, int], None]) -> Tensor:
            latent = self.first_stage_model.encode_tiled(image, tile, overlap_px, progress)
            return latent.to(self.output_device, torch.float32)

        return self._by_image(self.process_input(pixel_samples), run)

    def _by_image(self, batch: Tensor, run: Callable[[Tensor, Callable[[int, int], None]], Tensor]) -> Tensor:
        """One image at a time, since tiling is for want of memory, with a progress bar."""
        bar = comfy.utils.ProgressBar(len(batch))
        out = []
        for i in range(len(batch)):

            def progress(done: int, total: int, i: int = i) -> None:
                bar.update_absolute(i * total + done, len(batch) * total)

            out.append(run(batch[i : i + 1].to(self.device, self.vae_dtype), progress))
        return torch.cat(out)

    def get_sd(self) -> dict[str, Tensor]:
        return super().get_sd() | self.description


def load_vae(
    source: checkpoint.Source | str | Path, options: LoaderOptions = DEFAULT, disable_dynamic: bool = False
) -> SanaVAE:
    """VAE of a file or folder, a DC-AE or a TAESANA, by its `dtype` and `compile`.

    A compiled one is always loaded as a whole: weights that come as they are needed break the graph at every layer.
    Raises CheckpointError, ValueError.
    """
    if options.compile:
        compiled.require_compiler(mm.vae_device().type)
    source = sources.opened(source)
    weights = _weights(source)
    vae = SanaVAE(weights, options.dtype, plain=disable_dynamic or options.compile)
    vae.patcher.cached_patcher_init = (load_vae_patcher, (source.path, options))
    if options.compile:
        model, vae.disable_offload = vae.first_stage_model, True
        compiled.compile_in_place(*(half for half in (model.encoder, model.decoder) if half is not None))
    return vae


def bf16_copy(vae: SanaVAE) -> SanaVAE | None:
    """A copy of a VAE on the CPU, which computes in bf16; None where it does already, or the CPU cannot."""
    if vae.vae_dtype != torch.float32 or not cpu_multiplies_bf16():
        return None
    other = copy.copy(vae)
    other.vae_dtype, other.colours = torch.bfloat16, None
    other.first_stage_model = copied(vae.first_stage_model, other.vae_dtype)
    mm.archive_model_dtypes(other.first_stage_model)
    other.patcher = comfy.model_patcher.ModelPatcher(other.first_stage_model, vae.device, mm.vae_offload_device())
    return other


def _weights(source: checkpoint.Source) -> checkpoint.Weights:
    """Of a DC-AE, or of a TAESANA where the file holds none. Raises CheckpointError."""
    tiny = None if source.holds(layouts.AUTOENCODER) else checkpoint.load_tiny(source)
    if tiny is not None:
        log.info("TAESANA: %s", " and ".join(tiny.config.halves))
        return tiny
    weights = checkpoint.load(source, layouts.AUTOENCODER)
    checkpoint.check_names(weights)
    log.info("%s", checkpoint.summary(weights))
    return weights


@screen.one_sentence
def load_vae_patcher(
    path: Path, options: LoaderOptions = DEFAULT, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """What ComfyUI calls for a plain copy of the VAE's patcher."""
    return load_vae(path, options, disable_dynamic).patcher
