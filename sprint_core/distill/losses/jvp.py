"""What forward-mode differentiation needs of the network: every operation with a known derivative.

torch's fused attention has none in forward mode, so that the tangent of sCM runs the transformer
with the attention below.
"""

import torch
from einops import rearrange
from torch import Tensor

from ...devices import fp32
from .transform import Network


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """layers.sdpa in single operations; softmax in fp32."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    logits = fp32(q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits + mask
    return rearrange(logits.softmax(-1).to(v.dtype) @ v, "b h n d -> b n (h d)")


def tangent(network: Network, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> Tensor:
    """The directional derivative of network(x, t) along (dx, dt), a constant: nothing is kept for a backward pass."""
    with torch.no_grad():
        return torch.func.jvp(network, (x, t), (dx, dt))[1]
