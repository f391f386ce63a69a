"""SANA-Sprint's sampling loop inside ComfyUI's samplers, guiders and previews."""

import math
from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import node_helpers
from torch import Tensor
from tqdm import tqdm

from ...sprint_core import sampler as core
from ...sprint_core.devices import to_device
from ...sprint_core.latent import DOWNSCALE
from ...sprint_core.weights import presets
from . import guard
from . import model as model_adapter


def sprint_sampler(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
    seeds: list[int] | None = None,
    step_noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """The core's loop as a sampler function for KSAMPLER. `model(x, sigma)` returns x0.

    seeds: one per image; without them image i has the run's seed + i. step_noise: what each further step adds, drawn
    already, in place of the seeds'. disable: show no progress bar.
    """
    extra_args = extra_args or {}
    ones = x.new_ones(len(x))
    sampling = model.inner_model.inner_model.model_sampling
    first = extra_args.get("seed") or 0
    drawn = step_noise or core.StepNoise(seeds or [first + i for i in range(len(x))], x.shape[1:])

    def denoise(x_s: Tensor, s: Tensor) -> Tensor:
        return model(x_s, s * ones, **extra_args)

    def add_noise(x0: Tensor, z: Tensor, s: Tensor) -> Tensor:
        return sampling.noise_scaling(s, z, x0)

    def noise() -> Tensor:
        return to_device(drawn(), x.device)

    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

        def on_step(i: int, x_s: Tensor, x0: Tensor) -> None:
            bar.update()
            if callback is not None:
                callback({"x": x_s, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})

        return core.sample(denoise, x, sigmas, noise, add_noise, on_step)


def sampler(seeds: list[int] | None = None, step_noise: Callable[[], Tensor] | None = None) -> comfy.samplers.KSAMPLER:
    """A SAMPLER object. Its step noise comes from the CPU, so a seed means the same on every device."""
    return comfy.samplers.KSAMPLER(sprint_sampler, {"seeds": seeds, "step_noise": step_noise})


def _require_cells(samples: Tensor, ratio: float | None) -> None:
    """Refuse what ComfyUI's fitting of an empty latent stumbles over: nested, without 4 axes, or too small.

    ratio: pixels to a cell of the latent, where it is an empty one for any model. Raises ValueError.
    """
    if samples.is_nested or samples.ndim < 4:
        guard.require_latent(samples)
    sides = [samples.shape[-1], samples.shape[-2]]
    if ratio is not None and 0 in (round(side * ratio / DOWNSCALE) for side in sides):
        pixels = " x ".join(f"{side * ratio:g}" for side in sides)
        raise ValueError(f"this empty latent is for {pixels} pixels; SANA's smallest cell is {DOWNSCALE}: enlarge it")


def require_sprint(model: comfy.model_patcher.ModelPatcher) -> None:
    """Refuse MODELs of other families, and multi-step ones. Raises ValueError."""
    if not model_adapter.is_sana(model) or not model.model.sprint:
        raise ValueError(
            "this MODEL is not a SANA-Sprint; sample multi-step models such as SANA 1.0 and 1.5, or Sprint's "
            "teachers, with KSampler"
        )


def sample_quietly(
    model: comfy.model_patcher.ModelPatcher,
    positive: list,
    start: Tensor,
    sigmas: Tensor,
    seed: int,
    noise: tuple[Tensor, Callable[[], Tensor]],
) -> Tensor:
    """Latent [b, 32, h/32, w/32] as of `sample`, without bars and previews.

    positive: with its guidance; start: all zero for text-to-image; noise: to start from, and that of each further step.
    """
    return comfy.sample.sample_custom(
        model,
        noise[0],
        1.0,
        sampler(step_noise=noise[1]),
        sigmas,
        positive,
        positive,  # unused at cfg 1
        start,
        disable_pbar=True,
        seed=seed,
    )


def sample(
    model: comfy.model_patcher.ModelPatcher, positive: list, latent: dict, sigmas: Tensor, seed: int, guidance: float
) -> dict:
    """Sample a LATENT: image i of a batch starts from seed + i, as if it were alone. Raises ValueError."""
    require_sprint(model)
    if not 0.0 < guidance < math.inf:
        raise ValueError(f"guidance is {guidance:g}; it must be above 0 ({presets.GUIDANCE:g} is the model's default)")
    ratio = latent.get("downscale_ratio_spacial")
    _require_cells(latent["samples"], ratio)
    start = comfy.sample.fix_empty_latent_channels(model, latent["samples"], ratio)
    guard.require_latent(start)
    seeds = [seed + int(i) for i in latent.get("batch_index") or range(len(start))]
    noise = core.initial_noise(seeds, start.shape[1:])
    positive = node_helpers.conditioning_set_values(positive, {"guidance": guidance})
    samples = comfy.sample.sample_custom(
        model,
        noise,
        1.0,
        sampler(seeds),
        sigmas,
        positive,
        positive,  # unused at cfg 1
        start,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    tags = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    return {key: value for key, value in latent.items() if key not in tags} | {"samples": samples}
