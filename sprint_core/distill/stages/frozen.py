"""The frozen network of a distillation in half the memory: the teacher, whose blocks LADD's critic reads too."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from ...devices import fp32
from ...models.transformer import SanaTransformer


class HalfTransformer(SanaTransformer):
    """A SanaTransformer with weights in bf16. Its operations are those of autocast, whether or not that is on.

    So times are embedded, and layers normed, in fp32, and what comes out is fp32. What goes into the first layers is
    rounded as autocast would do it. (A meta tensor has no autocast: there all but the times is bf16.)
    """

    def __init__(self, twin: SanaTransformer):
        like = next(twin.parameters())
        super().__init__(twin.config, dtype=torch.bfloat16, device=like.device)
        self.load_state_dict(twin.state_dict())

    def forward(self, x_s: Tensor, s: Tensor, caption: Tensor, *args: Any, **options: Any) -> Tensor:
        half = (x_s.to(torch.bfloat16), s, caption.to(torch.bfloat16))
        kind = x_s.device.type
        rounding = contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, torch.bfloat16)
        with rounding:
            return fp32(super().forward(*half, *args, **options))


FROZEN = {"fp32": lambda transformer: transformer, "bf16": HalfTransformer}
