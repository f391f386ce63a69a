"""A LoRA of any trainer's naming through ComfyUI's own loader, so that strengths, stacking and hooks stay its."""

import functools
from pathlib import Path

import comfy.model_patcher
import comfy.sd
import folder_paths
import torch

from ...sprint_core import messages
from ...sprint_core.weights import lora, tensorfile
from ...sprint_core.weights.lora_settings import CONFIG, LoraSettings
from ...sprint_core.weights.tensorfile import CheckpointError
from . import clip as clip_adapter
from . import folders
from . import model as model_adapter

log = messages.logger(__name__)

FOLDER = "loras"
NETWORK = "diffusion_model."
TEXT = f"{clip_adapter.NAME}.transformer."


def names() -> list[str]:
    return folder_paths.get_filename_list(FOLDER)


def stamp(name: str) -> str:
    """Changes when the file does, or PEFT's settings beside it, so that it is read again."""
    path = folder_paths.get_full_path(FOLDER, name)
    return folders.stamp_of(() if path is None else (Path(path), Path(path).with_name(CONFIG)))


def path_of(name: str) -> str:
    """Raises CheckpointError."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise CheckpointError(f"{name} is not in models/{FOLDER}; put it there and press R to refresh")
    roots = map(Path, folder_paths.get_folder_paths(FOLDER))
    folders.warn_of_namesakes(name, [(root, root / name) for root in roots if (root / name).is_file()])
    return path


def apply(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP | None,
    name: str,
    strength_model: float,
    strength_clip: float,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP | None, str]:
    """(MODEL, CLIP, what was matched in words). Raises CheckpointError, ValueError."""
    if not model_adapter.is_sana(model):
        raise ValueError("this MODEL is not a SANA; use ComfyUI's Load LoRA for other families")
    path = path_of(name)
    file = tensorfile.read(path)
    transformer = _tensors(model.model.diffusion_model.state_dict(), "")
    text = _tensors(clip.cond_stage_model.state_dict(), TEXT) if clip is not None else {}
    weight = functools.partial(_own_weight, model, transformer, NETWORK)
    text_weight = functools.partial(_own_weight, getattr(clip, "patcher", None), text, TEXT)
    settings = LoraSettings(file.metadata, Path(path).with_name(CONFIG), name)
    matched = lora.read(
        file.tensors, settings, _shapes(transformer), _shapes(text), weight, name, text_weight=text_weight
    )
    rewritten = _flat(matched.transformer, NETWORK) | _flat(matched.text, f"text_encoders.{TEXT}")
    model, clip = comfy.sd.load_lora_for_models(model, clip, rewritten, strength_model, strength_clip)
    return model, clip, _summary(matched, name, clip is not None)


def _summary(matched: lora.Lora, name: str, with_text: bool) -> str:
    """What was matched, in words for the node; what was not, in the log."""
    summary = f"{len(matched.transformer)} layers of the model"
    if with_text:
        summary += f", {len(matched.text)} of the text encoder"
    if matched.foreign:
        log.warning(
            "%s: %d tensors belong to no layer and are left out: %s",
            name,
            len(matched.foreign),
            messages.listed(matched.foreign),
        )
        summary += f"; {len(matched.foreign)} tensors left out"
    if matched.idle:
        log.warning(
            "%s: %d layers cannot be applied and are left out: %s",
            name,
            len(matched.idle),
            messages.listed(matched.idle),
        )
        summary += f"; {len(matched.idle)} layers left out: {matched.idle[0]}"
    if matched.is_zero:
        log.warning("%s: its matrices are zero, so that it changes nothing; has it been trained?", name)
        summary += "; all are zero and change nothing"
    return summary


def _tensors(state: dict, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _shapes(tensors: dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _flat(layers: dict, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{layer}.{part}": tensor for layer, parts in layers.items() for part, tensor in parts.items()}


def _own_weight(patcher, tensors: dict, prefix: str, name: str) -> torch.Tensor | None:
    """The weight without other LoRAs, which ComfyUI may just have merged into it; None for one that is quantised."""
    saved = patcher.backup.get(prefix + name)
    tensor = tensors[name] if saved is None else saved.weight
    return tensor if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not tensor.is_meta else None
