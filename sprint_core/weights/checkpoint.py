"""From any published file or folder to (configuration, native tensors), and back to one native file.

What a file holds is read off tensor names and shapes, never off its name. The configuration comes
from our own metadata, else from the config.json beside the weights, else from the shapes. Loading
is strict: a tensor too few or too many is an error that lists it.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import from_dict
from ..models import controlnet
from ..models.layers import Unset
from . import keymaps, presets, tensorfile
from .kinds import KINDS, foreign_family, kinds_in, prefix_of
from .layouts import autoencoder as autoencoder_layout
from .layouts import controlnet as controlnet_layout
from .layouts import text_encoder as text_encoder_layout
from .layouts import transformer as transformer_layout
from .tensorfile import CheckpointError

log = logging.getLogger(__name__)

METADATA_KEY = "sana_sprint"  # JSON in a safetensors header
TENSOR_KEY = "sana_sprint_config"  # the same JSON as bytes, for files that a host writes
QUANT_KEY = "_quantization_metadata"  # ComfyUI's description of quantised layers, JSON in a safetensors header
QUANT_SUFFIXES = (".comfy_quant", "_scale", ".weight_scale_2", ".scale_weight", ".scale_input")
LISTED = 10  # names in an error message


class MissingPart(CheckpointError):
    """A file or folder without the part that was asked for; it may well hold others."""


@dataclass
class Weights:
    """A part, ready to build: `tensors` under native names, `settings` beyond the configuration.

    settings: flow_shift and size_px of a transformer; text (instruction, max_tokens) of an encoder.
    extras: tensors that are no parameters (a tokenizer in the same file).
    """

    kind: str
    config: Any
    tensors: dict[str, Tensor]
    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    assumed: str = ""


# --- reading --------------------------------------------------------------------------------------


def load(path: str | os.PathLike, kind: str, time_scale: float | None = None, wiring: str | None = None) -> Weights:
    """The named part ('transformer', 'autoencoder', 'text_encoder' or 'controlnet') of a file or folder.

    path: a .safetensors or .pth file (a part, or a checkpoint with several), a diffusers pipeline
    folder, or one of its component folders. time_scale (transformer, controlnet) and wiring
    (controlnet) override what the file says. Tensors stay memory-mapped. Raises CheckpointError.
    """
    path, root = _locate(Path(path), kind)
    file = tensorfile.read(path)
    prefix = prefix_of(file.tensors, kind)
    if prefix is None or kind not in kinds_in(file.tensors):
        raise _refuse(path, kind, list(file.tensors))
    tensors = file.tensors | _quantised_layers(path, file.metadata)
    tensors = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    stored = _stored(path, file.metadata, tensors, kind)
    given = _given(path)
    weights = _READERS[kind](path, tensors, stored, given)
    _check_settings(weights)
    if kind == "transformer":
        _complete_transformer(weights, stored or given, root, time_scale)
        _check_settings(weights)
    if kind == "controlnet":
        _complete_controlnet(weights, time_scale, wiring)
    return weights


def _refuse(path: Path, kind: str, names: list[str]) -> CheckpointError:
    held = [KINDS[k].words for k in kinds_in(names)]
    found = foreign_family(names) or (" and ".join(held) if held else "something this pack does not know")
    some = "" if held else f" (its first tensors: {', '.join(sorted(names)[:3])})"
    return MissingPart(f"{path}: this is {found}, not {KINDS[kind].words}{some}; choose another file")


def _check_settings(weights: Weights) -> None:
    """Refuse settings that would only fail later, or silently."""
    settings = weights.settings
    good = isinstance(settings, dict)
    if good:
        shift, size_px = settings.get("flow_shift", 1.0), settings.get("size_px", 1024)
        good = isinstance(shift, int | float) and 0 < shift <= 100 and isinstance(size_px, int) and 0 < size_px <= 65536
    if not good:
        raise CheckpointError(f"{weights.path}: its settings cannot be used: {settings!r}")


def _given(path: Path) -> dict | None:
    """The config.json of a diffusers or Hugging Face folder; other libraries' say nothing that is needed."""
    file = path / "config.json"
    data = tensorfile.read_json(file) if path.is_dir() and file.is_file() else {}
    return data if "_class_name" in data or "model_type" in data else None


def _locate(path: Path, kind: str) -> tuple[Path, Path | None]:
    """Folder or file of a part, and the pipeline folder around it, if there is one."""
    if not path.is_dir():
        return path, None
    part = path / KINDS[kind].folder
    if part.is_dir():
        return part, path
    if (path / "model_index.json").is_file():
        raise MissingPart(f"{path}: this pipeline folder has no '{KINDS[kind].folder}' folder; download it whole")
    if held := [other.folder for other in KINDS.values() if (path / other.folder).is_dir()]:
        raise MissingPart(f"{path}: it holds {' and '.join(held)}, not {KINDS[kind].words}; choose another folder")
    return path, path.parent if (path.parent / "model_index.json").is_file() else None


def _stored(path: Path, metadata: Mapping[str, str], tensors: dict[str, Tensor], kind: str) -> dict | None:
    """Our own description of a part: from the header, or from the tensor that a host's save kept."""
    blob = tensors.pop(TENSOR_KEY, None)
    try:
        if blob is not None and (blob.dtype != torch.uint8 or blob.ndim != 1):
            raise ValueError(f"{TENSOR_KEY} is no text")
        text = blob.numpy().tobytes().decode() if blob is not None else metadata.get(METADATA_KEY)
        return None if text is None else json.loads(text).get(kind)
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its {METADATA_KEY} metadata is damaged ({error}); download it again") from None


def _quantised_layers(path: Path, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """What the header says of quantised layers, as the byte tensors beside them that say the same in other files."""
    try:
        layers = json.loads(metadata.get(QUANT_KEY, "{}")).get("layers", {})
        return {f"{name}.comfy_quant": _json_bytes(about) for name, about in layers.items()}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its {QUANT_KEY} metadata is damaged ({error}); download it again") from None


def describe(weights: Weights) -> dict:
    """What `load` reads back from a saved file: {kind: {config, settings}}."""
    return {weights.kind: {"config": dataclasses.asdict(weights.config), "settings": weights.settings}}


def header(about: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file that says what it holds, as `describe` has it."""
    return {METADATA_KEY: json.dumps(about)}


def preset_name(weights: Weights) -> str:
    """'sprint-1.6B' and the like, or what kind of network it is."""
    return presets.name_of(weights.config) if weights.kind == "transformer" else KINDS[weights.kind].words[2:]


def describe_tensor(weights: Weights) -> Tensor:
    """`describe` as a byte tensor, for files whose header belongs to a host, with the file and the preset it is of."""
    about = describe(weights)
    about[weights.kind] |= {"source": weights.path.name, "preset": preset_name(weights)}
    return _json_bytes(about)


def _json_bytes(data: Any) -> Tensor:
    return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _config(kind: str, path: Path, stored: dict | None, given: dict | None, read: Callable, infer: Callable) -> Any:
    try:
        if stored is not None and (given is None or "config" in stored):
            return from_dict(KINDS[kind].config, stored["config"])
        return read(given) if given is not None else infer()
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: cannot tell the configuration of {KINDS[kind].words}: {error}") from None


def _read_autoencoder(path: Path, tensors: dict, stored: dict | None, given: dict | None) -> Weights:
    tensors = keymaps.to_native(tensors, autoencoder_layout.DCAE)
    infer = lambda: autoencoder_layout.infer_config(_shapes(tensors))  # noqa: E731
    config = _config("autoencoder", path, stored, given, autoencoder_layout.config_from_diffusers, infer)
    return Weights("autoencoder", config, tensors, path, (stored or {}).get("settings", {}))


def _read_text_encoder(path: Path, tensors: dict, stored: dict | None, given: dict | None) -> Weights:
    extras = {k: tensors.pop(k) for k in ("spiece_model", "tokenizer_json") if k in tensors}
    tensors = keymaps.to_native(tensors, text_encoder_layout.GEMMA_BARE, text_encoder_layout.GEMMA_DROPPED)
    infer = lambda: text_encoder_layout.infer_config(_shapes(tensors))  # noqa: E731
    config = _config("text_encoder", path, stored, given, text_encoder_layout.config_from_hf, infer)
    return Weights("text_encoder", config, tensors, path, (stored or {}).get("settings", {}), extras)


def _read_transformer(path: Path, tensors: dict, stored: dict | None, given: dict | None) -> Weights:
    positions = tensors["pos_embed"].shape[-2] if "pos_embed" in tensors else 0
    if "x_embedder.proj.weight" in tensors:
        tensors = keymaps.to_native(tensors, transformer_layout.NVLABS, transformer_layout.NVLABS_DROPPED)
    else:
        tensors = keymaps.to_native(tensors, transformer_layout.DIFFUSERS)
    infer = lambda: transformer_layout.infer_config(_shapes(tensors), positions)  # noqa: E731
    config = _config("transformer", path, stored, given, transformer_layout.config_from_diffusers, infer)
    return Weights("transformer", config, tensors, path, (stored or {}).get("settings", {}))


def _read_controlnet(path: Path, tensors: dict, stored: dict | None, given: dict | None) -> Weights:
    positions = tensors["pos_embed"].shape[-2] if "pos_embed" in tensors else 0
    if "x_embedder.proj.weight" in tensors:
        tensors = {name: tensor for name, tensor in tensors.items() if not controlnet_layout.NVLABS_TRUNK.match(name)}
        tensors = keymaps.to_native(tensors, controlnet_layout.NVLABS_CONTROL, transformer_layout.NVLABS_DROPPED)
    else:
        tensors = keymaps.to_native(tensors, transformer_layout.DIFFUSERS)
    infer = lambda: controlnet_layout.infer_control_config(_shapes(tensors), positions)  # noqa: E731
    config = _config("controlnet", path, stored, given, controlnet_layout.control_config_from_diffusers, infer)
    return Weights("controlnet", config, tensors, path, (stored or {}).get("settings", {}))


_READERS = {
    "transformer": _read_transformer,
    "controlnet": _read_controlnet,
    "autoencoder": _read_autoencoder,
    "text_encoder": _read_text_encoder,
}


# --- what neither configuration nor tensors say ----------------------------------------------------


def _complete_transformer(weights: Weights, said: dict | None, root: Path | None, time_scale: float | None) -> None:
    """Fill in what neither the configuration nor the tensors say, and log what had to be assumed.

    said: the description that the configuration is from, if it is not from the shapes.
    """
    config = weights.config
    certain = said is not None or config.guidance_embed or not config.qk_norm
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
    if config.pos_embed_scale == 2.0:
        defaults["flow_shift"] = presets.FLOW_SHIFT_4K
    scheduler = root / "scheduler" / "scheduler_config.json" if root else None
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
    if not isinstance(trunk, str) or Path(trunk).name != trunk:
        raise CheckpointError(f"{weights.path}: its settings cannot be used: the trunk is {trunk!r}")
    beside = weights.path.parent / trunk
    path = presets.BUNDLED if trunk == presets.BUNDLED.name and not beside.is_file() else beside
    if not path.is_file():
        raise CheckpointError(f"{weights.path}: it needs {trunk}, the model that it was trained on, beside it")
    shared = controlnet.of_trunk(load(path, "transformer").tensors, weights.config.wiring)
    if weights.settings.get("trunk_hash") != tensorfile.hash_of(shared):
        raise CheckpointError(
            f"{weights.path}: it was trained on another version of {trunk} than {path}; take the two that belong "
            "together"
        )
    return shared


# --- building and saving ----------------------------------------------------------------------------


def check_names(weights: Weights, ignore: tuple[str, ...] = ()) -> None:
    """Compare names and shapes with the network's, built on the meta device. Raises CheckpointError."""
    expected = _shapes(KINDS[weights.kind].model(weights.config, ops=Unset, device="meta").state_dict())
    found = {k: v for k, v in _shapes(weights.tensors).items() if not k.endswith(ignore)}
    quantised = {k[: -len(".comfy_quant")] + ".weight" for k in weights.tensors if k.endswith(".comfy_quant")}
    problems = {
        "missing": sorted(set(expected) - set(found)),
        "unexpected": sorted(set(found) - set(expected)),
        "of another shape": [
            f"{k} {found[k]} instead of {expected[k]}"
            for k in sorted(set(expected) & set(found) - quantised)
            if found[k] != expected[k]
        ],
    }
    text = [
        f"{len(names)} tensors {what}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}"
        for what, names in problems.items()
        if names
    ]
    if text:
        raise CheckpointError(
            f"{weights.path}: not a complete file for {KINDS[weights.kind].words}: {'; '.join(text)}; download it again"
        )


def build(weights: Weights, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """The network with its weights, for use without a host; dtype None keeps the file's.

    Built on the meta device and assigned, so that an untouched tensor stays the file's mapped pages.
    Raises CheckpointError.
    """
    if any(name.endswith(QUANT_SUFFIXES) for name in weights.tensors):
        raise CheckpointError(f"{weights.path}: this file is quantised; it runs inside ComfyUI only")
    check_names(weights)
    kind = KINDS[weights.kind]
    model = kind.model(weights.config, ops=Unset, dtype=dtype or majority_dtype(weights.tensors), device="meta")
    wanted = {name: parameter.dtype for name, parameter in model.state_dict().items()}
    tensors = {name: tensor.to(device, wanted[name]) for name, tensor in weights.tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    log.info("%s", summary(weights))
    return model.eval().requires_grad_(False)


def majority_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that most numbers of a file have, leaving out layers that are quantised one by one."""
    quantised = {name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")}
    counts: dict[torch.dtype, int] = {}
    for name, tensor in tensors.items():
        if name.endswith(QUANT_SUFFIXES) or name.removesuffix(".weight") in quantised:
            continue
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=counts.__getitem__)


def summary(weights: Weights) -> str:
    """One line for the log: 'sprint-1.6B, bfloat16, 1.61 B parameters'."""
    numbers = [t for name, t in weights.tensors.items() if not name.endswith(QUANT_SUFFIXES)]
    count, dtype = sum(t.numel() for t in numbers), str(majority_dtype(weights.tensors)).removeprefix("torch.")
    return f"{preset_name(weights)}, {dtype}, " + (
        f"{count / 1e9:.2f} B parameters" if count > 1e8 else f"{count:,} parameters"
    )


def packed(
    parts: Iterable[Weights], provenance: Mapping[str, Any], prefixed: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of one native file with these parts; prefixed: each under the name that ComfyUI gives it.

    The header says where they are from, what each part is, and the hash of its tensors (tensorfile.hash_of).
    """
    tensors, about = {}, {"provenance": dict(provenance)}
    for part in parts:
        prefix = KINDS[part.kind].prefixes[0] if prefixed else ""
        tensors |= {prefix + k: v for k, v in (part.tensors | part.extras).items()}
        about |= describe(part)
        about[part.kind] |= {"preset": preset_name(part), "hash": tensorfile.hash_of(part.tensors)}
    return tensors, header(about)


def save(path: str | os.PathLike, parts: Iterable[Weights], provenance: Mapping[str, Any]) -> None:
    """Write one native file with one or several parts, their configuration and where they came from."""
    parts = list(parts)
    tensorfile.write(path, *packed(parts, provenance, prefixed=len(parts) > 1))
