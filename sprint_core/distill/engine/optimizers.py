"""The optimizers of a phase's module, as its schedule says.

The embedders of time and guidance may learn at a rate of their own, those of a fake network, too. They read 256
features of one number, of which most cosines are nearly 1 whatever it is. Adam's steps are as long for every weight,
so that those of such features add up to one bias that moves a hundred times as fast as others, for all samples at
once. In a student of the bundled size, in the two updates in which sCM's errors began to burst, these two moved the
output further than any block did. CAME, the published optimizer, takes shorter steps where a tensor's gradients
suddenly grow; that alone did not suffice (docs/ablations.md).
"""

import functools
import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from ..recipes import Schedule
from .came import CAME
from .muon import Muon, split

EMBEDDERS = re.compile(r"(^|\.)time_embed\.(timestep|guidance)_embedder\.")
RATE = "rate"  # of a group of parameters, over the schedule's


def fresh(phase: str, module: nn.Module, schedule: Schedule) -> dict[str, Any]:
    """The optimizers of a phase's module: one of its name, and with Muon another, of the rest, as `phase/rest`."""
    lr, betas = schedule.lr, cast(Any, schedule.betas_of(phase))
    slow = {id(p) for name, p in module.named_parameters() if EMBEDDERS.search(name)}
    adamw = functools.partial(torch.optim.AdamW, lr=lr, betas=betas, weight_decay=0.0, fused=True)
    if schedule.optimizer != "muon":
        kind = {"adamw": adamw, "came": functools.partial(CAME, lr=lr, betas=betas)}[schedule.optimizer]
        return {phase: kind(_groups(module.parameters(), slow, schedule.embedder_rate))}
    hidden, rest = split(module)
    made = {}
    if hidden:
        made[phase] = Muon(hidden, lr=lr)
    if rest:
        made[f"{phase}/rest"] = adamw(_groups(rest, slow, schedule.embedder_rate))
    return made


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step, which each group of parameters takes times its own."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE, 1.0)


def _groups(parameters: Iterable[nn.Parameter], slow: set[int], rate: float) -> list[dict[str, Any]]:
    """One group of all, or two where embedders learn at a rate of their own."""
    everything = [*parameters]
    if rate == 1:
        return [{"params": everything}]
    groups = [
        {"params": [p for p in everything if id(p) not in slow]},
        {"params": [p for p in everything if id(p) in slow], RATE: rate},
    ]
    return [group for group in groups if group["params"]]
