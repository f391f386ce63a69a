"""Muon, an optimizer of hidden matrices (Jordan et al. 2024): momentum whose singular values are all made one.

An update moves each matrix as far in every direction it has; a few Newton-Schulz iterations make it so, without a
singular value decomposition. Its size is scaled to Adam's (Liu et al., arXiv 2502.16982), so that both share a
learning rate. Embeddings, vectors, depthwise and grouped convolutions, and the first and last layers are Adam's.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of a quintic that is steep at 0: singular values end in 0.7 to 1.2
ITERATIONS = 5
ADAMS_RMS = 0.2  # root mean square of Adam's updates, in learning rates
SMALLEST_SIDE = 8  # a matrix with fewer rows or columns has too few directions
OUTER = re.compile(  # first and last layers, and what embeds
    r"(^|\.)(patch_embed|time_embed|embed_tokens|log_variance|proj_out)\.|^(encoder\.|decoder\.)?conv_(in|out)\."
)


def orthogonalised(matrices: Tensor) -> Tensor:
    """[k, n, m] -> the same with all singular values near 1 (those far below the largest stay small)."""
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Of weights [n, m], and of convolutions [n, m, h, w] as [n, m h w]. Equal shapes are stacked: few, large kernels.

    found_inf: as fused optimizers of torch know it: a tensor that is not zero where the step is to change nothing.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for p in params:
            shapes.setdefault(tuple(p.shape), []).append(p)
        super().__init__([{"params": same} for same in shapes.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every matrix; one without a gradient counts as one of zeros. Returns what the closure does."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            self._descend(group["params"], group["lr"], group["momentum"])
        return loss

    def _descend(self, params: list[nn.Parameter], lr: float, momentum: float) -> None:
        """Of parameters of one shape; their momenta are the first one's state, stacked."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        g = torch.stack([one.flatten(1) for one in gradients])
        state = self.state[params[0]]
        if not state:
            state["momentum"] = torch.zeros_like(g)
        kept = state["momentum"].lerp(g, 1 - momentum)
        update = orthogonalised(g.lerp(kept, momentum)) * (ADAMS_RMS * max(g.shape[1:]) ** 0.5)  # Nesterov's
        if self.found_inf is not None:
            kept = torch.where(self.found_inf > 0, state["momentum"], kept)
            update = torch.where(self.found_inf > 0, 0, update)
        state["momentum"].copy_(kept)
        for p, one in zip(params, update.unbind(), strict=True):
            p.add_(one.view_as(p), alpha=-lr)


def split(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What learns in a network: its hidden matrices, and the rest."""
    hidden = {id(layer.weight) for name, layer in module.named_modules() if _is_hidden(f"{name}.", layer)}
    learnt = [p for p in module.parameters() if p.requires_grad]
    return [p for p in learnt if id(p) in hidden], [p for p in learnt if id(p) not in hidden]


def _is_hidden(name: str, layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Linear | nn.Conv2d) or OUTER.search(name):
        return False
    whole = isinstance(layer, nn.Linear) or layer.groups == 1
    return whole and min(layer.weight.flatten(1).shape) >= SMALLEST_SIDE
