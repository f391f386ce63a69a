"""The user's captioned images, from what they have: a folder, parquet files or webdataset shards.

    folder, parquet or .tar -> Items (name, caption, load) -> cropped: [3, h, w]

Nothing is read before it is needed, so that there may be more images than fit in memory. pairing.py says where
captions are.
"""

import collections
import glob
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ... import messages
from ...images.files import rgb
from ...images.sizes import nearest
from . import shards
from .pairing import CAPTIONS, IMAGES, NOT_READ, Item, Stored, caption_of, checked, lenient, paired, parsed, split

log = messages.logger(__name__)

COLUMNS = ("image", *IMAGES)  # that may hold images
WHERE_CAPTIONS_BELONG = (
    "a caption belongs in NAME.txt, NAME.caption or NAME.json beside NAME.jpg, in a folder as in a .tar shard, or for "
    'all images in captions.json ({file name: caption}), metadata.jsonl (a {"file_name": ..., "text": ...} on each '
    f"line) or metadata.csv; in parquet files it is a column of the name {', '.join(CAPTIONS)}"
)
NAMES_A_LINE = 20  # in the lines that follow it


def captioned(path: Path) -> Iterator[Item]:
    """The images of a folder, however deep, or of one file, always in the same order.

    Of a folder's .tar shards (webdataset), then its loose images, then its parquet files. Images without a caption
    are left out, counted and named in the log. Raises ValueError at once if nothing is there, or nothing has a caption;
    later for a damaged shard.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    files = _files(path)
    of_kind = {kind: [name for name in files if split(name)[1] == kind] for kind in ("tar", "parquet")}
    images = [name for name in files if split(name)[1] in IMAGES + NOT_READ]
    tables = [folder / name for name in of_kind["parquet"]]
    if images or of_kind["tar"]:
        tables = [table for table in tables if _has_images(table)]  # tools leave tables of what they fetched, too
    if not (images or of_kind["tar"] or tables):
        raise ValueError(f"{path}: no images ({', '.join(IMAGES)}), parquet files or .tar shards")
    loose = paired(_beside(path) if path.is_file() else files, str(folder)) if images else ()
    loose = (item for item in loose if item.name in files)
    items = itertools.chain(_of_shards(folder, of_kind["tar"]), loose, _of_tables(folder, tables))
    begun = _begun(_with_captions(path, items))
    return begun if of_kind["tar"] else _Counted(begun, len(images) + sum(map(_row_count, tables)))


def cropped(image: Image.Image, among: Sequence[tuple[int, int]]) -> Tensor:
    """[3, h, w] in [-1, 1] of the (w, h) whose aspect ratio is nearest: upright, over white, scaled to cover it; its
    middle."""
    image = rgb(image)
    width, height = nearest(*image.size, among)
    across, down = min(image.width, image.height * width / height), min(image.height, image.width * height / width)
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (left, top, left + across, top + down)
    pixels = np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
    return torch.from_numpy(pixels).movedim(-1, 0).float().div_(127.5).sub_(1.0).contiguous()


def _files(path: Path) -> dict[str, Stored]:
    """Files by name, sorted; hidden ones are other programs' own."""
    if path.is_file():
        return {path.name: path}
    files = ((file.relative_to(path), file) for file in sorted(path.rglob("*"), key=Path.as_posix))
    return {
        name.as_posix(): file
        for name, file in files
        if not any(part.startswith(".") for part in name.parts) and not file.is_dir()
    }


def _beside(path: Path) -> dict[str, Stored]:
    """The files of an image's own folder, for its caption."""
    return {file.name: file for file in sorted(path.parent.iterdir(), key=Path.as_posix) if not file.is_dir()}


def _with_captions(path: Path, items: Iterable[Item]) -> Iterator[Item]:
    """Those items that have one; the others are logged at the end. Raises ValueError if none has."""
    count, without, unusable = 0, [], []
    for item in items:
        count += 1
        if item.caption:
            yield item
        elif item.without:
            unusable.append(f"{item.name} ({item.without})")
        else:
            without.append(item.name)
    if not count:
        raise ValueError(f"{path}: no images in it")
    if unusable and len(unusable) + len(without) == count:
        raise ValueError(f"{path}: none of {count} images can be used: {messages.listed([*unusable, *without])}")
    if len(without) == count:
        raise ValueError(f"{path}: {count} images, but not one has a caption: {WHERE_CAPTIONS_BELONG}")
    name_left_out(f"{path}: {len(without)} of {count} images have no caption", without)
    name_left_out(f"{path}: {len(unusable)} of {count} images are left out", unusable)


def name_left_out(sentence: str, names: Sequence[str]) -> None:
    """A warning with the first few names, and lines with the rest, so that each is named once."""
    if names:
        log.warning("%s: %s", sentence, messages.listed(names))
    for start in range(messages.LISTED, len(names), NAMES_A_LINE):
        log.info("... and %s", ", ".join(names[start : start + NAMES_A_LINE]))


# --- webdataset shards and parquet files ------------------------------------------------------------


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


def _of_shards(folder: Path, names: Sequence[str]) -> Iterator[Item]:
    """Items of all images in shards, named by their keys where these tell them apart. Raises ValueError."""
    for shard in names:
        members, wrong = shards.members(folder / shard)
        images = [name for name in members if split(name)[1] in IMAGES + NOT_READ]
        keys = collections.Counter(split(name)[0] for name in images)
        for item in paired(members, str(folder / shard)):
            key = split(item.name)[0]
            yield Item(f"{shard}/{item.name if keys[key] > 1 else key}", item.caption, item.load, item.without)
        if wrong:
            raise ValueError(f"{folder / shard}: {wrong}")


def _of_tables(folder: Path, tables: Sequence[Path]) -> Iterator[Item]:
    """Items of all rows with an image, file by file. Raises ValueError."""
    for file in tables:
        try:
            for number, row in enumerate(_rows(file)):
                image = next((row[column] for column in COLUMNS if row.get(column)), None)
                if image is not None:
                    caption, without = _caption(row)
                    name = f"{file.relative_to(folder).as_posix()}/row {number}"
                    yield Item(name, caption, partial(_open, image), without)
        except Exception as error:  # Arrow has its own for damaged files
            raise ValueError(f"{file}: {error}") from error


def _caption(row: Mapping[str, Any]) -> tuple[str, str]:
    """The caption of a row, or why it has none. Texts are bytes in it."""
    texts = {name: lenient(value) if isinstance(value, bytes) else value for name, value in row.items()}
    if isinstance(texts.get("json"), str):
        texts["json"] = parsed(texts["json"])
    return checked(caption_of({name: texts.get(name) for name in CAPTIONS}), "its caption")


def _rows(file: Path) -> Iterator[dict]:
    """Rows of a parquet file, images in them as {"bytes", "path"}, texts as bytes. Raises ValueError."""
    datasets = _datasets()
    # Its name is escaped because the library takes it for a pattern.
    data = {"train": [glob.escape(str(file.resolve()))]}
    rows = datasets.load_dataset("parquet", data_files=data, split="train", streaming=True)
    names = rows.column_names
    for what, columns in {"image": COLUMNS, "caption": CAPTIONS}.items():
        if not set(columns) & set(names):
            raise ValueError(f"no column of the {what}s ({', '.join(columns)}) among {', '.join(names)}")
    for name in set(COLUMNS) & set(names):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    for name in set(CAPTIONS) & set(names):
        if getattr(rows.features[name], "dtype", None) in ("string", "large_string"):
            # One wrong byte in a string would end the reading of them all.
            rows = rows.cast_column(name, datasets.Value("binary"))
    yield from rows.select_columns([name for name in names if name in (*COLUMNS, *CAPTIONS)])


def _has_images(file: Path) -> bool:
    """Whether a parquet file has a column of them. Raises ValueError."""
    return bool(set(COLUMNS) & set(_metadata(file).schema.to_arrow_schema().names))


def _row_count(file: Path) -> int:
    """Of a parquet file. Raises ValueError."""
    return _metadata(file).num_rows


def _metadata(file: Path) -> Any:
    _datasets()
    from pyarrow import parquet  # what datasets reads with

    try:
        return parquet.read_metadata(file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _datasets() -> Any:
    """Hugging Face's library. Raises ValueError if it is missing."""
    try:
        import datasets
        from datasets import Json  # noqa: F401  # from 4.7 on
    except ImportError:
        raise ValueError(
            "parquet files are read with Hugging Face datasets, 4.7 or newer: pip install datasets"
        ) from None
    return datasets


def _open(stored: Mapping[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"])
