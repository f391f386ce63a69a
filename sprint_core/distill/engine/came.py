"""CAME, the optimizer of the published SANA-Sprint runs (Luo et al., arXiv 2307.02047; names are the paper's).

Adam's second moments of a matrix [n, m] are kept as row and column means (Adafactor), and the step is divided by
how far the latest update strays from the running one, factored likewise: the less it strays, the more it is trusted.

Which tensors count as matrices follows the optimizer that the published configuration names (`CAMEWrapper` of
NVlabs/Sana as released with SANA-Sprint): weights [n, m] and 1x1 convolutions [n, m, 1, 1]. All others, 3x3
convolutions among them, keep a full second moment and have no confidence. PyPI's came-pytorch, which SANA's first
release used, is the same up to 2 dimensions, and beyond them factors the last two, here a convolution's kernel.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class CAME(torch.optim.Optimizer):
    """The defaults, but for the learning rate, are the published ones; the state is fp32 for every parameter.

    Nothing corrects the averages' bias to zero: at first a matrix moves by 11 learning rates, a vector by 0.1.
    Raises ValueError for rates or betas out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),  # of the update, its scale and its instability
        eps: tuple[float, float] = (1e-30, 1e-16),  # added to squared gradients, and to squared deviations
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,  # decoupled, times the learning rate
    ):
        if lr < 0 or len(betas) != 3 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr {lr}, betas {betas}: CAME takes lr >= 0 and three betas in [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "clip_threshold": clip_threshold}
        super().__init__(params, defaults | {"weight_decay": weight_decay})

    found_inf: Tensor | None = None  # not zero: the step changes nothing, as torch's fused optimizers know it

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what the closure does."""
        with torch.enable_grad():
            loss = closure() if closure else None
        if self.found_inf is not None and self.found_inf:
            return loss
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._descend(p, p.grad.float(), group)
        return loss

    def _descend(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        (beta1, beta2, beta3), (eps1, eps2) = group["betas"], group["eps"]
        state = self.state[p]
        if g.ndim == 4 and g.shape[2:] == (1, 1):
            g = g.flatten(1)
        matrix = g.ndim == 2
        if not state:
            like = {"r": g[:, :1], "c": g[:1], "R": g[:, :1], "C": g[:1]} if matrix else {"v": g}
            state |= {name: torch.zeros_like(part) for name, part in ({"m": g} | like).items()}

        squares = g.square() + eps1
        if matrix:
            u = g * _inverse_root(state["r"], state["c"], squares, beta2)  # u = g / sqrt(v), v = r c / mean(r)
        else:
            u = g * state["v"].lerp_(squares, 1 - beta2).rsqrt()
        u /= (u.square().mean().sqrt() / group["clip_threshold"]).clamp(min=1)  # u^ = u / max(1, RMS(u) / d)
        update = state["m"].lerp_(u, 1 - beta1)  # m = beta1 m + (1 - beta1) u^
        if matrix:
            deviation = (u - update).square() + eps2  # U = (u^ - m)^2
            update = update * _inverse_root(state["R"], state["C"], deviation, beta3)  # m / sqrt(S), S = R C / mean(R)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * update.view(p.shape))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class, but that rounds states to their parameter's type; here they stay as they were saved."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(parameters, numbers, strict=True):
            if saved := state_dict["state"].get(i):
                self.state[p] = {name: value.to(p.device, copy=True) for name, value in saved.items()}


def _inverse_root(rows: Tensor, columns: Tensor, values: Tensor, beta: float) -> Tensor:
    """Average rows [n, 1] and columns [1, m] over the values [n, m], and return 1 / sqrt(rows columns / mean(rows))."""
    rows.lerp_(values.mean(1, keepdim=True), 1 - beta)
    columns.lerp_(values.mean(0, keepdim=True), 1 - beta)
    return (rows / rows.mean()).rsqrt() * columns.rsqrt()
