"""Three ways to write a shard, all of which `sprint_core.distill --data` reads.

    tar      KEY.jpg, KEY.txt, KEY.json of each row: webdataset
    parquet  a row each, with a column `image` that `datasets` decodes
    folder   the same files as in a tar, and metadata.jsonl: `datasets`' imagefolder

The bytes follow from the images alone: no times, no names of users.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .rows import PARQUET

MODE = 0o644


class Writer(Protocol):
    """A shard on its way: `add` images in their order, then `close`."""

    def __init__(self, path: Path, image_format: str): ...
    def add(self, key: str, files: Mapping[str, bytes]) -> None: ...
    def close(self) -> None: ...


class TarWriter:
    """Webdataset: the files of a row lie next to each other."""

    def __init__(self, path: Path, image_format: str):
        self._file = open(path, "wb")  # noqa: SIM115  # `close` closes it
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, key: str, files: Mapping[str, bytes]) -> None:
        for ending, data in files.items():
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size, member.mode = len(data), MODE
            self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        try:
            self._tar.close()
        finally:
            self._file.close()


class FolderWriter:
    """Loose files, and the captions once more as `datasets` wants them."""

    def __init__(self, path: Path, image_format: str):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        self._path, self._image_format, self._lines = path, image_format, []

    def add(self, key: str, files: Mapping[str, bytes]) -> None:
        for ending, data in files.items():
            (self._path / f"{key}.{ending}").write_bytes(data)
        about = {"file_name": f"{key}.{self._image_format}", **json.loads(files["json"])}
        self._lines.append(json.dumps(about, ensure_ascii=False) + "\n")

    def close(self) -> None:
        (self._path / "metadata.jsonl").write_bytes("".join(self._lines).encode())


TYPES = {
    **dict.fromkeys(("id", "prompt", "negative", "image_from", "control_from", "model", "version"), "string"),
    **dict.fromkeys(("seed", "steps", "width", "height"), "int64"),
    "guidance": "float64",
}


class ParquetWriter:
    """A table; its description tells `datasets` which column holds images. Raises ValueError without pyarrow."""

    def __init__(self, path: Path, image_format: str):
        arrow, parquet = pyarrow()
        types = {name: getattr(arrow, kind)() for name, kind in TYPES.items()}
        image = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
        features = {name: {"dtype": kind, "_type": "Value"} for name, kind in TYPES.items()}
        about = json.dumps({"info": {"features": {"image": {"_type": "Image"}, **features}}})
        self._schema = arrow.schema([("image", image), *types.items()], metadata={"huggingface": about})
        self._table, self._image_format = parquet.ParquetWriter(path, self._schema), image_format
        self._rows: list[dict[str, Any]] = []

    def add(self, key: str, files: Mapping[str, bytes]) -> None:
        about = json.loads(files["json"])
        image = {"bytes": files[self._image_format], "path": f"{key}.{self._image_format}"}
        self._rows.append({name: about.get(name) for name in TYPES} | {"image": image})
        if len(self._rows) == ROWS_OF_A_GROUP:
            self._flush()

    def close(self) -> None:
        try:
            self._flush()
        finally:
            self._table.close()

    def _flush(self) -> None:
        arrow, _ = pyarrow()
        if self._rows:
            self._table.write_table(arrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


ROWS_OF_A_GROUP = 100  # which datasets' viewer and streaming read at once
WRITERS: dict[str, type[Writer]] = {"tar": TarWriter, "parquet": ParquetWriter, "folder": FolderWriter}
ENDINGS = {"tar": ".tar", "parquet": ".parquet", "folder": ""}


def pyarrow() -> tuple[Any, Any]:
    """pyarrow and its parquet module. Raises ValueError where it is missing."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"--format parquet: {PARQUET}") from None
    return pyarrow, parquet
