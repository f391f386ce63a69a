"""LoRA files of every trainer's naming, rewritten to the native names that a host's loader knows.

    transformer.blocks.0.attn.qkv.lora_B.weight  ->  transformer_blocks.0.attn1.to_q / to_k / to_v, a third each

A file's tensor names have four parts: prefixes of the trainer, the layer as the trainer's model called it, with dots
or underscores, and the part of the adapter. Layers are looked up under native, diffusers' and the authors' names.
Layers that the authors fuse (q, k and v; k and v) share the matrix next to the input; the one next to the output is
split. Nothing is computed but DoRA's magnitudes (see `dora_scale`) and LoKr of fused layers.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import keymaps
from .layouts import TEXT_ENCODER, TRANSFORMER
from .lora_settings import LoraSettings
from .tensorfile import CheckpointError

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "module.")
FLAT_PREFIXES = ("lora_transformer_", "lora_unet_", "lycoris_", "lora_prior_unet_")
TEXT_PREFIXES = ("text_encoders.gemma2_2b.transformer.", "gemma2_2b.transformer.", "text_encoder.", "transformer.", "")
TEXT_FLAT_PREFIXES = ("lora_text_encoder_", "lora_te1_", "lora_te_")
PART = re.compile(
    r"\.(lora_[AB](?:\.[^.]+)?\.weight|lora_(?:up|down|mid)\.weight|alpha|dora_scale|lora_magnitude_vector[\w.]*"
    r"|(?:lokr|hada)_\w+|oft_blocks|rescale|diff|diff_b|set_weight)\Z"
)
OUTER = ("lora_B.weight", "lora_up.weight", "dora_scale", "hada_w1_a", "hada_w2_a", "diff", "diff_b", "set_weight")
LISTED = 5  # names in a message


@dataclass
class Lora:
    """A LoRA under native names: {layer: {part: tensor}} for the transformer and for the text encoder."""

    transformer: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    text: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    skipped: list[str] = field(default_factory=list)  # tensor names that belong to neither

    @property
    def count(self) -> int:
        return len(self.transformer) + len(self.text)


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


def read(
    tensors: Mapping[str, Tensor],
    settings: LoraSettings,
    transformer: Mapping[str, tuple[int, ...]],
    text: Mapping[str, tuple[int, ...]] | None = None,
    weight: Callable[[str], Tensor | None] = lambda name: None,
    source: str = "this LoRA",
) -> Lora:
    """A LoRA file for networks of these tensors and shapes (native names).

    weight(name) is asked for the transformer's own weight where DoRA needs it. Raises CheckpointError if no layer
    matches, or if none has a fitting shape.
    """
    lora = Lora()
    misfits = []
    networks = [(lora.transformer, Layers(transformer, TRANSFORMER.namings, PREFIXES, FLAT_PREFIXES), transformer)]
    if text:
        networks.append((lora.text, Layers(text, TEXT_ENCODER.namings, TEXT_PREFIXES, TEXT_FLAT_PREFIXES), text))
    for name, parts in _by_layer(tensors, settings, lora.skipped).items():
        owners = ((adapters, layers.find(name), shapes) for adapters, layers, shapes in networks)
        adapters, native, shapes = next((owner for owner in owners if owner[1]), ({}, None, {}))
        split = _split(parts, len(native)) if native else None
        if native is None or split is None:
            lora.skipped += [f"{name}.{part}" for part in parts]
            continue
        for layer, own in zip(native, split, strict=True):
            if "dora_scale" in own:
                own["dora_scale"] = _by_rows(own["dora_scale"], shapes[f"{layer}.weight"])
            if _fits(own, shapes[f"{layer}.weight"]):
                adapters[layer] |= dora_scale(own, weight(f"{layer}.weight")) if "dora_scale" in own else own
            else:
                misfits.append((name, shapes[f"{layer}.weight"], own))
    _check(lora, misfits, list(tensors), source)
    return lora


def _check(lora: Lora, misfits: list[tuple], names: list[str], source: str) -> None:
    if misfits and not lora.count:
        name, shape, own = misfits[0]
        sizes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in own.items() if tensor.ndim > 1)
        raise CheckpointError(
            f"{source}: a LoRA of another width: {name} has {sizes}, the model's layer is {list(shape)}; "
            "load it with the model that it was trained on"
        )
    if not lora.count:
        raise CheckpointError(
            f"{source}: none of its {len(names)} tensors belongs to this model; its first: "
            f"{', '.join(sorted(names)[:LISTED]) or 'none'}. Is it a LoRA of another family?"
        )
    lora.skipped += [f"{name} (of another shape)" for name, *_ in misfits]


def _by_layer(tensors: Mapping[str, Tensor], settings: LoraSettings, skipped: list[str]) -> dict[str, dict]:
    """{layer as the file has it: {part: tensor}}, parts in one spelling, alpha where only the settings say it."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = PART.search(name)
        if match is None:
            skipped.append(name)
            continue
        part = re.sub(r"(lora_[AB])\..*", r"\1.weight", match[1])
        if part.startswith("lora_magnitude_vector"):
            part = "dora_scale"
        layers[name[: match.start()]][part] = tensor
    for name, parts in layers.items():
        down = parts.get("lora_A.weight", parts.get("lora_down.weight"))
        alpha = settings.alpha_of(name, down.shape[0]) if down is not None and down.ndim else None
        if alpha is not None and "alpha" not in parts:
            parts["alpha"] = torch.tensor(alpha)
    return layers


def _split(parts: dict[str, Tensor], n: int) -> list[dict[str, Tensor]] | None:
    """The adapter of a fused layer as those of its n native layers; None where that cannot be."""
    if n == 1:
        return [parts]
    if any(part.startswith("lokr") for part in parts):
        parts = _lokr_as_difference(parts)
    if any(part.startswith(("oft", "rescale")) or part in ("lora_mid.weight", "hada_t1", "hada_t2") for part in parts):
        return None
    own: list[dict[str, Tensor]] = [{} for _ in range(n)]
    for part, tensor in parts.items():
        outer = part in OUTER and tensor.shape[0] % n == 0 and tensor.shape[0] > 1
        for i, piece in enumerate(tensor.chunk(n) if outer else [tensor] * n):
            own[i][part] = piece.contiguous()
    return own


def _lokr_as_difference(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Kronecker product itself: it does not split into Kronecker products."""
    factors, rank = [], None
    for w in ("lokr_w1", "lokr_w2"):
        if w in parts:
            factors.append(parts[w].float())
        else:
            factors.append(parts[f"{w}_a"].float() @ parts[f"{w}_b"].float())
            rank = parts[f"{w}_b"].shape[0]
    scale = parts["alpha"].item() / rank if rank and "alpha" in parts else 1.0
    return {"diff": scale * torch.kron(*factors)}


def _fits(parts: dict[str, Tensor], shape: tuple[int, ...]) -> bool:
    """Whether the matrices next to input and output have the layer's sizes, as far as the kind of adapter shows."""
    rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
    for part, tensor in parts.items():
        if part in ("lora_B.weight", "lora_up.weight", "hada_w1_a", "hada_w2_a") and tensor.shape[0] != rows:
            return False
        if part in ("lora_A.weight", "lora_down.weight", "hada_w1_b", "hada_w2_b") and tensor.shape[1] != columns:
            return False
        if part == "diff" and tensor.shape[0] != rows:
            return False
    return True


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
    up = parts.get("lora_B.weight", parts.get("lora_up.weight"))
    down = parts.get("lora_A.weight", parts.get("lora_down.weight"))
    m = parts["dora_scale"]
    if weight is None or up is None or down is None or m.shape[0] != weight.shape[0]:
        return parts
    scale = parts["alpha"].item() / down.shape[0] if "alpha" in parts else 1.0
    w = weight.detach().float().flatten(1)
    after = w + scale * (up.float().flatten(1) @ down.float().flatten(1)).to(w.device)
    ratio = w.norm(dim=1) / after.norm(dim=1)
    return parts | {"dora_scale": m.float() * ratio.reshape(-1, *[1] * (m.ndim - 1)).to(m.device)}
