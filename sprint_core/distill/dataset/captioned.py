"""The user's captioned images, from what they have: a folder, parquet files or webdataset shards.

    folder, parquet or .tar -> Items (name, caption, load) -> square: [3, px, px]

Nothing is read before it is needed, so that there may be more images than fit in memory.
"""

import glob
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...images.files import rgb
from ...weights import tensorfile

log = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")  # suffixes of files
COLUMNS = ("image", *IMAGES)  # that may hold images
CAPTIONS = ("caption", "text", "prompt", "txt", "json")  # keys and columns, in order of preference
TABLES = ("captions.json", "metadata.jsonl", "captions.jsonl")
WHERE_CAPTIONS_BELONG = (
    "a caption belongs in NAME.txt or NAME.json beside NAME.jpg, or for all images in captions.json "
    '({file name: caption}) or metadata.jsonl (a {"file_name": ..., "text": ...} on each line); in parquet files '
    f"it is a column, in .tar shards a file, of the name {', '.join(CAPTIONS)}"
)
LISTED = 5  # names in a warning


# --- images and their captions --------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A captioned image that is not read yet; `load` raises anything if it is damaged."""

    name: str
    caption: str
    load: Callable[[], Image.Image]


def captioned(path: Path) -> Iterator[Item]:
    """The images of a folder, however deep, or of one file, always in the same order.

    A folder's .tar shards (webdataset) are read if there are any, else its images, else its parquet files.
    Images without a caption are left out and counted in the log. Raises ValueError at once if nothing is there, or
    nothing has a caption; later for a damaged shard.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    files = _files(path)
    if files["tar"]:
        return _begun(_with_captions(path, _streamed("webdataset", files["tar"])))
    if images := sorted(itertools.chain(*(files[suffix] for suffix in IMAGES)), key=Path.as_posix):
        return _Counted(_begun(_with_captions(path, _in_folder(folder, images))), len(images))
    if files["parquet"]:
        items = _begun(_with_captions(path, _streamed("parquet", files["parquet"])))
        return _Counted(items, sum(map(_row_count, files["parquet"])))
    raise ValueError(f"{path}: no images ({', '.join(IMAGES)}), parquet files or .tar shards")


def square(image: Image.Image, px: int) -> Tensor:
    """[3, px, px] in [-1, 1]: upright, over white, scaled to a shorter side of px, its middle."""
    image = rgb(image)
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    pixels = np.array(image.resize((px, px), Image.Resampling.LANCZOS, box=box))
    return torch.from_numpy(pixels).movedim(-1, 0).float().div_(127.5).sub_(1.0).contiguous()


def _files(path: Path) -> dict[str, list[Path]]:
    """Files by the suffixes that matter, each list sorted; hidden ones are other programs' own."""
    files: dict[str, list[Path]] = {suffix: [] for suffix in (*IMAGES, "tar", "parquet")}
    for file in [path] if path.is_file() else sorted(path.rglob("*"), key=Path.as_posix):
        suffix = file.suffix[1:].lower()
        if suffix in files and not any(part.startswith(".") for part in file.relative_to(path).parts):
            files[suffix].append(file)
    return files


def _with_captions(path: Path, items: Iterable[Item]) -> Iterator[Item]:
    """Those items that have one; the others are logged at the end. Raises ValueError if none has."""
    count, without = 0, []
    for item in items:
        count += 1
        if item.caption:
            yield item
        else:
            without.append(item.name)
    if not count:
        raise ValueError(f"{path}: no images in it")
    if len(without) == count:
        raise ValueError(f"{path}: {count} images, but not one has a caption: {WHERE_CAPTIONS_BELONG}")
    if without:
        log.warning("%s: %d of %d images have no caption: %s", path, len(without), count, listed(without))


def listed(names: Sequence[str]) -> str:
    """The first few of some names, for a warning."""
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def _caption(value: Any) -> str:
    """The caption in what is stored for one: a text, the first of several, or one under a known key."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        return next(filter(None, (_caption(value.get(key)) for key in CAPTIONS)), "")
    return _caption(value[0]) if isinstance(value, list) and value else ""


# --- images in folders ------------------------------------------------------------------------------


def _in_folder(folder: Path, images: Sequence[Path]) -> Iterator[Item]:
    table = _table(folder)
    for image in images:
        name = image.relative_to(folder).as_posix()
        yield Item(name, _own_caption(image) or table.get(name, ""), partial(Image.open, image))


def _own_caption(image: Path) -> str:
    """The caption in the image's own text or JSON file, or ""."""
    text, document = image.with_suffix(".txt"), image.with_suffix(".json")
    caption = _caption(_read(text)) if text.is_file() else ""
    return caption or (_caption(_parsed(_read(document))) if document.is_file() else "")


def _table(folder: Path) -> dict[str, str]:
    """Captions by file name, from the folder's tables. Raises ValueError for a damaged one."""
    captions: dict[str, str] = {}
    for table in (folder / name for name in TABLES):
        if table.is_file():
            rows = tensorfile.read_json(table).items() if table.suffix == ".json" else _lines(table)
            # A table may spell a name its own way: ./a.jpg, or sub\a.jpg.
            captions |= {PurePosixPath(name.replace("\\", "/")).as_posix(): _caption(row) for name, row in rows}
    return captions


def _lines(table: Path) -> Iterator[tuple[str, dict]]:
    """File names and rows of JSON lines. Raises ValueError."""
    for number, line in enumerate(_read(table).splitlines(), 1):
        if line.strip():
            row = _parsed(line)
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise ValueError(f'{table}, line {number}: expected {{"file_name": ..., "text": ...}}')
            yield row["file_name"], row


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig", errors="replace")


def _parsed(text: str) -> Any:
    """JSON, or None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# --- parquet files and webdataset shards ------------------------------------------------------------


class _Counted:
    """Items with the number there are at most, for `operator.length_hint`."""

    def __init__(self, items: Iterator[Item], count: int):
        self.items, self.count = items, count

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> Item:
        return next(self.items)

    def __length_hint__(self) -> int:
        return self.count


def _begun(items: Iterator[Item]) -> Iterator[Item]:
    """The items once the first is found, so that what is wrong with all of them is raised now."""
    return itertools.chain([next(items)], items)


def _streamed(kind: str, files: Sequence[Path]) -> Iterator[Item]:
    """Items of all rows with an image, file by file. Raises ValueError."""
    for file in files:
        try:
            for name, row in _rows(kind, file):
                if isinstance(row.get("json"), str):
                    row["json"] = _parsed(row["json"])
                image = next((row[column] for column in COLUMNS if row.get(column)), None)
                if image is not None:
                    yield Item(f"{file.name}/{name}", _caption(row), partial(_open, image))
        except Exception as error:  # Arrow and tarfile have their own for damaged files
            raise ValueError(f"{file}: {error}") from error


def _rows(kind: str, file: Path) -> Iterator[tuple[str, dict]]:
    """Names and rows of a file, images in them as {"bytes", "path"}. Raises ValueError."""
    datasets = _datasets()
    # Its name is escaped because the library takes it for a pattern.
    data = {"train": [glob.escape(str(file.resolve()))]}
    features = _shard_features(datasets) if kind == "webdataset" else None
    rows = datasets.load_dataset(kind, data_files=data, split="train", streaming=True, features=features)
    names = rows.column_names
    for what, columns in {"image": COLUMNS, "caption": CAPTIONS}.items():
        if not set(columns) & set(names):
            raise ValueError(f"no column of the {what}s ({', '.join(columns)}) among {', '.join(names)}")
    for name in set(COLUMNS) & set(names):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    rows = rows.select_columns([name for name in names if name in ("__key__", *COLUMNS, *CAPTIONS)])
    for number, row in enumerate(rows):
        yield row.get("__key__") or f"row {number}", row


def _shard_features(datasets: Any) -> Any:
    """Columns of a webdataset shard.

    Stated, because the library infers them from a shard's first five samples, which must then all have the
    same files: neither a missing caption nor a .png among .jpg.
    """
    columns = {name: datasets.Image(decode=False) for name in IMAGES}
    columns |= {name: datasets.Value("string") for name in ("__key__", "txt", "text")}
    return datasets.Features({**columns, "json": datasets.Json()})


def _row_count(file: Path) -> int:
    """Of a parquet file. Raises ValueError."""
    from pyarrow import parquet  # what datasets reads with

    try:
        return parquet.read_metadata(file).num_rows
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _datasets() -> Any:
    """Hugging Face's library. Raises ValueError if it is missing."""
    try:
        import datasets
        from datasets import Json  # noqa: F401  # from 4.7 on
    except ImportError:
        raise ValueError(
            "parquet files and .tar shards are read with Hugging Face datasets, 4.7 or newer: pip install datasets"
        ) from None
    return datasets


def _open(stored: Mapping[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"])
