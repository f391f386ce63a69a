"""People's files: text in any encoding that it says it has, and files and folders that are written whole or not at all.

A file is written under a temporary name beside its own, which it then takes in one step: whatever ends the process, and
whenever, leaves the old file or the new one. What such an end leaves of temporary files goes with the next writing.
"""

import codecs
import contextlib
import ctypes
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# UTF-32's little-endian mark begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NOT_TEXT = "neither UTF-8 nor text with a byte order mark"
ABANDONED_SEC = 900  # since anything was written to a temporary file
KEPT_OF_A_NAME = 50  # characters, as a temporary name must not be too long for the system


# --- text -------------------------------------------------------------------------------------------


def decoded(data: bytes, errors: str = "strict") -> str:
    """Text by its byte order mark, else as UTF-8. Raises UnicodeDecodeError, a ValueError.

    errors: "surrogateescape" keeps UTF-8's wrong bytes, of which `is_text` then tells.
    """
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    return data.decode(encoding, errors)


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8 and has no zeros, as UTF-16 without its mark has.

    Lone surrogates stand for wrong bytes, or come from JSON's \\ud83d without its other half.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def is_name(text: str) -> bool:
    """Whether it can name one file or folder, on every system; a path cannot, and so not lead out of a folder."""
    return is_text(text) and text not in ("", ".", "..") and not any(sign in text for sign in "/\\:")


def read_text(path: str | os.PathLike) -> str:
    """`decoded` of a file. Raises OSError, and ValueError without the file's name."""
    try:
        return decoded(Path(path).read_bytes())
    except UnicodeDecodeError:
        raise ValueError(f"{NOT_TEXT}; save it as UTF-8") from None


def read_json(path: str | os.PathLike) -> Any:
    """A JSON document, with or without a byte order mark. Raises OSError, and ValueError without the file's name."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None


# --- writing ----------------------------------------------------------------------------------------


def check_writable(path: str | os.PathLike) -> None:
    """Of a file or folder to be written, checked before the work whose result it is. Raises OSError."""
    path = Path(os.path.realpath(path))
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir():
        raise OSError(f"{path}: {folder} is a file, not a folder; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{path}: nothing can be written to {folder}; choose another place")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file to write, which then takes the path. Raises OSError, which names the path, not that file."""
    path = Path(os.path.realpath(path))  # what a link leads to is replaced, not the link
    temporary = _temporary(path)
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _forget_abandoned(path)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder to fill, which then takes the path, and all that was there goes. Raises OSError.

    Where the system cannot exchange two folders in one step (Windows, some network drives), there is a moment with
    the old one under a temporary name, and none under its own.
    """
    path = Path(os.path.realpath(path))
    temporary = _temporary(path)
    try:
        with naming(path):
            temporary.mkdir(parents=True)
            _forget_abandoned(path)
            yield temporary
            try:
                os.replace(temporary, path)  # nothing is there, or an empty folder
            except OSError:
                if not path.is_dir():
                    raise
                if not _exchange(temporary, path):
                    _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What goes wrong in writing a path is said of that. Raises OSError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise Unwritten(path, error) from error


class Unwritten(OSError):
    """A file or folder that could not be written: which, why, and what to do."""

    def __init__(self, path: Path, error: Exception):
        self.reason = getattr(error, "reason", "") or getattr(error, "strerror", "") or str(error).partition("\n")[0]
        super().__init__(f"{path}: not written ({self.reason}); make room, or choose another place")


def _temporary(path: Path) -> Path:
    """Beside it, so that it can take the path. (Its stem is always the same, because torch writes that into files.)"""
    return path.with_name(f"{_stem(path)}{secrets.token_hex(4)}")


def _stem(path: Path) -> str:
    return f".{path.name[:KEPT_OF_A_NAME]}.tmp-"


def _forget_abandoned(path: Path) -> None:
    """Remove what killed processes left: nobody has written to it for a while."""
    for entry in list(path.parent.iterdir()):
        if entry.name.startswith(_stem(path)):
            with contextlib.suppress(OSError):
                newest = max(file.stat().st_mtime for file in (entry, *entry.rglob("*")))
                if time.time() - newest > ABANDONED_SEC:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, if the system can."""
    if sys.platform not in ("linux", "darwin"):
        return False
    libc = ctypes.CDLL(None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE; macOS's RENAME_SWAP is 2, too
    if hasattr(libc, "renameat2"):
        return libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0
    if hasattr(libc, "renamex_np"):
        return libc.renamex_np(os.fsencode(one), os.fsencode(other), swap) == 0
    return False


def _put_in_place(fresh: Path, path: Path) -> None:
    """Two steps; if the second fails, the first is undone."""
    old = _temporary(path)
    path.rename(old)
    try:
        fresh.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
