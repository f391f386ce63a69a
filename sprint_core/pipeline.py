"""SANA-Sprint from a prompt to an image, without ComfyUI: the file to read first.

    prompt -> Gemma-2 -> caption --.
    seed   -> noise x_s ------------+-> transformer, 1 to 4 steps -> x0 -> DC-AE -> image
    edges  -> DC-AE -> ControlNet --'

Command line: python -m sprint_core "a cat" --steps 2
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from . import messages, sampler, trigflow
from .devices import to_device
from .images import sizes
from .latent import DOWNSCALE, LATENT_CHANNELS, SCALE
from .models import controlnet
from .models.autoencoder import Autoencoder
from .models.controlnet import SanaControlNet
from .models.layers import sdpa
from .models.nag import NAG, join
from .models.transformer import SanaTransformer
from .text.encoder import TextEncoder, pad_embeddings
from .text.loading import find_tokenizer, prompt_format
from .weights import checkpoint, layouts, part, presets
from .weights.finite import first_and_count, is_finite, not_finite
from .weights.part import Config, Layout, Network
from .weights.tensorfile import CheckpointError

log = messages.logger(__name__)

MAX_GUIDANCE = 100.0
MULTISTEP = 20  # usual steps of a multi-step model
NAG_DEFAULT = NAG()


@dataclass(frozen=True)
class Control:
    """A ControlNet, its control image and when it acts. image: white edges on black, [b or 1, h, w, 3] in [0, 1].

    It acts from `start` to `end`, shares in [0, 1] of the way from noise to image, which the angle measures as in
    ComfyUI: 2 steps lie at 0 and 0.17, and 4 at 0, 0.17, 0.3 and 0.62. The image has the size of the generated ones.
    Raises ValueError on a strength outside [0, 10] and on a range that is none.
    """

    net: SanaControlNet
    image: Tensor
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        controlnet.check_strength_and_range(self.strength, self.start, self.end)

    def acts_at(self, s: Tensor) -> bool:
        """Whether it acts at flow time s, an fp32 scalar on the CPU."""
        return trigflow.acts_at(s, self.start, self.end)


class Caption(NamedTuple):
    """Embeddings of b prompts, zero-padded: [b, n, c]; mask [b, n], true but for padding, None without padding."""

    embeddings: Tensor
    mask: Tensor | None


@dataclass
class Pipeline:
    """The three networks of a SANA-Sprint, trained at size_px. `load` makes one; `generate` uses it.

    flow_shift: of a multi-step model in its place, which `generate_multistep` uses.
    """

    transformer: SanaTransformer
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    size_px: int = 1024
    flow_shift: float | None = None

    @classmethod
    @torch.inference_mode(False)  # in which weights could not be packed (models/prepacked.py)
    def load(
        cls,
        path: str | Path,
        *,
        autoencoder: str | Path | None = None,
        text_encoder: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        average: bool = False,
        multistep: bool = False,
    ) -> "Pipeline":
        """From a diffusers pipeline folder or a file with all parts, or a transformer and the other parts' paths.

        autoencoder, text_encoder: files or folders that replace that part of `path`. dtype: of every part; None keeps
        each file's, but never fp16. average: the moving average of the transformer's weights, in a training save.
        multistep: take a multi-step model, too. Raises CheckpointError.
        """
        source = checkpoint.Source(path, average)
        transformer = checkpoint.load(source, layouts.TRANSFORMER)
        vae = _part(layouts.AUTOENCODER, source, autoencoder, "autoencoder (--vae)")
        gemma = _part(layouts.TEXT_ENCODER, source, text_encoder, "text_encoder (--text-encoder)")
        is_multistep = not transformer.config.guidance_embed
        if is_multistep and not multistep:
            raise CheckpointError(
                f"{path}: a multi-step model; sample it in ComfyUI with KSampler, or by python -m sprint_core.batch"
            )
        return cls(
            _build(transformer, dtype, device),
            _build(vae, dtype, device),
            TextEncoder(_build(gemma, dtype, device), find_tokenizer(gemma), prompt_format(gemma)),
            transformer.settings["size_px"],
            transformer.settings["flow_shift"] if is_multistep else None,
        )

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str] | Caption,
        *,
        seeds: Sequence[int],
        size: tuple[int, int] | None = None,
        steps: int = 2,
        schedule: str | Sequence[float] = "auto",
        guidance: float = presets.GUIDANCE,
        image: Tensor | None = None,
        strength: float = 1.0,
        controls: Sequence[Control] = (),
        negative: str | Caption | None = None,
        nag: NAG = NAG_DEFAULT,
        on_step: Callable[[int, Tensor, Tensor], object] | None = None,
    ) -> Tensor:
        """Images [b, h, w, 3] in [0, 1], fp32, one per prompt and seed.

        prompts: text, or the result of `encode_text`, for which no text encoder is needed;
        size: (width, height), multiples of 32, by default those of `image` or the model's own;
        steps, schedule: see trigflow.schedule; guidance: in (0, 100], embedded by the network;
        image: start of image-to-image, [b or 1, h, w, 3] in [0, 1]; strength: in (0, 1], 1 keeps
        nothing of it; negative: what to avoid in all images, text or the Caption of one, as `nag` says; on_step(i,
        x_s, x0): called after each prediction, may raise to stop.
        Raises ValueError on bad arguments and on NaN.
        """
        if self.flow_shift is not None:
            raise ValueError("a multi-step model, which generate_multistep samples")
        count = len(prompts.embeddings if isinstance(prompts, Caption) else prompts)
        if count != len(seeds):
            raise ValueError(f"{count} prompts but {len(seeds)} seeds")
        if not 0 < guidance <= MAX_GUIDANCE:
            raise ValueError(f"guidance is {guidance:g}; it must lie in (0, {MAX_GUIDANCE:g}], and 4.5 is usual")
        sigmas = torch.tensor(trigflow.sigmas(schedule, steps, strength))
        width, height = size or ((self.size_px,) * 2 if image is None else (image.shape[2], image.shape[1]))
        if sizes.round_size(width, height) != (width, height):
            raise ValueError(f"size {width}x{height}: both must be multiples of {DOWNSCALE}")
        if image is not None and tuple(image.shape[1:]) != (height, width, 3):
            raise ValueError(f"image is {list(image.shape)}; it must be [b, {height}, {width}, 3]")
        for control in controls:
            _require_fit(self.transformer, control, (len(seeds), height, width))
        device = next(self.transformer.parameters()).device
        caption, mask = prompts if isinstance(prompts, Caption) else self.encode_text(prompts)
        avoided = self.encode_text([negative]) if isinstance(negative, str) else negative
        _require_negative(avoided, caption)

        shape = (LATENT_CHANNELS, height // DOWNSCALE, width // DOWNSCALE)
        x_s = to_device(sampler.initial_noise(seeds, shape), device)
        start = torch.zeros_like(x_s) if image is None else self.encode_image(image)
        x_s = trigflow.flow_add_noise(start, x_s, sigmas[0])
        denoise = self.denoiser(caption, mask, guidance, controls, avoided, nag)
        step_noise = sampler.StepNoise(seeds, shape, device)
        x0 = sampler.sample(denoise, x_s, sigmas, step_noise, on_step=on_step)
        self._require_finite(x0, controls)
        return self.decode(x0)

    @torch.inference_mode()
    def generate_multistep(
        self,
        prompts: Caption,
        *,
        seeds: Sequence[int],
        size: tuple[int, int] | None = None,
        steps: int = MULTISTEP,
        cfg: float = presets.GUIDANCE,
        negative: Caption | None = None,
    ) -> Tensor:
        """Images of a multi-step model, as of `generate`: Euler steps with classifier-free guidance.

        cfg: see sampler.classifier_free_guidance; negative: of b prompts, of empty ones if None. Raises ValueError.
        """
        if self.flow_shift is None:
            raise ValueError("a SANA-Sprint, which generate samples")
        width, height = size or (self.size_px,) * 2
        device, dtype = next(self.transformer.parameters()).device, self._dtype_of(self.transformer)
        conditions = prompts, negative or self.embed([""] * len(seeds))

        def denoise(x_s: Tensor, s: Tensor) -> Tensor:
            x, times = x_s.to(dtype), s.expand(len(x_s))
            conditional, unconditional = (self.transformer(x, times, c, mask=mask) for c, mask in conditions)
            v = sampler.classifier_free_guidance(conditional.float(), unconditional.float(), cfg)
            return trigflow.flow_predict_x0(v, x_s, s)

        noise = sampler.initial_noise(seeds, (LATENT_CHANNELS, height // DOWNSCALE, width // DOWNSCALE))
        sigmas = torch.tensor(trigflow.shifted_sigmas(steps, self.flow_shift), device=device)
        x0 = sampler.euler(denoise, to_device(noise, device), sigmas)
        self._require_finite(x0)
        return self.decode(x0)

    def _require_finite(self, x0: Tensor, controls: Sequence[Control] = ()) -> None:
        """Raises ValueError, which names the network whose weights are not."""
        if not is_finite(x0):
            nets = {"the transformer": self.transformer, "the text encoder": self.text_encoder.gemma}
            nets |= {f"ControlNet {i}": control.net for i, control in enumerate(controls, 1)}
            raise ValueError(_why_nan("the sampler returned NaN", nets, self._dtype_of(self.transformer)))

    def encode_text(self, prompts: Sequence[str]) -> Caption:
        """The Caption of these prompts, in the transformer's dtype. The log names what is not known or not read."""
        for notice in filter(None, map(self.text_encoder.notice, dict.fromkeys(prompts))):
            log.warning("%s", notice)
        return self.embed(prompts)

    def embed(self, prompts: Sequence[str]) -> Caption:
        """The same without a log."""
        rows = self.text_encoder.encode(prompts)
        caption, mask = pad_embeddings(rows)
        caption = caption.to(self._dtype_of(self.transformer))
        return Caption(caption, None if len({len(row) for row in rows}) == 1 else mask)

    def encode_image(self, image: Tensor) -> Tensor:
        """image [b, h, w, 3] in [0, 1] -> scaled latent [b, 32, h/32, w/32] in fp32."""
        dtype, device = self._dtype_of(self.autoencoder), next(self.autoencoder.parameters()).device
        pixels = rearrange(image * 2.0 - 1.0, "b h w c -> b c h w")
        # Contiguous like every other latent, since kernels for channels_last round differently.
        return self.autoencoder.encode(pixels.to(device, dtype)).float().contiguous() * SCALE

    def decode(self, x0: Tensor) -> Tensor:
        """Scaled latent [b, 32, h/32, w/32] -> image [b, h, w, 3] in [0, 1], fp32, decoded one image at a time.

        Raises ValueError on NaN.
        """
        dtype = self._dtype_of(self.autoencoder)
        images = torch.cat([self.autoencoder.decode(latent).float() for latent in (x0 / SCALE).to(dtype).split(1)])
        if not is_finite(images):
            raise ValueError(_why_nan("decoded NaN", {"the auto-encoder": self.autoencoder}, dtype))
        return rearrange(images.add_(1.0).div_(2.0).clamp_(0.0, 1.0), "b c h w -> b h w c")

    def denoiser(
        self,
        caption: Tensor,
        mask: Tensor | None,
        guidance: float,
        controls: Sequence[Control],
        negative: Caption | None = None,
        nag: NAG = NAG_DEFAULT,
        hints: Sequence[Tensor] | None = None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """denoise(x_s, s) -> x0 for the sampler: x_s and x0 [b, 32, h, w] in fp32, s an fp32 scalar on the CPU.

        caption: [b, n, c], mask: [b, n] or None; negative: of one or b prompts. Control images are encoded once, here,
        unless their latents come as hints.
        """
        dtype = self._dtype_of(self.transformer)
        encoded = [self.encode_image(control.image) for control in controls] if hints is None else hints
        hints = [hint.to(dtype) for hint in encoded]

        def denoise(x_s: Tensor, s: Tensor) -> Tensor:
            x = x_s.to(dtype)
            times, scales = (x_s.new_full((len(x_s),), number) for number in (s.item(), guidance))
            acting = [(c, hint) for c, hint in zip(controls, hints, strict=True) if c.acts_at(s)]
            residuals = [
                [r if r is None else c.strength * r for r in c.net(x, times, caption, hint, scales, mask)]
                for c, hint in acting
            ]
            text, text_mask, attention = caption, mask, sdpa
            if negative is not None and not nag.idle and nag.acts_at(s):
                text, text_mask = join(caption, mask, *negative)
                attention = nag.around(sdpa, caption.shape[1])
            residual = controlnet.sum_residuals(residuals)
            v = self.transformer(x, times, text, scales, text_mask, residual, attention)
            return trigflow.flow_predict_x0(v.float(), x_s, s)

        return denoise

    @staticmethod
    def _dtype_of(model: torch.nn.Module) -> torch.dtype:
        return next(model.parameters()).dtype


def _part(
    layout: Layout[Config, Network], model: checkpoint.Source, override: str | Path | None, option: str
) -> checkpoint.Weights[Config, Network]:
    """A part from `override`, a file or folder of its own, else from the model's. Raises CheckpointError."""
    try:
        return checkpoint.load(override or model, layout)
    except part.MissingPart as error:
        if override:
            raise
        raise CheckpointError(f"{error}, or name that part's file as {option}") from None


def _why_nan(what: str, networks: Mapping[str, torch.nn.Module], dtype: torch.dtype) -> str:
    for title, network in networks.items():
        if names := not_finite(network.state_dict()):
            return (
                f"{what}: {first_and_count(names)} of {title} holds NaN or infinity; download or convert its file again"
            )
    return f"{what} in {dtype}, though no weight holds any; try fp32"


def _require_negative(negative: Caption | None, caption: Tensor) -> None:
    """Raise ValueError unless a negative prompt is of the prompts' text encoder, and one or one for each of them."""
    if negative is None:
        return
    (count, _, width), prompts = negative.embeddings.shape, len(caption)
    if width != caption.shape[-1]:
        raise ValueError(f"the negative prompt is {width} wide, the prompt {caption.shape[-1]}; encode both alike")
    if count not in (1, prompts):
        raise ValueError(f"{count} negative prompts for {prompts} images; give one, or one for each")


def _require_fit(trunk: SanaTransformer, control: Control, size: tuple[int, int, int]) -> None:
    """Raise ValueError unless a control fits the trunk and images of this size, (batch, height, width)."""
    branch, config = control.net.config, trunk.config
    if (branch.width, branch.caption_width) != (config.width, config.caption_width):
        raise ValueError(
            f"a ControlNet of width {branch.width} for captions of width {branch.caption_width}; this model has "
            f"{config.width} and {config.caption_width}: take the ControlNet of this model's size"
        )
    shape = tuple(control.image.shape)
    if len(shape) != 4 or shape[0] not in (1, size[0]) or shape[1:] != (*size[1:], 3):
        raise ValueError(f"the control image is {list(shape)}; it must be [1 or {size[0]}, {size[1]}, {size[2]}, 3]")
    if not is_finite(control.image):
        raise ValueError("the control image holds NaN or infinity")


def _build(
    weights: checkpoint.Weights[Config, Network], dtype: torch.dtype | None, device: torch.device | str
) -> Network:
    dtype = _running_dtype(dtype or part.majority_dtype(weights.tensors), device)
    return checkpoint.build(weights, dtype=dtype, device=device)


def _running_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Never fp16, which Gemma and the DC-AE overflow: bf16 instead, or fp32 on the CPU, where it is no slower."""
    if dtype != torch.float16:
        return dtype
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
