"""What forward-mode differentiation needs of the network: every operation with a known derivative.

torch's fused attention has none in forward mode, so that the tangent of sCM runs the transformer
with the attention below.
"""

import torch
from einops import rearrange
from torch import Tensor

from ..layers import fp32
from .transform import Network


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """layers.sdpa in single operations; softmax in fp32."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    logits = fp32(q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits + mask
    return rearrange(logits.softmax(-1).to(v.dtype) @ v, "b h n d -> b n (h d)")


def value_and_tangent(network: Network, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """network(x, t), and its directional derivative along (dx, dt) in one forward pass.

    The value keeps its graph, for the loss; the tangent is a constant target, detached.
    """
    value, tangent = torch.func.jvp(network, (x, t), (dx, dt))
    return value, tangent.detach()
