"""What the loader nodes offer in words, and what it means."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...sprint_core.models import controlnet
from ...sprint_core.weights import quantise

AUTO = "auto"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TIME_SCALES = {AUTO: None, "0..1": 1.0, "0..1000": 1000.0}
WIRINGS = (AUTO, *controlnet.WIRINGS)
DEVICES = (AUTO, "cpu")


@dataclass(frozen=True)
class LoaderOptions:
    """A loader's settings; None leaves the choice to ComfyUI or to the file."""

    dtype: torch.dtype | None = None
    form: str | None = None  # of 8 bits, a key of quantise.FORMATS, made while loading
    device: torch.device | None = None
    time_scale: float | None = None
    wiring: str | None = None
    compile: bool = False
    average: bool = False


DEFAULT = LoaderOptions()


def parse(
    dtype: str = AUTO,
    time_scale: str = AUTO,
    wiring: str = AUTO,
    device: str = AUTO,
    compile: bool = False,
    average: bool = False,
    eight_bits: bool = False,
) -> LoaderOptions:
    """Options of a node's inputs. Raises ValueError for a word that is not offered: links carry any.

    eight_bits: whether the node offers these among its dtypes.
    """
    forms = tuple(quantise.FORMATS) if eight_bits else ()
    _require("dtype", dtype, (AUTO, *DTYPES, *forms))
    _require("time_scale", time_scale, TIME_SCALES)
    _require("wiring", wiring, WIRINGS)
    _require("device", device, DEVICES)
    return LoaderOptions(
        dtype=DTYPES.get(dtype),
        form=dtype if dtype in forms else None,
        device=None if device == AUTO else torch.device(device),
        time_scale=TIME_SCALES[time_scale],
        wiring=None if wiring == AUTO else wiring,
        compile=compile,
        average=average,
    )


def _require(name: str, value: str, offered: Iterable[str]) -> None:
    if value not in offered:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(offered)}")
