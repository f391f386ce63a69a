"""A SANA transformer as ComfyUI's MODEL.

To ComfyUI it is a rectified-flow model (CONST) with sigma = s, so that stock samplers, guiders,
masks, LoRA, offloading and previews apply. Nothing is registered: the patcher is built from the
classes below.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.ldm.modules.attention as host_attention
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ...sprint_core import messages, trigflow
from ...sprint_core.latent import DOWNSCALE, LATENT_CHANNELS, SCALE
from ...sprint_core.models.transformer import SanaTransformer, TransformerConfig
from ...sprint_core.weights import checkpoint, layouts, part
from ...sprint_core.weights.presets import GUIDANCE
from . import bypass, negative, patches, quantised, residence, screen, sources
from .guard import guard_run
from .options import DEFAULT, LoaderOptions
from .preview import Painter, factors_of

log = messages.logger(__name__)

WRAPPER_KEY = "sana_sprint"
TABLE_SIZE = 2520  # sigmas in the table that stock schedulers pick from: divided evenly by 1 to 10 steps
MEMORY_FACTOR = 4.5  # activations, in ComfyUI's unit: 3.4 measured for the 1.6B on the CPU, and a third


def attention_function() -> Callable[..., Tensor]:
    """ComfyUI's attention, but SDPA where it would fall back to the slow sub-quadratic one."""
    chosen = host_attention.optimized_attention
    slow = chosen in (host_attention.attention_sub_quad, host_attention.attention_split)
    return host_attention.attention_pytorch if slow else chosen


class HostedTransformer(SanaTransformer):
    """The network behind ComfyUI's call contract for diffusion models."""

    def __init__(
        self,
        config: TransformerConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        operations: Any = None,
    ):
        super().__init__(config, ops=quantised.operations(operations), dtype=dtype, device=device)
        self.dtype = dtype
        self.in_channels = self.out_channels = LATENT_CHANNELS  # what stock patches slice their predictions by

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        guidance: float | None = None,
        control: dict | None = None,
        transformer_options: dict | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """v [b, 32, h, w] of x, scaled latents at flow times `timesteps` [b]; guidance is one scale for all.

        Wrappers read arguments by position, as in ComfyUI's own guided DiTs: x first, transformer_options last.
        """
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        if wrappers:
            x = x.clone()  # EasyCache adds to it in place; in fp32 it is the sampler's own
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(self._run, self, wrappers).execute(
            x, timesteps, context, guidance, control, options, attention_mask=attention_mask
        )

    def _run(self, x, timesteps, context, guidance, control, options, attention_mask=None):
        if guidance is not None:
            guidance = torch.full((x.shape[0],), guidance, device=x.device)
        attention = negative.attention_of(options, functools.partial(attend, transformer_options=options))
        residuals = control.get("input", ()) if control else ()
        around = functools.partial(_around_block, options, self.config.depth)
        return super().forward(x, timesteps, context, guidance, attention_mask, residuals, attention, around)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, transformer_options: dict) -> Tensor:
    """layers.sdpa by the host."""
    return attention_function()(q, k, v, heads, mask=mask, transformer_options=transformer_options)


def _around_block(options, depth, index, run, x, caption):
    """Let stock patch nodes (skip-layer guidance and the like) replace a block, as in ComfyUI's own DiTs."""
    options["total_blocks"] = depth
    options["block_type"] = "double"
    options["block_index"] = index
    replace = options.get("patches_replace", {}).get("dit", {}).get(("double_block", index))
    if replace is None:
        return run(x, caption)

    def original(args):
        return {"img": run(args["img"], args["txt"]), "txt": args["txt"]}

    args = {"img": x, "txt": caption, "transformer_options": options}
    return replace(args, {"original_block": original})["img"]


# --- sampling -------------------------------------------------------------------------------------


def _share(timestep: Tensor, multiplier: float) -> Tensor:
    """Timesteps as shares of the way from image to noise. SDTurboScheduler's integers count a thousand steps from 0."""
    return timestep / multiplier if timestep.is_floating_point() else (timestep + 1) / 1000


class TrigFlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """ComfyUI's flow sampling with the sigma table linear in the TrigFlow angle.

    So the stock scheduler 'simple' gives the authors' schedules for any step count but 2. No sigma
    exceeds 1: ControlNet ranges that start at 0 would miss the first step.
    """

    def set_parameters(self, shift: float = 1.0, timesteps: int = TABLE_SIZE, multiplier: float = 1.0) -> None:
        super().set_parameters(shift, timesteps, multiplier)

    def sigma(self, timestep: float | Tensor) -> Tensor:
        timestep = timestep if isinstance(timestep, Tensor) else torch.tensor(float(timestep))
        t = _share(timestep, self.multiplier).to("cpu", torch.float64) * trigflow.T_MAX
        return trigflow.s_from_t(t).clamp(max=1.0).to(timestep.device, torch.float32)

    def percent_to_sigma(self, percent: float) -> float:
        return trigflow.percent_to_s(percent)


class FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """ComfyUI's flow sampling with the shift of the model's scheduler_config.json."""

    def sigma(self, timestep: float | Tensor) -> Tensor | float:
        if isinstance(timestep, Tensor):
            timestep = _share(timestep, self.multiplier) * self.multiplier
        return super().sigma(timestep)


class SanaLatent(comfy.latent_formats.LatentFormat):
    """DC-AE latents: 32 channels at 1/32 of the image's size. On wires they are raw, unscaled."""

    scale_factor = SCALE
    latent_channels = LATENT_CHANNELS
    spacial_downscale_ratio = DOWNSCALE

    def __init__(self):
        self.painter = Painter()

    latent_rgb_factors = property(lambda self: self.painter.rows)
    latent_rgb_factors_bias = property(lambda self: self.painter.bias)
    latent_rgb_factors_reshape = property(lambda self: self.painter.reshape)
    taesd_decoder_name = property(lambda self: self.painter.stock_name)


class SanaConfig(comfy.supported_models_base.BASE):
    """What BaseModel asks of a supported model; `weights` says which SANA it is."""

    unet_extra_config = {}
    sampling_settings = {"multiplier": 1.0, "shift": 1.0}
    latent_format = SanaLatent
    memory_usage_factor = MEMORY_FACTOR
    supported_inference_dtypes = [torch.bfloat16, torch.float32]
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def __init__(self, weights: checkpoint.Weights):
        super().__init__({"config": weights.config})
        self.sampling_settings["shift"] = 1.0 if weights.config.guidance_embed else weights.settings["flow_shift"]
        self.settings = weights.settings
        self.description = checkpoint.describe_tensor(weights)

    def get_model(self, state_dict: dict, prefix: str = "", device: torch.device | None = None) -> "SanaModel":
        return SanaModel(self, device)

    def process_unet_state_dict_for_saving(self, state_dict: dict) -> dict:
        return super().process_unet_state_dict_for_saving({**state_dict, checkpoint.TENSOR_KEY: self.description})


class SanaModel(comfy.model_base.BaseModel):
    """Any SANA: a Sprint, with its guidance built in, or a multi-step model."""

    def __init__(self, model_config: SanaConfig, device: torch.device | None = None):
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device, HostedTransformer)
        sampling = TrigFlowSampling if self.sprint else FlowSampling
        self.model_sampling = sampling(model_config)
        # What FreeU looks up; only now, since the network takes no such argument.
        model_config.unet_config["model_channels"] = model_config.unet_config["config"].width
        self.unread: set[patches.Owner] = set()  # who set options that the network did not read, in this run
        self.told: set[str] = set()  # what the log was told about runs
        self.finite_patches: Any = None  # ComfyUI's name of the last LoRAs that were found to hold no NaN

    @property
    def depth(self) -> int:
        return self.model_config.unet_config["config"].depth

    @property
    def sprint(self) -> bool:
        return self.model_config.unet_config["config"].guidance_embed

    def process_timestep(self, timestep: Tensor, **kwargs) -> Tensor:
        """The network takes s itself; ModelSamplingSD3 and the like multiply it."""
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options or {}  # guidance by skipped layers sets some for one prediction
        self.unread |= patches.unread(options, self.depth)
        mask = kwargs.pop("attention_mask", None)
        options, text, mask = negative.before_call(options, self.model_sampling, t, c_crossattn, mask)
        masked = {} if mask is None else {"attention_mask": mask}
        return super()._apply_model(x, t, c_concat, text, control, options, **masked, **kwargs)

    def require_own(self, text: Tensor) -> None:
        """Refuse embeddings [b, n, c] of another text encoder. Raises ValueError."""
        width = self.model_config.unet_config["config"].caption_width
        if text.shape[-1] != width:
            raise ValueError(
                f"this conditioning is {text.shape[-1]} wide, the model reads {width}; encode the prompt with the CLIP "
                "of Load SANA-Sprint or Load SANA Text Encoder"
            )

    def extra_conds(self, **kwargs) -> dict:
        out = {}
        text, mask = kwargs.get("cross_attn"), kwargs.get("attention_mask")
        if text is not None:
            self.require_own(text)
            # Repeating tokens to join prompts of different length is exact only without a mask.
            cond = comfy.conds.CONDCrossAttn if mask is None else comfy.conds.CONDRegular
            out["c_crossattn"] = cond(text)
            if mask is not None:
                out["attention_mask"] = comfy.conds.CONDRegular(negative.fit_mask(mask, text))
        if self.sprint:
            guidance = kwargs.get("guidance")  # FluxGuidance's key; FluxDisableGuidance sets None
            out["guidance"] = comfy.conds.CONDConstant(GUIDANCE if guidance is None else float(guidance))
        return out


def is_sana(patcher: comfy.model_patcher.ModelPatcher) -> bool:
    return isinstance(patcher.model, SanaModel)


def native_size_px(patcher: comfy.model_patcher.ModelPatcher) -> int:
    """Side of the square image a model was trained on. Raises ValueError for other families."""
    if not is_sana(patcher):
        raise ValueError("this MODEL is not a SANA; connect Load SANA-Sprint or Load SANA Model")
    return patcher.model.model_config.settings["size_px"]


# --- loading --------------------------------------------------------------------------------------


def load_model(
    source: checkpoint.Source | str | Path, options: LoaderOptions = DEFAULT, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """MODEL patcher of a file or folder, by its `dtype`, `form` and `time_scale`.

    The signature is ComfyUI's: it calls this again, with disable_dynamic, for a plain copy.
    Raises CheckpointError.
    """
    source = sources.opened(source, options.average)
    weights = checkpoint.load(source, layouts.TRANSFORMER, options.time_scale)
    quant = quantised.prepare(weights, options.form)
    checkpoint.check_names(weights, ignore=checkpoint.QUANT_SUFFIXES if quant else ())
    config = SanaConfig(weights)
    config.latent_format.painter.own = factors_of(source)
    load, offload = mm.get_torch_device(), mm.unet_offload_device()
    dtype = _set_dtypes(config, weights, quant, options.dtype, load)
    log.info("%s", checkpoint.summary(weights))

    model = config.get_model(weights.tensors)
    make = residence.patcher_class(weights.tensors, load, None if quant else dtype, plain=disable_dynamic)
    patcher = make(model, load_device=load, offload_device=offload)
    if not mm.is_device_cpu(offload):
        model.to(offload)
    model.load_model_weights(weights.tensors, "", assign=patcher.is_dynamic())
    if not patcher.is_dynamic() and not quant:
        model.diffusion_model.to(dtype)  # layers that ComfyUI fills late keep the file's dtype
    wrapper = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    patcher.add_wrapper_with_key(wrapper, WRAPPER_KEY, guard_run)
    patcher.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_INJECT_MODEL, bypass.KEY, bypass.mend)
    patcher.cached_patcher_init = (screen.one_sentence(load_model), (source.path, options))
    return patcher


def _set_dtypes(
    config: SanaConfig,
    weights: checkpoint.Weights,
    quant: dict | None,
    requested: torch.dtype | None,
    device: torch.device,
) -> torch.dtype:
    """Choose the dtypes of weights and computation as ComfyUI does for its own models; returns the weights'."""
    supported = list(config.supported_inference_dtypes)
    dtype = requested or mm.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights.tensors),
        supported_dtypes=supported,
        weight_dtype=None if quant else comfy.utils.weight_dtype(weights.tensors),
    )
    if quant and not requested:  # the weights that are not in 8 bits are not widened
        dtype = min(
            dtype, part.majority_dtype(weights.tensors), key=lambda kind: (kind not in supported, kind.itemsize)
        )
    if dtype == torch.float16:
        supported.insert(0, dtype)  # requested by name
    config.quant_config = quant
    config.set_inference_dtype(dtype, mm.unet_manual_cast(None if quant else dtype, device, supported))
    return dtype
