"""LoRA files of every trainer's naming, rewritten to the native names that a host's loader knows.

    transformer.blocks.0.attn.qkv.lora_B.weight  ->  transformer_blocks.0.attn1.to_q / to_k / to_v, a third each

A file's tensor names have four parts: prefixes of the trainer, the layer as the trainer's model called it, with dots
or underscores, and the part of the adapter. Layers are looked up under native, diffusers' and the authors' names.
Layers that the authors fuse (q, k and v; k and v) share the matrix next to the input; the one next to the output is
split. Nothing is computed but DoRA's magnitudes (see `dora_scale`) and LoKr of fused layers. Layers whose adapter
would change nothing are left out and named (see adapters.py).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import messages
from . import adapters, keymaps
from .layouts import TEXT_ENCODER, TRANSFORMER
from .lora_settings import LoraSettings
from .tensorfile import CheckpointError

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "module.")
FLAT_PREFIXES = ("lora_transformer_", "lora_unet_", "lycoris_", "lora_prior_unet_")
TEXT_PREFIXES = ("text_encoders.gemma2_2b.transformer.", "gemma2_2b.transformer.", "text_encoder.", "transformer.", "")
TEXT_FLAT_PREFIXES = ("lora_text_encoder_", "lora_te1_", "lora_te_")
PART = re.compile(
    r"(?:\.(?P<matrix>lora_[AB](?:\.(?!weight\Z)[^.]+)?(?:\.weight)?|lora_(?:up|down|mid)\.weight"
    r"|lora(?:_linear_layer)?\.(?:up|down)\.weight)|_(?P<old>lora\.(?:up|down)\.weight)"
    r"|\.(?P<magnitudes>dora_scale|lora_magnitude_vector[\w.]*)"
    r"|\.(?P<other>alpha|(?:lokr|hada)_\w+|oft_blocks|rescale|[ab][12]\.weight|diff|diff_b|set_weight|[wb]_norm))\Z"
)
TEXT_ONLY = ("text_encoder", "lora_te", "lora_text_encoder")  # begin the names of its tensors and no others


@dataclass
class Lora:
    """A LoRA under native names: {layer: {part: tensor}} for the transformer and for the text encoder."""

    transformer: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    text: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    foreign: list[str] = field(default_factory=list)  # tensors that belong to neither
    idle: list[str] = field(default_factory=list)  # layers that would stay as they are, and why

    @property
    def count(self) -> int:
        return len(self.transformer) + len(self.text)

    @property
    def skipped(self) -> list[str]:
        return self.foreign + self.idle

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing, as before its training."""
        return all(adapters.is_zero(parts) for network in (self.transformer, self.text) for parts in network.values())


class Layers:
    """The layers of a network under every name that trainers use for them."""

    def __init__(
        self,
        tensors: Iterable[str],
        namings: Iterable[keymaps.Naming],
        prefixes: tuple[str, ...],
        flat_prefixes: tuple[str, ...],
    ):
        weights = [name for name in tensors if name.endswith(".weight")]
        self.named: dict[str, tuple[str, ...]] = {_layer(name): (_layer(name),) for name in weights}
        for naming in namings:
            for foreign, native in keymaps.foreign_names(weights, naming).items():
                self.named.setdefault(_layer(foreign), tuple(map(_layer, native)))
        self.flat = {name.replace(".", "_"): native for name, native in self.named.items()}
        self.prefixes = prefixes
        self.flat_prefixes = flat_prefixes

    def find(self, name: str) -> tuple[str, ...] | None:
        """The native layers that a trainer's layer stands for."""
        for prefix in self.flat_prefixes:
            if name.startswith(prefix):
                return self.flat.get(name.removeprefix(prefix))
        while name not in self.named:
            prefix = next((p for p in self.prefixes if p and name.startswith(p)), None)
            if prefix is None:
                return None
            name = name.removeprefix(prefix)
        return self.named[name]


def _layer(tensor_name: str) -> str:
    return tensor_name.removesuffix(".weight")


@dataclass
class Target:
    """A network that a LoRA may change: its layers' names, its tensors' shapes, its own weights; and what was found."""

    layers: Layers
    shapes: Mapping[str, tuple[int, ...]]
    weight: Callable[[str], Tensor | None]
    found: dict[str, dict[str, Tensor]]


def read(
    tensors: Mapping[str, Tensor],
    settings: LoraSettings,
    transformer: Mapping[str, tuple[int, ...]],
    text: Mapping[str, tuple[int, ...]] | None = None,
    weight: Callable[[str], Tensor | None] = lambda name: None,
    source: str = "this LoRA",
    text_weight: Callable[[str], Tensor | None] = lambda name: None,
) -> Lora:
    """A LoRA file for networks of these tensors and shapes (native names).

    weight(name), and text_weight(name) of the text encoder, are asked for a network's own weight where DoRA needs it.
    Raises CheckpointError if no layer matches, or if none has a fitting shape.
    """
    lora = Lora()
    targets = [
        Target(Layers(transformer, TRANSFORMER.namings, PREFIXES, FLAT_PREFIXES), transformer, weight, lora.transformer)
    ]
    if text:
        layers = Layers(text, TEXT_ENCODER.namings, TEXT_PREFIXES, TEXT_FLAT_PREFIXES)
        targets.append(Target(layers, text, text_weight, lora.text))
    names: dict[str, list[str]] = defaultdict(list)
    misfit = None
    for name, parts in _by_layer(tensors, settings, lora, names).items():
        owners = ((target, native) for target in targets if (native := target.layers.find(name)))
        if (owner := next(owners, None)) is None:
            lora.foreign += names[name]
            continue
        target, native = owner
        reasons = _apply(parts, native, target)
        lora.idle += [f"{name} ({reason})" for reason in reasons]
        if adapters.ANOTHER_SHAPE in reasons and misfit is None:
            misfit = name, parts, target.shapes[f"{native[0]}.weight"]
    _check(lora, misfit, list(tensors), source)
    return lora


def _apply(parts: dict[str, Tensor], native: tuple[str, ...], target: Target) -> list[str]:
    """Give these layers what of an adapter can be applied; returns why the rest cannot."""
    split = adapters.split(parts, len(native))
    if split is None:
        return ["it cannot be split into q, k and v"]
    reasons: dict[str, None] = {}
    for layer, own in zip(native, split, strict=True):
        if layer in target.found:
            reasons["a second one for the same layer"] = None
            continue
        shape = target.shapes[f"{layer}.weight"]
        if "dora_scale" in own:
            own["dora_scale"] = _by_rows(own["dora_scale"], shape)
        good, wrong = adapters.usable(own, shape, target.shapes.get(f"{layer}.bias"))
        if good:
            target.found[layer] = dora_scale(good, target.weight(f"{layer}.weight")) if "dora_scale" in good else good
        reasons |= dict.fromkeys(wrong)
    return list(reasons)


def _check(lora: Lora, misfit: tuple | None, names: list[str], source: str) -> None:
    """Raise CheckpointError where nothing can be applied; misfit: a layer of another shape, its parts, the shape."""
    if lora.count:
        return
    if misfit:
        name, own, shape = misfit
        sizes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in own.items() if tensor.ndim > 1)
        raise CheckpointError(
            f"{source}: a LoRA of another width: {name} has {sizes}, the model's layer is {list(shape)}; "
            "load it with the model that it was trained on"
        )
    if lora.idle:
        raise CheckpointError(
            f"{source}: none of its {len(lora.idle)} layers can be applied: {messages.listed(lora.idle)}; it is "
            "damaged or incomplete; take another copy of it, or train it anew"
        )
    if lora.foreign and all(name.startswith(TEXT_ONLY) for name in lora.foreign):
        raise CheckpointError(
            f"{source}: it changes the text encoder alone; connect the CLIP of the text encoder that it was trained on"
        )
    raise CheckpointError(
        f"{source}: none of its {len(names)} tensors belongs to this model; its first: "
        f"{messages.listed(sorted(names)) or 'none'}. Is it a LoRA of another family?"
    )


def _by_layer(
    tensors: Mapping[str, Tensor], settings: LoraSettings, lora: Lora, names: dict[str, list[str]]
) -> dict[str, dict[str, Tensor]]:
    """{layer as the file has it: {part: tensor}}, parts in one spelling, alpha where only the settings say it.

    names: takes the names of each layer's tensors.
    """
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = PART.search(name)
        part = _spelling(match) if match else ""
        if match is None:
            lora.foreign.append(name)
        elif part in layers[name[: match.start()]]:
            lora.idle.append(f"{name} (a second one for the same layer)")
        else:
            layers[name[: match.start()]][part] = tensor
            names[name[: match.start()]].append(name)
    for name, parts in layers.items():
        rank = adapters.rank_of(parts)
        alpha = settings.alpha_of(name, rank) if rank is not None else None
        if alpha is not None and "alpha" not in parts:
            parts["alpha"] = torch.tensor(alpha)
        if rank is None and "lokr_w1" in parts and "alpha" not in parts:
            parts["lokr_w1"] = parts["lokr_w1"] * settings.scale_of(name)
    return layers


def _spelling(match: re.Match) -> str:
    """The part of an adapter under one name: lora_B.default.weight and lora.up.weight are lora_up.weight."""
    if match["magnitudes"]:
        return "dora_scale"
    if matrix := match["matrix"] or match["old"]:
        if "mid" in matrix:
            return "lora_mid.weight"
        return "lora_up.weight" if "up" in matrix or matrix.startswith("lora_B") else "lora_down.weight"
    return match["other"]


def _by_rows(magnitudes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """DoRA's magnitudes of a weight's rows as [rows, 1, ...] of its rank: PEFT has [rows], and [1, rows, 1, 1] of a
    convolution. Those of columns, [1, columns], stay."""
    of_columns = magnitudes.ndim == 2 and magnitudes.shape[0] == 1 and shape[0] != 1
    if magnitudes.numel() != shape[0] or of_columns:
        return magnitudes
    return magnitudes.reshape(-1, *[1] * (len(shape) - 1))


def dora_scale(parts: dict[str, Tensor], weight: Tensor | None) -> dict[str, Tensor]:
    """Parts whose magnitudes give DoRA's m (W + D) / |W + D| (arXiv 2402.09353) in a host that divides by |W|.

    Norms are of rows. ComfyUI normalises by rows of the weight before the update; so m becomes m |W| / |W + D|.
    Unchanged without the weight, or where the magnitudes belong to columns.
    """
    m = parts["dora_scale"]
    if weight is None or not _adds(parts) or m.shape[0] != weight.shape[0]:
        return parts
    w = weight.detach().float().flatten(1)
    after = w + adapters.change(parts).reshape(w.shape).to(w.device)
    ratio = w.norm(dim=1) / after.norm(dim=1)
    return parts | {"dora_scale": m.float() * ratio.reshape(-1, *[1] * (m.ndim - 1)).to(m.device)}


def _adds(parts: dict[str, Tensor]) -> bool:
    """Whether `adapters.change` knows what these parts add."""
    return any(part.startswith(("lora_", "hada_", "lokr_")) for part in parts)
