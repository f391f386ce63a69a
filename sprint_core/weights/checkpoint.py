"""From any published file or folder to (configuration, native tensors), and back to one native file.

What a file holds is read off tensor names and shapes, never off its name. The configuration comes
from our own metadata, else from the config.json beside the weights, else from the shapes. Loading
is strict: a tensor too few or too many is an error that lists it.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import disk, messages
from ..latent import DOWNSCALE
from ..models import controlnet
from ..models.layers import Unset
from ..models.mapped import Mapped
from ..models.prepacked import Prepacked, prepack
from . import foreign_files, part, presets, tensorfile
from .kinds import ADVICE, foreign_family, parts_in, prefix_of
from .layouts import CONTROLNET, PARTS, TINY_AUTOENCODER, TRANSFORMER
from .layouts.tiny_autoencoder import OTHER_HALF, halves_in, partner
from .part import METADATA_KEY, QUANT_SUFFIXES, Config, Layout, MissingPart, Network, Weights, json_bytes, shapes_of
from .tensorfile import CheckpointError, TensorFile

log = messages.logger(__name__)

TENSOR_KEY = "sana_sprint_config"  # our metadata's JSON as bytes, for files that a host writes
QUANT_KEY = "_quantization_metadata"  # ComfyUI's description of quantised layers, JSON in a safetensors header
LISTED = 10  # names in an error message
ANY_SIDE = 32  # sample_size of a config.json that says nothing of the size: diffusers' default, and what convert writes
# What compiling, sharding and checkpointing of activations put into names, before any part of them.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Source:
    """A file or folder, of which several parts may be asked for: each file in it is opened once.

    average: of a training save, the moving average of the weights (`state_dict_ema`). opener: see tensorfile.read.
    """

    def __init__(self, path: str | os.PathLike, average: bool = False, opener: tensorfile.Opener | None = None):
        self.path = Path(path)
        self.average = average
        self.opener = opener
        self._files: dict[Path, TensorFile] = {}

    def read(self, path: Path) -> TensorFile:
        """Raises CheckpointError."""
        if path not in self._files:
            file = tensorfile.read(path, self.average, self.opener)
            file.tensors = tensorfile.united(path, [{WRAPPERS.sub("", k): v} for k, v in file.tensors.items()])
            self._files[path] = file
        return self._files[path]

    def holds(self, layout: Layout[Any, Any]) -> bool:
        """Whether that part is there. Raises CheckpointError where a file cannot be read."""
        place = _place(self.path, layout)
        return place is not None and layout.name in parts_in(self.read(place).tensors)


def opened(
    source: Source | str | os.PathLike, average: bool = False, opener: tensorfile.Opener | None = None
) -> Source:
    return source if isinstance(source, Source) else Source(source, average, opener)


# --- reading --------------------------------------------------------------------------------------


def load(
    source: Source | str | os.PathLike,
    layout: Layout[Config, Network],
    time_scale: float | None = None,
    wiring: str | None = None,
) -> Weights[Config, Network]:
    """One model part of a file or folder.

    source: a .safetensors or .pth file (a part, or a checkpoint with several), a diffusers pipeline
    folder, or one of its component folders. time_scale (transformer, controlnet) and wiring
    (controlnet) override what the file says. Tensors stay memory-mapped. Raises CheckpointError.
    """
    source = opened(source)
    path, pipeline = _locate(source.path, layout)
    file = source.read(path)
    if tool := foreign_files.quantised_by(file.tensors):
        raise CheckpointError(
            f"{path}: its weights are quantised by {tool}, which this pack does not read; {foreign_files.FULL}, or one "
            "that python -m sprint_core.convert has quantised"
        )
    prefix = prefix_of(file.tensors, layout)
    if prefix is None or layout.name not in parts_in(file.tensors):
        raise _refusal(path, layout, list(file.tensors))
    tensors = file.tensors | _quantised_layers(path, file.metadata)
    tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if kind := foreign_files.whole_numbers(tensors):
        raise CheckpointError(
            f"{path}: its weights are whole numbers ({kind}) without the scales that they need; {foreign_files.FULL}, "
            "or one that python -m sprint_core.convert has quantised"
        )
    if kind := foreign_files.foreign_type(tensors):
        raise CheckpointError(f"{path}: its weights are {kind}, which no SANA's are; {foreign_files.FULL}")
    stored = _stored(path, file.metadata, tensors, layout)
    config_json = _config_json(path)
    weights = part.read(layout, path, tensors, stored, config_json)
    _check_settings(weights)
    if layout is TRANSFORMER:
        _complete_transformer(weights, stored or config_json, pipeline, time_scale)
        _check_settings(weights)
    if layout is CONTROLNET:
        _complete_controlnet(weights, time_scale, wiring)
    return weights


def load_tiny(source: Source | str | os.PathLike) -> Weights | None:
    """A TAESANA from one of its two files, with the other if it lies beside it, or from one file with both.

    None if the file is something else. Raises CheckpointError if it is damaged or incomplete.
    """
    source = opened(source)
    path = source.path
    halves = {} if path.is_dir() else halves_in(source.read(path).tensors)
    if not halves:
        return None
    other = partner(path)
    if len(halves) == 1 and other is not None:
        missing = OTHER_HALF[next(iter(halves))]
        others = halves_in(source.read(other).tensors)
        if missing not in others:
            raise CheckpointError(f"{other}: not a TAESANA {missing}, which {path.name} goes with; take the right one")
        halves[missing] = others[missing]
    tensors = {f"{half}.{name}": tensor for half, layers in halves.items() for name, tensor in layers.items()}
    weights = part.read(TINY_AUTOENCODER, path, tensors, None, None)
    check_names(weights)
    return weights


def _refusal(path: Path, layout: Layout[Any, Any], names: list[str]) -> CheckpointError:
    titles = [PARTS[name].title for name in parts_in(names)]
    family = foreign_family(names)
    content = family or " and ".join(titles) or "something this pack does not know"
    first = "" if family or titles else f" (its first tensors: {', '.join(sorted(names)[:3])})"
    advice = f"{path}: this is {content}, not {layout.title}{first}; choose another file"
    return MissingPart(f"{advice}, {ADVICE[family]}" if family in ADVICE else advice)


def _check_settings(weights: Weights) -> None:
    """Refuse settings that would only fail later, or silently."""
    settings = weights.settings
    good = isinstance(settings, dict)
    if good:
        shift, size_px = settings.get("flow_shift", 1.0), settings.get("size_px", 1024)
        good = isinstance(shift, int | float) and 0 < shift <= 100 and isinstance(size_px, int) and 0 < size_px <= 65536
    if not good:
        raise CheckpointError(f"{weights.path}: its settings cannot be used: {settings!r}")


def _config_json(path: Path) -> dict | None:
    """The config.json of a diffusers or Hugging Face folder; other libraries' say nothing that is needed."""
    file = path / "config.json"
    data = tensorfile.read_json(file) if path.is_dir() and file.is_file() else {}
    return data if "_class_name" in data or "model_type" in data else None


def _place(path: Path, layout: Layout[Any, Any]) -> Path | None:
    """File or folder of a part; None in a folder that holds other parts only."""
    if not path.is_dir():
        return path
    if (path / layout.folder).is_dir() and layout.folder:
        return path / layout.folder
    return None if (path / "model_index.json").is_file() or _parts_of_folder(path) else path


def _parts_of_folder(path: Path) -> list[str]:
    return [layout.folder for layout in PARTS.values() if (path / layout.folder).is_dir()]


def _locate(path: Path, layout: Layout[Any, Any]) -> tuple[Path, Path | None]:
    """File or folder of a part, and the pipeline folder around it, if there is one. Raises MissingPart."""
    place = _place(path, layout)
    if (path / "model_index.json").is_file():
        _require_sana(path, layout, there=place is not None)
    if place is None and (path / "model_index.json").is_file():
        raise MissingPart(f"{path}: this pipeline folder has no '{layout.folder}' folder; download it whole")
    if place is None:
        content = " and ".join(_parts_of_folder(path))
        raise MissingPart(f"{path}: it holds {content}, not {layout.title}; choose another folder")
    if place != path:
        return place, path
    return path, path.parent if path.is_dir() and (path.parent / "model_index.json").is_file() else None


def _require_sana(pipeline: Path, layout: Layout[Any, Any], there: bool) -> None:
    """Refuse pipelines of other models, but for a text encoder that may be SANA's. Raises MissingPart."""
    kind = str(tensorfile.read_json(pipeline / "model_index.json").get("_class_name", "Sana"))
    if ("Sana" in kind and "Video" not in kind) or (there and layout.name == "text_encoder"):
        return
    content = "SANA-Video, which makes videos" if "SanaVideo" in kind else "another model"
    raise MissingPart(
        f"{pipeline}: this is a {kind} of diffusers, {content}; choose one of {presets.HUB}'s SANA image models"
    )


def _stored(
    path: Path, metadata: Mapping[str, str], tensors: dict[str, Tensor], layout: Layout[Any, Any]
) -> dict | None:
    """Our own description of a part: from the header, or from the tensor that a host's save kept."""
    blob = tensors.pop(TENSOR_KEY, None)
    try:
        if blob is not None and (blob.dtype != torch.uint8 or blob.ndim != 1):
            raise ValueError(f"{TENSOR_KEY} is no text")
        text = blob.numpy().tobytes().decode() if blob is not None else metadata.get(METADATA_KEY)
        return None if text is None else json.loads(text).get(layout.name)
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its {METADATA_KEY} metadata is damaged ({error}); take another copy") from None


def _quantised_layers(path: Path, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """What the header says of quantised layers, as the byte tensors beside them that say the same in other files."""
    try:
        layers = json.loads(metadata.get(QUANT_KEY, "{}")).get("layers", {})
        return {f"{name}.comfy_quant": json_bytes(description) for name, description in layers.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its {QUANT_KEY} metadata is damaged ({error}); take another copy") from None


def preset_name(weights: Weights) -> str:
    """'sprint-1.6B' and the like, or what kind of network it is."""
    return presets.name_of(weights.config) if weights.layout is TRANSFORMER else weights.layout.noun


def describe_tensor(weights: Weights) -> Tensor:
    """`part.describe` as a byte tensor, for files whose header belongs to a host, with the file and its preset."""
    description = part.describe(weights)
    description[weights.layout.name] |= {"source": weights.path.name, "preset": preset_name(weights)}
    return json_bytes(description)


# --- what neither configuration nor tensors say ----------------------------------------------------


def _complete_transformer(
    weights: Weights, description: Mapping[str, Any] | None, pipeline: Path | None, time_scale: float | None
) -> None:
    """Fill in what neither the configuration nor the tensors say, and log what had to be assumed.

    description: what the configuration is from, if it is not from the shapes.
    """
    config = weights.config
    certain = description is not None or config.guidance_embed or not config.qk_norm
    if time_scale is not None:
        if certain and time_scale != config.time_scale:
            log.warning(
                "%s: time scale 0..%g as asked, though the file says 0..%g",
                weights.path.name,
                time_scale,
                config.time_scale,
            )
        weights.config = config = dataclasses.replace(config, time_scale=time_scale)
    elif not certain:
        weights.assumed = f"time scale 0..{config.time_scale:g} (SANA 1.5 and the Sprint teachers look alike)"
        log.warning("%s: assumed %s; the loader can be told", weights.path.name, weights.assumed)
    preset = presets.PRESETS.get(presets.name_of(config))
    defaults = {"flow_shift": presets.FLOW_SHIFT, "size_px": preset.size_px if preset else 1024}
    latent_side = (description or {}).get("sample_size", ANY_SIDE)  # of diffusers' config.json
    if isinstance(latent_side, int) and latent_side != ANY_SIDE:
        defaults["size_px"] = latent_side * DOWNSCALE
    if config.pos_embed_scale == 2.0:
        defaults["flow_shift"] = presets.FLOW_SHIFT_4K
    scheduler = pipeline / "scheduler" / "scheduler_config.json" if pipeline else None
    if scheduler and scheduler.is_file():
        data = tensorfile.read_json(scheduler)
        shift = data.get("flow_shift", data.get("shift"))
        defaults |= {"flow_shift": shift} if shift else {}
    weights.settings = defaults | weights.settings


def _complete_controlnet(weights: Weights, time_scale: float | None, wiring: str | None) -> None:
    """Take what the branch shares with its trunk from the trunk's file, where ours says so; then what was asked for."""
    if trunk := weights.settings.get("trunk"):
        weights.tensors = _shared_with(trunk, weights) | weights.tensors
    if time_scale is not None:
        weights.config = dataclasses.replace(weights.config, time_scale=time_scale)
    if wiring is None or wiring == weights.config.wiring:
        return
    if wiring == controlnet.AUTHORS:
        raise CheckpointError(
            f"{weights.path}: this ControlNet comes without block 0 of its trunk, which the authors' wiring starts "
            "from; choose the wiring diffusers, or the authors' .pth"
        )
    weights.config = dataclasses.replace(weights.config, wiring=wiring)
    weights.tensors = {k: v for k, v in weights.tensors.items() if not k.startswith("base_block.")}


def _shared_with(trunk: Any, weights: Weights) -> dict[str, Tensor]:
    """What a ControlNet's file leaves to the file of its trunk, beside it or bundled. Raises CheckpointError."""
    if not isinstance(trunk, str) or not disk.is_name(trunk):
        raise CheckpointError(f"{weights.path}: its settings cannot be used: the trunk is {trunk!r}")
    neighbour = weights.path.parent / trunk
    path = presets.BUNDLED if trunk == presets.BUNDLED.name and not neighbour.is_file() else neighbour
    if not path.is_file():
        raise CheckpointError(f"{weights.path}: it needs {trunk}, the model that it was trained on, beside it")
    shared = controlnet.shared_tensors(load(path, TRANSFORMER).tensors, weights.config.wiring)
    if weights.settings.get("trunk_hash") != tensorfile.hash_of(shared):
        raise CheckpointError(
            f"{weights.path}: it was trained on another version of {trunk} than {path}; take the two that belong "
            "together"
        )
    return shared


# --- building and saving ----------------------------------------------------------------------------


def check_names(weights: Weights, ignore: tuple[str, ...] = ()) -> None:
    """Compare names and shapes with the network's, built on the meta device. Raises CheckpointError."""
    expected = shapes_of(weights.layout.network(weights.config, ops=Unset, device="meta").state_dict())
    present = {name: shape for name, shape in shapes_of(weights.tensors).items() if not name.endswith(ignore)}
    quantised = {k[: -len(".comfy_quant")] + ".weight" for k in weights.tensors if k.endswith(".comfy_quant")}
    problems = {
        "missing": sorted(set(expected) - set(present)),
        "unexpected": sorted(set(present) - set(expected)),
        "of another shape": [
            f"{name} {present[name]} instead of {expected[name]}"
            for name in sorted(set(expected) & set(present) - quantised)
            if present[name] != expected[name]
        ],
    }
    text = [
        f"{len(names)} tensors {what}: {messages.listed(names, LISTED)}" for what, names in problems.items() if names
    ]
    if text:
        advice = "download it again" if problems["missing"] else "choose another file"
        raise CheckpointError(
            f"{weights.path}: not a complete file for {weights.layout.title}: {'; '.join(text)}; {advice}"
        )


def build(
    weights: Weights[Config, Network], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Network:
    """The network with its weights, for use without a host; dtype None keeps the file's.

    Built on the meta device and assigned, so that an untouched tensor stays the file's mapped pages. Those of which a
    CPU has a copy in another order (models/prepacked.py) are unmapped. Raises CheckpointError.
    """
    if weights.is_quantised:
        raise CheckpointError(f"{weights.path}: this file is quantised; it runs inside ComfyUI only")
    check_names(weights)
    dtype = dtype or part.majority_dtype(weights.tensors)
    ops = Mapped if weights.layout.stays_mapped else Prepacked
    model = weights.layout.network(weights.config, ops=ops, dtype=dtype, device="meta")
    dtypes = {name: parameter.dtype for name, parameter in model.state_dict().items()}
    tensors = {name: tensor.to(device, dtypes[name]) for name, tensor in weights.tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    prepack(model, done=lambda weight: tensorfile.unmap([weight]))
    log.info("%s", summary(weights))
    return model.eval().requires_grad_(False)


def summary(weights: Weights) -> str:
    """One line for the log: 'sprint-1.6B, bfloat16, 1.61 B parameters'."""
    count = sum(t.numel() for name, t in weights.tensors.items() if not name.endswith(QUANT_SUFFIXES))
    dtype = str(part.majority_dtype(weights.tensors)).removeprefix("torch.")
    parameters = f"{count / 1e9:.2f} B parameters" if count > 1e8 else f"{count:,} parameters"
    return f"{preset_name(weights)}, {dtype}, {parameters}"


def packed(
    parts: Iterable[Weights], provenance: Mapping[str, Any], prefixed: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of one native file with these parts; prefixed: each under the name that ComfyUI gives it.

    The header says where they are from, what each part is, and the hash of its tensors (tensorfile.hash_of).
    """
    tensors: dict[str, Tensor] = {}
    description: dict[str, Any] = {"provenance": dict(provenance)}
    for weights in parts:
        prefix = weights.layout.prefixes[0] if prefixed else ""
        tensors |= {prefix + name: tensor for name, tensor in (weights.tensors | weights.extras).items()}
        description |= part.describe(weights)
        description[weights.layout.name] |= {
            "preset": preset_name(weights),
            "hash": tensorfile.hash_of(weights.tensors),
        }
    return tensors, part.header(description)


def save(path: str | os.PathLike, parts: Iterable[Weights], provenance: Mapping[str, Any]) -> None:
    """Write one native file with one or several parts, their configuration and where they came from."""
    parts = list(parts)
    tensorfile.write(path, *packed(parts, provenance, prefixed=len(parts) > 1))
