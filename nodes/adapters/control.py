"""A SANA ControlNet as ComfyUI's CONTROL_NET, for our apply node and for the stock ones.

ComfyUI's own ControlNet class does the rest: chaining, ranges, strength, memory. What differs: the hint is a
latent, and kept; the network takes the flow time itself; and what cannot work is refused before it runs.
"""

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import Tensor

from ...sprint_core import messages
from ...sprint_core.latent import DOWNSCALE, LATENT_CHANNELS
from ...sprint_core.models.controlnet import ControlNetConfig, SanaControlNet, check_strength_and_range
from ...sprint_core.weights import checkpoint, layouts
from ...sprint_core.weights.finite import is_finite
from ...sprint_core.weights.presets import GUIDANCE
from . import residence, screen, sources
from .model import SanaLatent, SanaModel, attend
from .options import LoaderOptions

log = messages.logger(__name__)

KEPT_HINTS = 4
CONDITIONS = ["guidance", "attention_mask"]  # what the network reads of a CONDITIONING beside its text
FLOW_TIMES = "flow_times"  # our entry among a control object's extra arguments
FINER, COARSER, AS_IT_IS = "bicubic", "area", "nearest-exact"  # how a control image is resized to the result


class HostedControlNet(SanaControlNet):
    """The network behind ComfyUI's call contract for ControlNets."""

    path: Path | None = None  # of its file

    def __init__(
        self,
        config: ControlNetConfig,
        dtype: torch.dtype,
        device: torch.device,
        operations: Any,
    ):
        super().__init__(config, ops=operations, dtype=dtype, device=device)
        self.dtype = dtype

    def forward(
        self,
        x: Tensor,
        hint: Tensor,
        timesteps: Tensor,
        context: Tensor,
        flow_times: "FlowTimes",
        guidance: float | None = None,
        attention_mask: Tensor | None = None,
        **unused,
    ) -> dict[str, list[Tensor | None]]:
        """timesteps come rounded to the network's dtype; flow_times has them in fp32."""
        s = flow_times.latest.to(x.device).expand(len(x))
        w = torch.full((len(x),), GUIDANCE if guidance is None else guidance, device=x.device)
        attention = functools.partial(attend, transformer_options={})
        return {"input": super().forward(x, s, context, hint.to(x.dtype), w, attention_mask, attention)}


class FlowTimes:
    """Stands for the model's sampling in front of the network: sigma is the flow time, whatever multiplies it."""

    latest: Tensor  # flow times [b] of the step, which `timestep` takes down just before the network runs

    def __init__(self, sampling: Any):
        self.sampling = sampling

    def timestep(self, sigma: Tensor) -> Tensor:
        self.latest = sigma.float()
        return sigma

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return self.sampling.calculate_input(sigma, noise)


class Hints:
    """Latents of the latest control images, so that neither a step nor the next run encodes one again."""

    def __init__(self) -> None:
        self.kept: list[tuple[weakref.ref, object, Tensor, Tensor]] = []  # no VAE lives on for its hints

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        """pixels: [b, h, w, 3] in [0, 1] -> raw latent [b, 32, h/32, w/32]."""
        # The number of threads, which a live canvas changes, changes the last bits.
        patches = getattr(vae.patcher, "patches_uuid", None), torch.get_num_threads()
        model = vae.first_stage_model
        self.kept = [entry for entry in self.kept if entry[0]() is not None]
        for kept_model, kept_patches, image, latent in self.kept:
            same_weights = kept_model() is model and kept_patches == patches
            if (
                same_weights
                and (image.shape, image.device) == (pixels.shape, pixels.device)
                and torch.equal(image, pixels)
            ):
                return latent
        latent = vae.encode(pixels)
        self.kept = [(weakref.ref(model), patches, pixels.clone(), latent), *self.kept[: KEPT_HINTS - 1]]
        return latent


class KeepingVAE:
    """A VAE whose `encode` asks `Hints` first."""

    def __init__(self, vae: Any, hints: Hints):
        self.vae, self.hints = vae, hints

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.hints.encode(self.vae, pixels)


class SanaControl(comfy.controlnet.ControlNet):
    """CONTROL_NET of a SANA, and each of its applications to a prompt; copies share network and hints."""

    steers_sana = True  # what guard.guard_run asks of a control

    def __init__(
        self,
        patcher: comfy.model_patcher.ModelPatcher,
        load_device: torch.device | None,
        manual_cast_dtype: torch.dtype | None,
    ):
        super().__init__(
            None,  # for which it would choose a patcher
            compression_ratio=1,  # of the hint to the latent: it is one
            latent_format=SanaLatent(),
            load_device=load_device,
            manual_cast_dtype=manual_cast_dtype,
            extra_conds=CONDITIONS,
            preprocess_image=lambda image: image.clamp(0.0, 1.0),  # which resizing may leave
        )
        self.control_model, self.control_model_wrapped = patcher.model, patcher
        self.hints = Hints()

    def copy(self) -> "SanaControl":
        other = type(self)(self.control_model_wrapped, self.load_device, self.manual_cast_dtype)
        other.hints = self.hints
        self.copy_to(other)
        return other

    @screen.one_sentence
    def set_cond_hint(
        self,
        cond_hint: Tensor,
        strength: float = 1.0,
        timestep_percent_range: tuple[float, float] = (0.0, 1.0),
        vae: Any = None,
        **more,
    ) -> "SanaControl":
        """Called by every apply node. cond_hint: [b, 3, h, w] in [0, 1]. Raises ValueError."""
        _require_image(cond_hint)
        _require_vae(vae)
        check_strength_and_range(strength, *timestep_percent_range)
        return super().set_cond_hint(cond_hint, strength, timestep_percent_range, KeepingVAE(vae, self.hints), **more)

    def pre_run(self, model: Any, percent_to_timestep_function: Callable) -> None:
        _require_trunk(self.control_model.config, model)
        super().pre_run(model, percent_to_timestep_function)
        self.model_sampling_current = self.extra_args[FLOW_TIMES] = FlowTimes(model.model_sampling)

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: dict, batched_number: int, *args) -> dict | None:
        count, images = len(self.cond_hint_original), len(x_noisy) // batched_number
        if count not in (1, images):
            raise ValueError(
                f"the ControlNet has {count} control images for {images} images; connect one, or one for each"
            )
        _require_crop(self.cond_hint_original, x_noisy)
        sizes = zip(self.cond_hint_original.shape[-2:], x_noisy.shape[-2:], strict=True)
        scales = [side / (cells * DOWNSCALE) for side, cells in sizes]
        shrinks = min(scales) > 1  # after cropping to the proportions
        fits = scales == [1.0, 1.0]  # and need not be computed again: bicubic takes as long as a block of the network
        self.upscale_algorithm = AS_IT_IS if fits else COARSER if shrinks else FINER
        return super().get_control(x_noisy, t, cond, batched_number, *args)

    def cleanup(self) -> None:
        self.extra_args.pop(FLOW_TIMES, None)
        super().cleanup()


def _require_image(hint: Tensor) -> None:
    if hint.ndim != 4:
        raise ValueError(f"the control image has {hint.ndim} dimensions, not 4; connect an IMAGE")
    if 0 in hint.shape:
        raise ValueError(f"the control image is empty, of shape {list(hint.shape)}; check the node that made it")
    if not is_finite(hint):
        raise ValueError("the control image holds NaN or infinity; check the node that made it")
    if hint.shape[1] != 3:
        raise ValueError(
            f"the control image has {hint.shape[1]} channels; it needs the 3 of an image without alpha; "
            "use Split Image with Alpha"
        )


def _require_crop(hint: Tensor, latent: Tensor) -> None:
    """Refuse hints [b, 3, h, w] so thin that nothing is left of them in the latent's proportions. Raises ValueError."""
    (height, width), (rows, columns) = hint.shape[-2:], latent.shape[-2:]
    kept = ((height, min(height, width * rows / columns)), (width, min(width, height * columns / rows)))
    if any(side - 2 * round((side - part) / 2) < 1 for side, part in kept):  # as ComfyUI crops
        raise ValueError(
            f"the control image is {width} x {height}, of which nothing is left in the proportions of the result, "
            f"{columns * DOWNSCALE} x {rows * DOWNSCALE}; take a wider one"
        )


def _require_vae(vae) -> None:
    if vae is None:
        raise ValueError(
            "a SANA ControlNet reads its control image through the VAE; connect the VAE to the apply node, or use "
            "one that has such an input (SANA-Sprint ControlNet Apply, Apply ControlNet)"
        )
    if getattr(vae, "latent_channels", LATENT_CHANNELS) != LATENT_CHANNELS or (
        vae.spacial_compression_encode() != DOWNSCALE
    ):
        raise ValueError("this VAE is not SANA's (DC-AE f32c32); connect Load SANA-Sprint's or Load SANA VAE's")


def _require_trunk(config: ControlNetConfig, model) -> None:
    if not isinstance(model, SanaModel):
        raise ValueError(
            "this MODEL is not a SANA; a SANA ControlNet steers SANA models only, so connect Load SANA Model"
        )
    trunk = model.model_config.unet_config["config"]
    if (config.width, config.caption_width) != (trunk.width, trunk.caption_width):
        raise ValueError(
            f"this ControlNet belongs to a SANA of width {config.width}, the MODEL has {trunk.width}; load the "
            "ControlNet of the model's size (0.6B: 1152, 1.6B: 2240)"
        )


def load_control(path: Path, options: LoaderOptions) -> SanaControl:
    """CONTROL_NET of a file or folder, by its `dtype`, `time_scale` and `wiring`. Raises CheckpointError."""
    source = sources.opened(path, options.average)
    weights = checkpoint.load(source, layouts.CONTROLNET, options.time_scale, options.wiring)
    checkpoint.check_names(weights)
    log.info("%s, wired like %s", checkpoint.summary(weights), weights.config.wiring)
    device, supported = mm.get_torch_device(), [torch.bfloat16, torch.float32]
    dtype = options.dtype or mm.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights.tensors), supported_dtypes=supported
    )
    cast = mm.unet_manual_cast(dtype, device, supported)
    ops = comfy.ops.pick_operations(dtype, cast, disable_fast_fp8=True)
    offload = mm.unet_offload_device()
    net = HostedControlNet(weights.config, dtype, offload, ops).eval().requires_grad_(False)
    net.path = path
    patcher = residence.patcher_class(weights.tensors, device, dtype)(net, load_device=device, offload_device=offload)
    net.load_state_dict(weights.tensors, strict=True, assign=patcher.is_dynamic())
    if not patcher.is_dynamic():
        net.to(dtype)  # layers that ComfyUI fills late keep the file's dtype
    return SanaControl(patcher, device, cast)


def require_own(control_net: Any, vae: Any) -> None:
    """Refuse a CONTROL_NET of another family, and a VAE that is not SANA's. Raises ValueError."""
    if not isinstance(control_net, SanaControl):
        raise ValueError("this CONTROL_NET is not of SANA; connect Load SANA ControlNet")
    _require_vae(vae)


def apply(
    positive: list,
    negative: list | None,
    control_net: SanaControl,
    image: Tensor,
    vae: Any,
    strength: float,
    start: float,
    end: float,
) -> tuple[list, list]:
    """CONDITIONINGs with the ControlNet in them, chained after what they have; without a negative, twice the positive.

    image: [b, h, w, 3] in [0, 1]. start, end: where it acts, in [0, 1] from noise to image. Raises ValueError.
    """
    chained: dict = {}

    def with_control(conditioning: list) -> list:
        out = []
        for text, extra in conditioning:
            before = extra.get("control")
            if before not in chained:
                applied = control_net.copy().set_cond_hint(image.movedim(-1, 1), strength, (start, end), vae=vae)
                chained[before] = applied.set_previous_controlnet(before)
            out.append([text, {**extra, "control": chained[before], "control_apply_to_uncond": False}])
        return out

    return with_control(positive), with_control(positive if negative is None else negative)
