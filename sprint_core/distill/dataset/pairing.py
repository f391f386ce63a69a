"""Which caption belongs to which image, in a folder or in a shard: both are files by name.

    photo.jpg: photo.txt, .caption, .text, .prompt or .json, or photo.jpg.txt; else the row of a table in that folder or
above. Endings may be in upper case. Text is decoded by its byte order mark, else as strict UTF-8.
"""

import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from PIL import Image

from ... import disk, messages
from ...images.files import READ as IMAGES

log = messages.logger(__name__)

NOT_READ = ("heic", "heif", "jxl", "jp2", "psd", "svg", "exr", "hdr", "dng", "cr2", "cr3", "nef", "arw")
SIDECARS = ("txt", "caption", "text", "prompt", "json")  # in order of preference
CAPTIONS = ("caption", "text", "prompt", "txt", "json")  # keys and columns, in order of preference
TABLES = ("captions.json", "metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.csv", "metadata.parquet")


class Stored(Protocol):
    """A file, wherever it lies."""

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Item:
    """An image that is not read yet; `load` raises anything if it is damaged. without: why no caption, if known."""

    name: str
    caption: str
    load: Callable[[], Image.Image]
    without: str = ""


def split(name: str) -> tuple[str, str]:
    """A path without its ending, and that in lower case: ("a/photo.v1", "jpg")."""
    stem, ending = posixpath.splitext(name)
    return stem, ending[1:].lower()


def paired(files: Mapping[str, Stored], where: str) -> Iterator[Item]:
    """The images among files, in their order, with captions. where: of the files, for messages.

    Raises ValueError for a damaged table.
    """
    captions: dict[str, dict[str, Stored]] = {}
    for name, file in files.items():
        stem, ending = split(name)
        if ending in SIDECARS and posixpath.basename(name).lower() not in TABLES:
            captions.setdefault(stem, {}).setdefault(ending, file)
    table = _tables(files, where)
    for name, file in files.items():
        stem, ending = split(name)
        if ending in NOT_READ:
            yield Item(name, "", partial(opened, file), f"of a kind that is not read: {ending}")
        elif ending in IMAGES:
            own, without = _own_caption({**captions.get(name, {}), **captions.get(stem, {})})
            listed, why_not = checked(table.get(_key(name), ""), "its row in a table")
            yield Item(name, own or listed, partial(opened, file), "" if own or listed else without or why_not)


def opened(file: Stored) -> Image.Image:
    return Image.open(io.BytesIO(file.read_bytes()))


def checked(caption: str, where: str) -> tuple[str, str]:
    """(caption, ""), or ("", why) if it cannot be one."""
    return (caption, "") if disk.is_text(caption) else ("", f"{where} is {disk.NOT_TEXT}")


def caption_of(value: Any) -> str:
    """The caption in what is stored for one: a text, the first of several, or one under a known key."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        return next(filter(None, (caption_of(value.get(key)) for key in CAPTIONS)), "")
    return caption_of(value[0]) if isinstance(value, list) and value else ""


def parsed(text: str) -> Any:
    """JSON, or None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def lenient(data: bytes) -> str:
    """Text in which UTF-8's wrong bytes are lone surrogates, which `checked` finds: other rows may be right."""
    try:
        return disk.decoded(data, "surrogateescape")
    except UnicodeDecodeError:  # UTF-16 and 32 have no such escape
        return "\0"


def _own_caption(files: Mapping[str, Stored]) -> tuple[str, str]:
    """The caption in the image's own files, by their endings; and why there is none, if that is known."""
    reasons = []
    for ending in (ending for ending in SIDECARS if ending in files):
        where = f"its .{ending}"
        try:
            text = lenient(files[ending].read_bytes())
        except OSError as error:
            reasons += [f"{where} cannot be read: {error.strerror or error}"]
            continue
        # JSON may hold lone surrogates that its text does not.
        caption, why_not = checked(caption_of(parsed(text)) if ending == "json" else text.strip(), where)
        if caption:
            return caption, ""
        reasons += [why_not or checked(text, where)[1]]
    return "", next(filter(None, reasons), "")


# --- tables -----------------------------------------------------------------------------------------


def _key(name: str) -> str:
    """One spelling of a path: tables may say ./a.jpg, sub\\a.jpg, or ä in two characters."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def _tables(files: Mapping[str, Stored], where: str) -> dict[str, str]:
    """Captions by the files' names, from all tables; those of folders further down win. Raises ValueError."""
    captions: dict[str, str] = {}
    for name in sorted(files, key=lambda name: (name.count("/"), name)):
        folder, base = posixpath.split(name)
        if base.lower() in TABLES:
            data, ending = files[name].read_bytes(), split(base)[1]
            text = "" if ending == "parquet" else lenient(data)
            if "\0" in text:
                log.warning("%s/%s: left out: it is %s", where, name, disk.NOT_TEXT)
                continue
            table = f"{where}/{name}"
            rows = _rows_of_parquet(data, table) if ending == "parquet" else _rows(text, ending, table)
            of_table = {_key(posixpath.join(folder, file)): caption_of(row) for file, row in rows}
            captions |= {file: caption for file, caption in of_table.items() if caption}
    return captions


def _rows(text: str, ending: str, table: str) -> Iterator[tuple[str, Any]]:
    """File names and what a table says of them. Raises ValueError."""
    if ending == "json":
        document = parsed(text)
        if not isinstance(document, dict):
            reason = "not readable as JSON" if document is None else "expected a JSON object, {file name: caption}"
            raise ValueError(f"{table}: {reason}")
        yield from document.items()
        return
    # Lines end at \n alone: what Python takes for an end, too, may stand in a caption.
    rows = csv.DictReader(io.StringIO(text, newline="")) if ending == "csv" else map(_row, text.split("\n"))
    for number, row in enumerate(rows, 2 if ending == "csv" else 1):
        if row != {}:
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise ValueError(f'{table}, line {number}: expected {{"file_name": ..., "text": ...}}')
            yield row["file_name"], row


def _row(line: str) -> Any:
    return parsed(line) if line.strip() else {}


def _rows_of_parquet(data: bytes, table: str) -> Iterator[tuple[str, Any]]:
    """The same of a parquet file, none without a column file_name. Raises ValueError."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{table}: needs pyarrow: pip install datasets") from None
    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except ValueError as error:  # Arrow's and Unicode's
        raise ValueError(f"{table}: {error}") from None
    yield from ((row["file_name"], row) for row in rows if isinstance(row.get("file_name"), str))
