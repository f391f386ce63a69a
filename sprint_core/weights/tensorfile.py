"""Tensor files on disk: read every container the published weights come in, write one.

Reading is memory-mapped and never executes code from a file; writing is atomic.
"""

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import disk, messages
from . import folder_files, foreign_files, pickles
from .folder_files import SAFETENSORS, WEIGHT_SUFFIXES
from .folder_files import is_shard as is_shard


class CheckpointError(ValueError):
    """A file that cannot be used; the message, always readable, names it, what is wrong and what to do."""

    def __init__(self, message: object):
        super().__init__(messages.readable(message))


@dataclass
class TensorFile:
    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


# Tensors of a safetensors file, read in a host's own way; None where it has none. Other files never come to it.
Opener = Callable[[Path], Mapping[str, Tensor] | None]


def read(path: str | os.PathLike, average: bool = False, opener: Opener | None = None) -> TensorFile:
    """Tensors of a file, or of a folder with one weight file or an index of shards. Raises CheckpointError.

    average: of a training save, the moving average of the weights.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, average, opener)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    _require_utf8(path)
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    if content := foreign_files.content(path):
        raise CheckpointError(f"{path}: this is {content}")
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise CheckpointError(f"{path}: unknown file type; expected one of {', '.join(WEIGHT_SUFFIXES)}")
    named_safetensors = path.suffix.lower() in SAFETENSORS
    if foreign_files.is_pickle(path) if named_safetensors else not foreign_files.is_safetensors(path):
        return TensorFile(path, _read_pickle(path, average))
    if average:
        raise CheckpointError(f"{path}: a safetensors file has one set of weights, no moving average beside it")
    return _read_safetensors(path, opener)


def _require_utf8(path: Path) -> None:
    """Refuse what neither PyTorch nor safetensors can open, whatever is in it. Raises CheckpointError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: its name, or a folder's above it, is not UTF-8; rename it") from None


def _read_safetensors(path: Path, opener: Opener | None) -> TensorFile:
    try:
        with safe_open(path, framework="pt") as file:
            opened = opener and opener(path)
            tensors = {k: file.get_tensor(k) for k in file.keys()} if opened is None else dict(opened)  # noqa: SIM118
            return TensorFile(path, tensors, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from None


def _why_unreadable(path: Path, error: SafetensorError) -> str:
    """Whether a safetensors file ends too soon, or is something else."""
    if not foreign_files.is_safetensors(path):
        return "not a safetensors file, whatever its name says; choose another file"
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
        header = file.read(header_bytes - 8)
    whole_bytes = header_bytes
    if size_bytes >= header_bytes:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            entries = json.loads(header).items()
            whole_bytes += max(entry["data_offsets"][1] for name, entry in entries if name != "__metadata__")
    if size_bytes < whole_bytes:
        return f"truncated, {size_bytes:,} of {whole_bytes:,} bytes are there; download it again"
    return f"its header is damaged ({error}); take another copy of it"


def _read_pickle(path: Path, average: bool) -> dict[str, Tensor]:
    try:
        return pickles.read(path, average)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_folder(folder: Path, average: bool, opener: Opener | None) -> TensorFile:
    try:
        names = folder_files.files_of(folder)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if len(names) == 1:
        return read(names[0], average, opener)
    shards = [read(name, average, opener) for name in names]
    return TensorFile(folder, united(folder, [shard.tensors for shard in shards]), shards[0].metadata)


def united(path: Path, parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts; one may be there twice, if both are the same. Raises CheckpointError."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            if (other := tensors.setdefault(name, tensor)) is not tensor and not _same(other, tensor):
                raise CheckpointError(
                    f"{path}: it holds {name} twice, with different numbers; take another copy of it, without the "
                    "files of other versions"
                )
    return tensors


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether all bytes are the same, NaN's too."""
    return (one.shape, one.dtype) == (other.shape, other.dtype) and hash_of({"": one}) == hash_of({"": other})


def unmap(tensors: Iterable[Tensor]) -> None:
    """Let the system have the memory of mapped tensors that are not needed soon; using them maps the file's pages anew.

    Only whole pages that come from a file and were never written to: Linux tells which in /proc/self/pagemap. All
    other tensors, and other systems', are left as they are, so that no change to a weight can be lost.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError), open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for tensor in tensors:
            first, end = -(-tensor.data_ptr() // mmap.PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
            if tensor.device.type == "cpu" and first < end and _of_file(pagemap.fileno(), first, end - first):
                start, size = first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _of_file(pagemap: int, first: int, count: int) -> bool:
    """Whether all of these pages are a file's: one that was written to is a copy of the process's own."""
    for page_count in (1, count):  # the first tells of nearly all tensors that are in no file
        entries = os.pread(pagemap, 8 * page_count, 8 * first)
        pages = torch.frombuffer(bytearray(entries), dtype=torch.int64) if entries else torch.empty(0)
        if len(pages) != page_count:
            return False
        # Bit 63 is the sign.
        present = pages < 0
        swapped = pages & 1 << 62 != 0
        of_file = pages & 1 << 61 != 0
        if (swapped | (present & ~of_file)).any():
            return False
    return True


def read_json(path: Path) -> dict:
    """A JSON object. Raises CheckpointError."""
    try:
        data = disk.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def write(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all. Raises OSError, CheckpointError for a name that is not UTF-8."""
    _require_utf8(Path(path))
    with disk.replacing(path) as temporary:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(tensors, temporary, {"format": "pt", **metadata})
        _sort_metadata(temporary)
        temporary.chmod(0o644)  # the library makes files that only their owner can read


def write_pickle(path: str | os.PathLike, data: object) -> None:
    """Write what `torch.load` reads, whole or not at all. Raises OSError."""
    with disk.replacing(path) as temporary:
        try:
            torch.save(data, temporary)
        except RuntimeError as error:  # of its zip writer, on a full disk
            raise OSError(str(error).partition("\n")[0]) from error


def _sort_metadata(path: Path) -> None:
    """Make equal content equal bytes: the library writes metadata in an order that differs every time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Identifies tensors by their names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
