"""What the loader nodes offer in words, and what it means."""

import torch

from ...sprint_core.models import controlnet

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TIME_SCALES = {"auto": None, "0..1": 1.0, "0..1000": 1000.0}
WIRINGS = ("auto", *controlnet.WIRINGS)
DEVICES = ("auto", "cpu")


def of(
    dtype: str = "auto", time_scale: str = "auto", wiring: str = "auto", device: str = "auto", compile: bool = False
) -> dict:
    """Options for the adapters' load functions; 'auto' and False leave one out."""
    chosen = {"dtype": DTYPES.get(dtype), "time_scale": TIME_SCALES[time_scale]}
    chosen["wiring"] = None if wiring == "auto" else wiring
    chosen["device"] = None if device == "auto" else torch.device(device)
    chosen["compile"] = compile or None
    return {name: value for name, value in chosen.items() if value is not None}
