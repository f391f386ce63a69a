"""What a file is that holds no tensors, or none that a network here could run, in words, with what to do.

Told by its first bytes (a web page, a pointer of Git LFS, GGUF ...), and by its tensors' names and types (weights that
other tools have quantised).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

FULL = "take the bf16, fp16 or fp32 version of this model"
FIRST_BYTES = (
    (
        rb"version https://git-lfs\.github\.com",
        "a pointer of Git LFS, not the file itself; run git lfs pull in its repository, or fetch it with hf download",
    ),
    (rb"(?:\.\./)*/?(?:\.git/)?annex/objects/", "a pointer of git-annex, not the file itself; run git annex get on it"),
    (
        rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|\?xml|!--)",
        "a web page, not a safetensors or PyTorch file; download the file itself from its model page, logged in if it "
        "is gated, or with hf download",
    ),
    (rb"GGUF", f"a GGUF file, quantised for llama.cpp and ComfyUI-GGUF, which this pack does not read; {FULL}"),
    (rb"GGML|ggjt|lmgg", f"a GGML file, quantised for llama.cpp, which this pack does not read; {FULL}"),
    (rb"Rar!|7z\xbc\xaf|\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "an archive; unpack it, and choose what is in it"),
    (rb"\x89HDF\r\n", "an HDF5 file, perhaps of Keras; take the safetensors or .pth version of this model"),
    (rb"\x89PNG|\xff\xd8\xff|RIFF|GIF8", "an image, not weights; choose another file"),
)
TEXT = re.compile(rb"(?:\xef\xbb\xbf)?[\t\r\n -~]{8,}")
# Names that other tools' quantised weights have, and nobody else's.
QUANTISED = (
    (r"\.quant_state\.bitsandbytes__|\.weight\.(?:absmax|quant_map|nested_absmax)\Z|\.SCB\Z", "bitsandbytes"),
    (r"\.wscales\Z|\.wtscale\Z|\.smooth_factor(?:_orig)?\Z|\.proj_down\Z", "SVDQuant (nunchaku)"),
    (r"\.weight\._(?:data|scale|shift|scale_shift)\Z|\.weight_qtype\Z", "optimum-quanto"),
    (r"\.qzeros\Z|\.g_idx\Z|\.qweight\Z", "GPTQ or AWQ"),
    (r"\.weight_packed\Z|\.weight_zero_point\Z", "compressed-tensors"),
    (r"\.(?:tensor_impl|layout_tensor)\b|\.weight:_data\Z", "torchao"),
)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
INTEGERS = (*UNSIGNED, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def content(path: Path) -> str | None:
    """What a file is by its first bytes, and what to do; None for tensors, and what nobody knows. Raises OSError."""
    if is_safetensors(path):  # whose first bytes are a number
        return None
    with path.open("rb") as file:
        first = file.read(64)
    for pattern, words in FIRST_BYTES:
        if re.match(pattern, first, re.IGNORECASE):
            return words
    if TEXT.fullmatch(first):
        return (
            "a text, not weights, perhaps what a server answered; open it to see, and fetch the file with hf download"
        )
    if path.suffix.lower() == ".bin" and path.with_suffix(".xml").is_file():
        return f"a model of OpenVINO, which this pack does not read; {FULL}"
    return None


def is_pickle(path: Path) -> bool:
    """Whether this is a PyTorch file, whatever its name says."""
    with path.open("rb") as file:
        first = file.read(8)
    return first.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


def is_safetensors(path: Path) -> bool:
    """Whether a header of JSON follows its length, whatever the name says."""
    with path.open("rb") as file:
        first = file.read(9)
    return len(first) == 9 and first[8:] == b"{" and int.from_bytes(first[:8], "little") < 100_000_000


def quantised_by(names: Iterable[str]) -> str | None:
    """The tool that quantised the weights of these names, if it is one whose files cannot be read here."""
    names = list(names)
    return next((tool for pattern, tool in QUANTISED if any(re.search(pattern, name) for name in names)), None)


def whole_numbers(tensors: Mapping[str, Tensor]) -> str | None:
    """The type of weights that are whole numbers without a scale; ComfyUI's own formats describe each layer."""
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        described = f"{layer}.comfy_quant" in tensors
        if name.endswith((".weight", ".bias")) and tensor.dtype in INTEGERS and not described:
            return str(tensor.dtype).removeprefix("torch.")
    return None


def foreign_type(tensors: Mapping[str, Tensor]) -> str | None:
    """The type of weights that would lose their phase or their sign: complex numbers, and bare exponents."""
    for name, tensor in tensors.items():
        exponents = str(tensor.dtype) == "torch.float8_e8m0fnu"  # which not every torch has
        if name.endswith((".weight", ".bias")) and (tensor.is_complex() or exponents):
            return str(tensor.dtype).removeprefix("torch.")
    return None
