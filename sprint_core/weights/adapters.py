"""Adapters of one layer, by kind: what each changes of a weight, and why some change nothing.

    LoRA   alpha / rank  up down            up [rows, rank], down [rank, columns ...]; with a core (Tucker) for kernels
    LoHa   alpha / rank  (a1 b1) * (a2 b2)
    LoKr   alpha / rank  w1 (x) w2          each one matrix, or a product of two
    GLoRA, OFT, BOFT     depend on the weight; their sizes are checked
    diff, set_weight     a difference, or the weight itself; diff_b: a bias's

Matrices may be flattened: ComfyUI's trainer writes the down matrix of a 3x3 kernel as [rank, columns * 9]. An adapter
that a host could not apply, which at most writes a line into the log, is found before: `usable`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]  # of one layer, by their names in a file

LORA = ("lora_up.weight", "lora_down.weight")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w2")
GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
WHOLE = ("diff", "set_weight", "w_norm")  # as large as the weight itself
BIASES = ("diff_b", "b_norm")
KINDS = {
    "LoRA": (*LORA, "lora_mid.weight"),
    "LoHa": (*LOHA, "hada_t1", "hada_t2"),
    "LoKr": tuple(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    "GLoRA": GLORA,
    "OFT": ("oft_blocks", "rescale"),
    **{part: (part,) for part in WHOLE},
}
CUT_ALONG_ROWS = ("lora_up.weight", "dora_scale", "hada_w1_a", "hada_w2_a", *WHOLE, *BIASES)
ANOTHER_SHAPE = "of another shape"


def usable(parts: Parts, shape: tuple[int, ...], bias: tuple[int, ...] | None) -> tuple[dict[str, Tensor], list[str]]:
    """The parts that change a layer whose weight and bias have these shapes, and what is wrong with the others."""
    of_bias = {part: tensor for part, tensor in parts.items() if part in BIASES}
    of_weight = {part: tensor for part, tensor in parts.items() if part not in BIASES}
    good, wrong = {}, []
    for part, tensor in of_bias.items():
        if bias is None:
            wrong.append(f"{part}, but no bias")
        elif tuple(tensor.shape) != bias:
            wrong.append(f"{part} {ANOTHER_SHAPE}")
        else:
            good[part] = tensor
    if of_weight:
        if reason := fault(of_weight, shape):
            wrong.append(reason)
        else:
            whole = {part: tensor.reshape(shape) for part, tensor in of_weight.items() if part in WHOLE}
            good |= of_weight | whole
            if "lokr_t2" in good:
                good = _without_core(good)
    return good, wrong


def fault(parts: Parts, shape: tuple[int, ...]) -> str | None:
    """Why these parts leave a weight of this shape as it is, in words; None where they change it."""
    kinds = [kind for kind, names in KINDS.items() if any(name in parts for name in names)]
    if len(kinds) > 1:
        return f"{' and '.join(kinds)} at once"
    alpha = parts.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or not math.isfinite(alpha.item())):
        return "alpha is no number"
    if not kinds:
        return f"only {' and '.join(sorted(parts))}"
    if any(wrong_size(part, tensor, shape) for part, tensor in parts.items()):
        return ANOTHER_SHAPE
    return _fault_of_kind(kinds[0], parts, shape)


def wrong_size(part: str, tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a matrix that stands by itself is not as long as the weight, on the side where it meets it."""
    rows, columns, inner = shape[0], shape[1] if len(shape) > 1 else 1, math.prod(shape[1:])
    size = tensor.shape
    if part in WHOLE:
        return tensor.numel() != math.prod(shape) or size[:1] != shape[:1]
    if part == "dora_scale":  # of rows, else of columns
        return tensor.numel() != (rows if size[:1] == (rows,) else columns)
    if part == "lora_up.weight":
        return tensor.ndim < 2 or size[0] != rows
    if part == "lora_down.weight":
        return tensor.ndim < 2 or (size[1] != columns and math.prod(size[1:]) != inner)
    return False


def _fault_of_kind(kind: str, parts: Parts, shape: tuple[int, ...]) -> str | None:
    missing = _missing(kind, parts)
    if missing:
        return f"without {' and '.join(missing)}"
    if kind in WHOLE:
        return None
    if kind in ("GLoRA", "OFT"):
        fits = _glora_fits(parts, shape) if kind == "GLoRA" else _oft_fits(parts, shape)
        return None if fits else ANOTHER_SHAPE
    if rank_of(parts) == 0:
        return "rank 0"
    if rank_of(parts) is not None and "alpha" in parts and parts["alpha"].item() == 0:
        return "alpha 0"
    try:
        size = change({part: tensor.to("meta") for part, tensor in parts.items() if part != "alpha"}).shape
    except (RuntimeError, IndexError, ValueError):  # as torch refuses sizes
        return "matrices of different rank"
    return None if size[0] == shape[0] and size.numel() == math.prod(shape) else ANOTHER_SHAPE


def _missing(kind: str, parts: Parts) -> list[str]:
    """What an adapter of a kind lacks to do anything."""
    if kind == "LoKr":
        halves = [(w, (f"{w}_a", f"{w}_b")) for w in LOKR]
        return [w for w, factors in halves if w not in parts and any(factor not in parts for factor in factors)]
    needed = {"LoRA": LORA, "LoHa": LOHA, "GLoRA": GLORA, "OFT": ("oft_blocks",)}.get(kind, ())
    if kind == "LoHa" and ("hada_t1" in parts or "hada_t2" in parts):
        needed = (*needed, "hada_t1", "hada_t2")
    # ComfyUI takes the bound of BOFT's rotations from alpha, and has none where it is missing.
    if kind == "OFT" and "oft_blocks" in parts and parts["oft_blocks"].ndim == 4:
        needed = (*needed, "alpha")
    return [name for name in needed if name not in parts]


def _glora_fits(parts: Parts, shape: tuple[int, ...]) -> bool:
    """W A1 A2 + B1 B2 of the newer order, or W A2 A1 + B2 B1 of the older one."""
    a1, a2, b1, b2 = (parts[name].flatten(1).shape if parts[name].ndim > 1 else (0, 0) for name in GLORA)
    rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
    newer = (columns, rows) == (a1[0], b1[0]) and a1[1] == a2[0] and b1[1] == b2[0] and a2[1] == b2[1] == columns
    older = (columns, rows) == (a2[0], b2[0]) and a2[1] == a1[0] and b2[1] == b1[0] and a1[1] == b1[1] == columns
    return (newer or older) and min(a1) > 0


def _oft_fits(parts: Parts, shape: tuple[int, ...]) -> bool:
    """Blocks [count, size, size] over all rows; BOFT's [factors, count, size, size]."""
    blocks = parts["oft_blocks"]
    square = blocks.ndim in (3, 4) and blocks.shape[-1] == blocks.shape[-2]
    return square and math.prod(blocks.shape[-3:-1]) == shape[0] and blocks.numel() > 0


def rank_of(parts: Parts) -> int | None:
    """What alpha is divided by; None where alpha counts for nothing."""
    for name in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in parts and parts[name].ndim:
            return parts[name].shape[0]
    return None


def scale_of(parts: Parts) -> float:
    """alpha / rank, as far as they are there."""
    rank = rank_of(parts)
    return parts["alpha"].item() / rank if rank and "alpha" in parts else 1.0


def change(parts: Parts) -> Tensor:
    """What a LoRA, LoHa or LoKr adds to a weight, in fp32, perhaps flattened. Raises RuntimeError if sizes differ."""
    p = {name: tensor.float() for name, tensor in parts.items()}
    if LORA[0] in p:
        up, down = p[LORA[0]].flatten(1), p[LORA[1]]
        if "lora_mid.weight" in p:
            down = torch.einsum("ijkl,jr->irkl", p["lora_mid.weight"], down.flatten(1))
        delta = up @ down.flatten(1)
    elif LOHA[0] in p:
        delta = _factors(p, "hada_w1", "hada_t1") * _factors(p, "hada_w2", "hada_t2")
    else:
        w1, w2 = _kronecker_factors(p)
        if w2.ndim == 4:
            w1 = w1[:, :, None, None]
        elif w1.ndim != 2 or w2.ndim != 2:
            raise ValueError("matrices were expected")
        delta = torch.kron(w1, w2)
    return scale_of(parts) * delta


def _kronecker_factors(p: Parts) -> tuple[Tensor, Tensor]:
    w1 = p["lokr_w1"] if "lokr_w1" in p else _factors(p, "lokr_w1", "")
    w2 = p["lokr_w2"] if "lokr_w2" in p else _factors(p, "lokr_w2", "lokr_t2")
    return w1, w2.contiguous()  # torch.kron of a view raises RuntimeError


def _without_core(parts: Parts) -> dict[str, Tensor]:
    """A LoKr with its two matrices multiplied out: for one with a core ComfyUI calls torch.kron of a view."""
    others = {part: tensor for part, tensor in parts.items() if part not in KINDS["LoKr"] and part != "alpha"}
    w1, w2 = _kronecker_factors({part: tensor.float() for part, tensor in parts.items()})
    return others | {"lokr_w1": w1, "lokr_w2": scale_of(parts) * w2}


def _factors(p: Parts, name: str, core: str) -> Tensor:
    """A product of two matrices, or Tucker's of a core and two."""
    a, b = p[f"{name}_a"], p[f"{name}_b"]
    return torch.einsum("ijkl,jr,ip->prkl", p[core], b, a) if core in p else a @ b


def split(parts: Parts, n: int) -> list[dict[str, Tensor]] | None:
    """The adapter of a fused layer as those of its n native layers; None where that cannot be."""
    if n == 1:
        return [dict(parts)]
    if any(part.startswith("lokr") for part in parts):  # a Kronecker product does not split into such
        if _missing("LoKr", parts):
            return None
        parts = {"diff": change(parts)}
    apart = ("oft_blocks", "rescale", "lora_mid.weight", "hada_t1", "hada_t2", *GLORA)
    of_columns = "dora_scale" in parts and parts["dora_scale"].shape[:1] == (1,)
    if of_columns or any(part in apart for part in parts):
        return None
    own: list[dict[str, Tensor]] = [{} for _ in range(n)]
    for part, tensor in parts.items():
        rows = part in CUT_ALONG_ROWS and tensor.ndim > 0 and tensor.shape[0] % n == 0
        for i, piece in enumerate(tensor.chunk(n) if rows and tensor.shape[0] else [tensor] * n):
            own[i][part] = piece.contiguous()
    return own


def is_zero(parts: Parts) -> bool:
    """Whether a LoRA, LoHa or LoKr has a factor that is zero throughout, as before its training."""
    factors = (*LORA, *LOHA, *(name for name in KINDS["LoKr"] if name != "lokr_t2"))
    return "dora_scale" not in parts and any(name in parts and not parts[name].float().any() for name in factors)
