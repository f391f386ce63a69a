"""Guards each sampling run of a SANA: what would come out as garbage is refused before it starts.

Everything that a graph may connect from another model family arrives here: latents, SIGMAS, samplings, ControlNets.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import comfy.model_sampling
import comfy.patcher_extension
import torch
from torch import Tensor

from ...sprint_core import messages
from ...sprint_core.latent import LATENT_CHANNELS
from ...sprint_core.weights.finite import is_finite
from . import bypass, finite, patches, screen

log = messages.logger(__name__)

CFG_NAMES = ("cfg", "cfg1", "cfg2")  # where CFGGuider and DualCFGGuider keep their scales
READ = {  # tensors in a CONDITIONING that ComfyUI or a SANA reads, or that every text encoder adds
    "attention_mask",
    "cross_attn",
    "mask",
    "model_conds",
    "pooled_output",
}
UNREAD = {  # what else other families' networks read; all tensors beyond these two sets are unread, too
    "clip_vision_output",
    "clip_vision_outputs",
    "frame_rate",
    "lyrics_strength",
    "reference_latents",
    "reference_latents_method",
    "seconds_start",
    "seconds_total",
    "unclip_conditioning",
}
INPAINTING = {"concat_latent_image", "concat_mask"}  # of InpaintModelConditioning
ROUNDING = 1e-4  # above 1: published angles write pi/2 as 1.5708, which makes sigma 1.0000037
TAKE_OURS = "take TrigFlow Schedule, or Basic Scheduler for multi-step models"


@screen.one_sentence
def guard_run(
    executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs
) -> Tensor:
    """Wraps one sampling run (OUTER_SAMPLE): checks its inputs, neutralises cfg, finds NaN. Raises ValueError."""
    guider = executor.class_obj
    model = guider.model_patcher.model
    require_latent(latent_image)
    if not is_finite(latent_image):
        raise ValueError("the latent holds NaN or infinity; check the image that it was encoded from")
    if noise.shape != latent_image.shape:
        raise ValueError(
            f"the noise is {list(noise.shape)}, the latent {list(latent_image.shape)}; their sizes must agree"
        )
    _require_flow(guider.model_patcher)
    _require_finite_patches(guider.model_patcher)
    sigmas = _checked(sigmas, model.sprint)
    _require_own_controls(guider)
    _require_images(guider, len(latent_image))
    bypass.mend(guider.model_patcher)
    notes = _unread(guider, masked=(args[0] if args else kwargs.get("denoise_mask")) is not None)
    with patches.followed(guider, latent_image, notes), _without_cfg(guider, notes):
        if model.sprint:
            _keep_cfg_1(guider.model_options, notes)
        samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    _tell(model, notes)
    if not is_finite(samples):
        if fault := finite.sampling_fault(guider):
            raise ValueError(fault)
        dtype = model.get_dtype_inference()
        advice = "" if dtype == torch.float32 else " load it in fp32 (the loader's dtype);"
        raise ValueError(
            f"the sampler returned NaN or infinity with the model in {dtype}, though its weights hold none;{advice} "
            "take out LoRAs and patches one by one"
        )
    return samples


def require_latent(latent: Tensor) -> None:
    """Refuse latents that are no SANA's: not [b, 32, h, w], or empty. Raises ValueError."""
    if latent.is_nested:
        raise ValueError("this latent is nested, of video and sound; start from Empty SANA Latent")
    if latent.ndim == 5:
        raise ValueError(
            f"this latent is a video's, of shape {list(latent.shape)}; SANA's have {LATENT_CHANNELS} channels and no "
            "frames; start from Empty SANA Latent"
        )
    if latent.ndim != 4 or latent.shape[1] != LATENT_CHANNELS or 0 in latent.shape:
        raise ValueError(
            f"this latent has {latent.shape[1] if latent.ndim > 1 else 0} channels and shape {list(latent.shape)}; "
            f"SANA's have {LATENT_CHANNELS} channels at 1/32 of the image's size; encode the image with SANA's own "
            "VAE (DC-AE), or start from Empty SANA Latent"
        )


# --- sigmas -----------------------------------------------------------------------------------------


def _require_flow(patcher: Any) -> None:
    """Refuse a MODEL whose sampling is another family's. Raises ValueError."""
    sampling = patcher.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST):
        name = next(c.__name__ for c in type(sampling).__mro__ if c.__module__ == comfy.model_sampling.__name__)
        raise ValueError(
            f"this MODEL samples with {name}, which is not SANA's flow; remove the node that sets it. Steps come from "
            "TrigFlow Schedule, or from Basic Scheduler for multi-step models"
        )


def _require_finite_patches(patcher: Any) -> None:
    """Refuse LoRAs that hold NaN; looked at once for as long as a model has the same ones. Raises ValueError."""
    if patcher.patches and patcher.model.finite_patches != patcher.patches_uuid:
        if fault := finite.lora_fault(patcher):
            raise ValueError(fault)
        patcher.model.finite_patches = patcher.patches_uuid


def _checked(sigmas: Tensor, sprint: bool) -> Tensor:
    """SIGMAS that a flow model can follow, at most 1; multi-step models may go back to noise. Raises ValueError."""
    if not sigmas.is_floating_point():
        return sigmas  # no times: TrainLoraNode hands over the numbers of its images
    shown = ", ".join(f"{s:.4g}" for s in sigmas[:10].tolist())
    if not is_finite(sigmas):
        raise ValueError(f"these SIGMAS hold NaN or infinity ({shown}); check the node that made them")
    if sigmas.max() > 1.0 + ROUNDING or sigmas.min() < 0.0:
        raise ValueError(f"these SIGMAS ({shown}) are another model's: SANA's lie between 1 and 0; {TAKE_OURS}")
    rising = sigmas.diff() > 0.0
    if rising.any() and (sprint or not rising.all()):
        raise ValueError(f"these SIGMAS rise ({shown}), and SANA's fall from noise to image; {TAKE_OURS}")
    if sigmas[-1] >= 1.0:
        raise ValueError("these SIGMAS end at 1, pure noise, which holds no image; check Split Sigmas and Flip Sigmas")
    if len(sigmas) == 1 and sigmas[0] > 0.0:
        raise ValueError(
            f"these SIGMAS hold one value ({shown}), so that nothing would be denoised; check Split Sigmas"
        )
    return sigmas.clamp(max=1.0)


# --- other objects ----------------------------------------------------------------------------------


def _require_own_controls(guider: Any) -> None:
    """Refuse ControlNets of other families, alone or in a chain. Raises ValueError."""
    for conds in getattr(guider, "conds", {}).values():
        for cond in conds:
            control = cond.get("control")
            while control is not None:
                if not getattr(control, "steers_sana", False):
                    raise ValueError(
                        "a ControlNet of another family is applied to this prompt; apply one of Load SANA ControlNet "
                        "instead"
                    )
                control = control.previous_controlnet


def _require_images(guider: Any, images: int) -> None:
    """Refuse a batch of prompts of which some would have no image. Raises ValueError."""
    for conds in getattr(guider, "conds", {}).values():
        for cond in conds:
            text = cond.get("cross_attn")
            if text is not None and len(text) > images:
                have = "1 image" if images == 1 else f"{images} images"
                raise ValueError(
                    f"the conditioning holds {len(text)} prompts and the latent {have}; set batch_size of Empty SANA "
                    f"Latent to {len(text)}, or write fewer lines"
                )


def _unread(guider: Any, masked: bool) -> list[str]:
    """Notes of what the prompts carry that a SANA does not read. masked: whether the latent has a noise mask."""
    conds = [cond for prompt in getattr(guider, "conds", {}).values() for cond in prompt]
    names = {
        key
        for cond in conds
        for key, value in cond.items()
        if key in UNREAD or (key not in READ and _has_tensor(value))
    }
    inpainting, others = sorted(names & INPAINTING), sorted(names - INPAINTING)
    notes = [f"of this prompt, SANA does not read {', '.join(others)}; it paints without"] if others else []
    if inpainting:
        effect = (
            "the latent's noise mask is used, and only what it covers is painted"
            if masked
            else "and the latent has no noise mask, so that all is painted; add Set Latent Noise Mask"
        )
        notes.append(f"of this prompt, SANA does not read {', '.join(inpainting)}, for inpainting models; {effect}")
    return notes


def _has_tensor(value: Any) -> bool:
    """Whether it is a tensor, or a list or mapping of some."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_has_tensor, value)))


# --- cfg --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_cfg(guider: Any, notes: list[str]) -> Iterator[None]:
    """A Sprint's guider has scales of 1 inside, with a note where they were others."""
    sprint = guider.model_patcher.model.sprint
    scales = {name: getattr(guider, name) for name in CFG_NAMES if sprint and hasattr(guider, name)}
    ignored = [cfg for cfg in scales.values() if not math.isclose(cfg, 1.0)]
    if ignored:
        note = (
            f"SANA-Sprint has its guidance built in: cfg {ignored[0]:g} is treated as 1 and the negative prompt is "
            "unused. Set cfg to 1, steer with FluxGuidance or the guidance input, and avoid things with SANA-Sprint "
            "Negative (NAG)."
        )
        notes += [note] if note not in notes else []
    try:
        for name in scales:
            setattr(guider, name, 1.0)
        yield
    finally:
        for name, cfg in scales.items():
            setattr(guider, name, cfg)


def _keep_cfg_1(options: dict, notes: list[str]) -> None:
    """Behind every other wrapper of a step: CFGOverride sets the guider's scale there."""

    def wrapper(executor: Any, *args, **kwargs) -> Tensor:
        with _without_cfg(executor.class_obj, notes):
            return executor(*args, **kwargs)

    wrappers = options["transformer_options"].setdefault("wrappers", {})
    wrappers.setdefault(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, {})["sana_sprint"] = [wrapper]


def _tell(model: Any, notes: list[str]) -> None:
    """On the node at each run, and once per loaded model in the log."""
    if notes:
        screen.hold("\n".join(notes))
    for note in notes:
        if note not in model.told:
            log.warning("%s", note)
    model.told.update(notes)
