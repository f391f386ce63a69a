"""The training-free transform (paper, section 3.1): a flow network becomes a TrigFlow network.

A flow teacher predicts the velocity v(x_s, s). TrigFlow asks for F(x_t / sigma_data, t). Equations
(1) and (2) of trigflow.py turn one into the other, exactly and without training.
"""

from collections.abc import Callable

from torch import Tensor

from ... import trigflow

Network = Callable[[Tensor, Tensor], Tensor]  # (x [b, c, h, w], time [b]) -> [b, c, h, w]


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """[b] -> [b, 1, 1, ...], to multiply samples of `like`'s rank."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def trigflow_network(velocity: Network) -> Network:
    """F(x, t) of a flow network v(x_s, s), with x = x_t / sigma_data and an angle t per sample."""

    def F(x: Tensor, t: Tensor) -> Tensor:
        angle = per_sample(t, x)
        x_s = trigflow.flow_input(x, angle, sigma_data=1.0)
        v = velocity(x_s, trigflow.s_from_t(t))
        return trigflow.F_from_velocity(v, x, angle, sigma_data=1.0)

    return F
