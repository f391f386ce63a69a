"""Pickled checkpoints, read without running code: tensors, plain containers, and stand-ins for harmless objects.

Trainers save more than weights: numpy's random state, the command line's namespace, paths. torch's weights-only
unpickler refuses such names as code. Those of HARMLESS become inert stand-ins, which are never asked for anything;
every other name is refused, and the message says which.
"""

import contextlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import messages

log = messages.logger(__name__)

WEIGHTS, AVERAGE = "state_dict", "state_dict_ema"  # of the authors' trainer; their pipelines read the first
# Where trainers keep averages of their weights, and where all weights, at any depth: the first with tensors counts.
AVERAGES = (AVERAGE, "model_ema", "ema_state_dict", "ema_model", "ema", "generator_ema", "averaged_model")
NESTED = (WEIGHTS, AVERAGE, "model_state_dict", "module", "model", "ema", "weights", "generator")
DEPTH = 4
NUMPY = ("numpy.core", "numpy._core")  # its modules in version 1 and in version 2
HARMLESS = (
    *(f"{core}.multiarray.{name}" for core in NUMPY for name in ("_reconstruct", "scalar")),
    *(f"{core}.numeric._frombuffer" for core in NUMPY),
    *(f"numpy.{name}" for name in ("ndarray", "dtype")),
    *(f"numpy.dtypes.{name}DType" for name in ("UInt8", "UInt32", "UInt64", "Int32", "Int64", "Float32", "Float64")),
    *("numpy.dtypes.BoolDType", "_codecs.encode", "argparse.Namespace", "types.SimpleNamespace"),
    *(f"{module}.{system}Path" for module in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")),
    *(f"pathlib.Pure{system}Path" for system in ("Posix", "Windows")),
)


class Inert:
    """Stands for an object that nobody reads: takes any arguments, state and items, and keeps nothing."""

    def __init__(self, *arguments: Any, **keywords: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def read(path: Path, average: bool = False) -> dict[str, Tensor]:
    """The tensors of a .pth, .pt, .bin or .ckpt file, memory-mapped where it allows. Raises ValueError, OSError.

    average: of a training save, the moving average of the weights. The log says which of the two was read.
    """
    stand_ins: list[Any] = [(type("Inert", (Inert,), {}), name) for name in HARMLESS]
    try:
        with _only(stand_ins):
            # Only zip containers can be mapped; torch.load refuses the option for the older format.
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        code = f"it names {name[1]}: unpickling it would run code" if name else "it is not a PyTorch file of tensors"
        raise ValueError(f"refused, because {code}; use a safetensors version of it") from None
    except Exception as error:  # on damaged input the unpickler raises anything, IndexError included
        if "weights_only" in str(error):  # torch's advice, to switch it off, would run what the file says
            raise ValueError("PyTorch can read it only by running its code; use a safetensors version of it") from None
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        archive = zipfile.is_zipfile(path)
        advice = "take another copy of it" if archive else "download it again"  # an archive's end is there
        raise ValueError(f"truncated or damaged ({first_line}); {advice}") from None
    names: list[str] = []
    tensors = _average(data, names) if average else _weights(data, names)
    if not tensors and average:
        raise ValueError(f"holds no moving average of its weights ({AVERAGE} or the like); read its weights instead")
    if not tensors:
        raise ValueError("holds no tensors")
    _require_dense(tensors)
    if names:
        others = [name for name in (WEIGHTS, *AVERAGES) if name in data and name not in names]
        also = f"; the file also has {', '.join(others)}" if others else ""
        log.info("%s: weights of %s%s", path.name, " > ".join(names), also)
    return tensors


def _require_dense(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that nothing here reads as numbers in rows. Raises ValueError."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"its tensor {name} has no numbers (meta); take another copy of it")
        if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
            kind = "nested" if tensor.is_nested else "quantised by PyTorch" if tensor.is_quantized else "sparse"
            raise ValueError(f"its tensor {name} is {kind}; save it dense (to_dense, dequantize), or take another copy")


@contextlib.contextmanager
def _only(stand_ins: list[Any]) -> Iterator[None]:
    """Allow these names while a file is read, and none that a host has allowed.

    ComfyUI allows some of numpy's, and a real one does not go with a stand-in for another.
    """
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(stand_ins)
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _weights(data: Any, names: list[str], depth: int = DEPTH) -> dict[str, Tensor]:
    """The tensors of a mapping, or of the first mapping below it that has some; names: takes its place."""
    if not isinstance(data, Mapping):
        return {}
    for key in NESTED if depth else ():
        if tensors := _weights(data.get(key), names, depth - 1):
            names.insert(0, key)
            return tensors
    return {name: value for name, value in data.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _average(data: Any, names: list[str], depth: int = DEPTH) -> dict[str, Tensor]:
    """The same of the moving average."""
    if not isinstance(data, Mapping) or not depth:
        return {}
    for keys, find in ((AVERAGES, _weights), (NESTED, _average)):
        for key in keys:
            if tensors := find(data.get(key), names, depth - 1):
                names.insert(0, key)
                return tensors
    return {}
