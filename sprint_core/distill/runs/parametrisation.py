"""The teacher in its own parametrisation and in TrigFlow (paper, section 3.1 and table T1): the same images."""

import functools
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ... import sampler, trigflow
from ..dataset.batch import Captions
from ..losses.transform import trigflow_network
from ..stages.base import TextConditioned
from ..stages.teacher import euler


@torch.no_grad()
def rotations(
    model: TextConditioned, z: Tensor, captions: Captions, flow_shift: float, steps: int, cfg: float
) -> Tensor:
    """teacher.euler in TrigFlow: the transformed network at the same times, as angles. Scaled latents."""
    networks = [
        trigflow_network(functools.partial(model.transformer, caption=caption, mask=mask))
        for caption, mask in (model.encode(captions), model.encode_empty(len(captions)))
    ]
    angles = [trigflow.t_from_s(s) for s in trigflow.shifted_sigmas(steps, flow_shift)]
    x_t = trigflow.SIGMA_DATA * z
    for t, t_next in itertools.pairwise(angles):
        times = x_t.new_full((len(x_t),), t)
        conditional, unconditional = (network(x_t / trigflow.SIGMA_DATA, times) for network in networks)
        F = sampler.classifier_free_guidance(conditional, unconditional, cfg)
        x_t = trigflow.rotate(x_t, F, t, t_next)
    return x_t / trigflow.SIGMA_DATA


SAMPLERS: Mapping[str, Callable[..., Tensor]] = {"flow": euler, "trigflow": rotations}
