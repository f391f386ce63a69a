"""Multistep consistency sampling in flow variables, for the pipeline and for ComfyUI alike; Euler steps for teachers.

The sampler knows no network: `denoise(x_s, s) -> x0` is all it calls (ComfyUI's samplers speak the
same protocol). Noise always comes from the CPU generator, one per image, so that a seed means the
same image on every device and in every batch: image i starts from seed i and re-noises from seed
i + 1.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .devices import to_device
from .trigflow import flow_add_noise

SEEDS = 2**64  # seeds that a torch generator accepts; others wrap around


def seeded_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Unit noise [*shape] in fp32 on the CPU, the same for a seed on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed % SEEDS))


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Unit noise [b, *shape] in fp32 on the CPU: one image's [*shape] per seed."""
    return torch.stack([seeded_noise(seed, shape) for seed in seeds])


class StepNoise:
    """Fresh unit noise for each step: each call returns the next [b, *shape] in fp32 on `device`."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"):
        self.shape, self.device = tuple(shape), device
        self.generators = [torch.Generator("cpu").manual_seed((seed + 1) % SEEDS) for seed in seeds]

    def __call__(self) -> Tensor:
        return to_device(torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]), self.device)


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x_s: Tensor,
    sigmas: Tensor,
    noise: Callable[[], Tensor],
    add_noise: Callable[[Tensor, Tensor, Tensor], Tensor] = flow_add_noise,
    on_step: Callable[[int, Tensor, Tensor], object] | None = None,
) -> Tensor:
    """Alternate prediction and re-noising along `sigmas` (trigflow.py, eq. 4): x <- (1 - s') x0 + s' z.

    x_s: [b, c, h, w] noised to sigmas[0]. sigmas: fp32 [n + 1], descending, on the CPU or x_s's device; where
    the last is 0 the result is the clean x0, else it is noised to it. add_noise(x0, z, s) re-noises.
    on_step(i, x_s, x0) is called after each prediction, and may raise to stop.
    """
    last = [s == 0.0 for s in sigmas.tolist()]  # nothing from here on waits for the device
    for i in range(len(sigmas) - 1):
        x0 = denoise(x_s, sigmas[i])
        if on_step is not None:
            on_step(i, x_s, x0)
        x_s = x0 if last[i + 1] else add_noise(x0, noise(), sigmas[i + 1])
    return x_s


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, cfg: float) -> Tensor:
    """Two predictions of one shape, extrapolated (arXiv 2207.12598): unconditional + cfg (conditional - unconditional).

    cfg 1 is the conditional prediction, cfg 0 the unconditional one.
    """
    return torch.lerp(unconditional, conditional, cfg)


def euler(denoise: Callable[[Tensor, Tensor], Tensor], x_s: Tensor, sigmas: Tensor) -> Tensor:
    """A multi-step teacher's samples x_s [b, c, h, w] at sigmas[-1]: Euler steps of dx/ds = (x_s - x0) / s.

    x_s: noised to sigmas[0]; sigmas: fp32 [n + 1], descending, all but the last above 0.
    """
    for s, s_next in itertools.pairwise(sigmas):
        x_s = x_s + (s_next - s) / s * (x_s - denoise(x_s, s))
    return x_s
