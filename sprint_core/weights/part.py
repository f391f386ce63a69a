"""Model parts: the Layout that says how published files hold one, and the Weights that were read of one."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..config import from_dict
from . import keymaps
from .keymaps import Naming
from .tensorfile import CheckpointError

Config = TypeVar("Config")
Network = TypeVar("Network", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]

METADATA_KEY = "sana_sprint"  # JSON in a safetensors header
QUANT_SUFFIXES = (".comfy_quant", "_scale", ".weight_scale_2", ".scale_weight", ".scale_input")


class MissingPart(CheckpointError):
    """A file or folder without the model part that was asked for; it may well hold others."""


@dataclass(frozen=True)
class Layout(Generic[Config, Network]):
    """How the published files hold one model part: what tells it, its tensors' names, its configuration."""

    name: str  # in metadata and on command lines
    title: str  # in messages: 'a SANA transformer'
    folder: str  # of a diffusers pipeline
    markers: tuple[str, ...]  # any of these tensors means that the part is there
    prefixes: tuple[str, ...]  # in front of the names; the first is ComfyUI's
    namings: tuple[Naming, ...]  # to read: the first whose marker the file has
    diffusers_naming: Callable[[Config], Naming]  # to write what diffusers reads
    config: type[Config]
    config_from_diffusers: Callable[[Mapping[str, Any]], Config]  # of a config.json; raises ValueError
    config_to_diffusers: Callable[[Config], dict[str, Any]]  # its inverse; raises ValueError where there is none
    infer_config: Callable[[Shapes], Config]  # of native names, and those that the naming drops; raises ValueError
    network: Callable[..., Network]  # (config, ops=, dtype=, device=)
    authors_naming: Naming | None = None  # to write what the authors' code reads, where there is such a file
    authors_zeros: Callable[[Config], dict[str, tuple[int, ...]]] = lambda config: {}  # tensors that only it demands
    file_stem: str = "diffusion_pytorch_model"  # of the weight file in a diffusers folder
    extras: tuple[str, ...] = ()  # tensors beside the parameters, such as a tokenizer's bytes
    stays_mapped: bool = False  # gigabytes that are read once for a text, out of their file

    @property
    def noun(self) -> str:
        """The title without its article."""
        return self.title.split(" ", 1)[1]

    def to_diffusers(self, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        """Native tensors of a part of this configuration under diffusers' names."""
        return keymaps.from_native(tensors, self.diffusers_naming(config))


@dataclass
class Weights(Generic[Config, Network]):
    """A model part, ready to build: `tensors` under native names, `settings` beyond the configuration.

    settings: flow_shift and size_px of a transformer; text (instruction, max_tokens) of an encoder.
    extras: tensors that are no parameters (a tokenizer in the same file). assumed: what had to be guessed, in words.
    """

    layout: Layout[Config, Network]
    config: Config
    tensors: dict[str, Tensor]
    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    assumed: str = ""

    @property
    def is_quantised(self) -> bool:
        return any(name.endswith(QUANT_SUFFIXES) for name in self.tensors)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read(
    layout: Layout[Config, Network],
    path: Path,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, Any] | None,
    config_json: Mapping[str, Any] | None,
) -> Weights[Config, Network]:
    """A part from its tensors, whose prefix is off. Raises CheckpointError where its configuration cannot be told.

    stored: our own description of it, of the file's metadata; config_json: that of a diffusers folder. Without both
    the shapes have to tell.
    """
    extras = {name: tensors[name] for name in layout.extras if name in tensors}
    published = {name: tensor for name, tensor in tensors.items() if name not in extras}
    naming = next(naming for naming in layout.namings if not naming.marker or naming.marker in published)
    native = keymaps.to_native(published, naming)
    try:
        if stored is not None and (config_json is None or "config" in stored):
            config = from_dict(layout.config, stored["config"])
        elif config_json is not None:
            config = layout.config_from_diffusers(config_json)
        else:
            dropped = {name: tensor for name, tensor in published.items() if naming.drops(name)}
            config = layout.infer_config(shapes_of(native | dropped))
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: cannot tell the configuration of {layout.title}: {error}") from None
    return Weights(layout, config, native, path, (stored or {}).get("settings", {}), extras)


# --- descriptions, which `checkpoint.load` reads back ----------------------------------------------


def describe(weights: Weights) -> dict[str, dict[str, Any]]:
    """What a saved file says of a part: {name: {config, settings}}."""
    return {weights.layout.name: {"config": asdict(weights.config), "settings": weights.settings}}


def header(description: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file that says what it holds, as `describe` has it."""
    return {METADATA_KEY: json.dumps(description)}


def json_bytes(data: Any) -> Tensor:
    """JSON as a uint8 tensor, for files whose header belongs to a host."""
    return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)


def majority_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that most elements of a file have, leaving out layers that are quantised one by one."""
    quantised = {name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")}
    counts: dict[torch.dtype, int] = {}
    for name, tensor in tensors.items():
        if name.endswith(QUANT_SUFFIXES) or name.removesuffix(".weight") in quantised:
            continue
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=counts.__getitem__)
