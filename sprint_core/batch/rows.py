"""The rows of a file of prompts: what each says, and what is wrong with the file before anything is made of it.

    .txt      a prompt on each line
    .jsonl    an object on each line, with the columns as keys
    .csv      columns, whose names stand in the first line
    .parquet  columns; read with pyarrow

Blank lines are left out. Whether an image can be made of a row, `generate` finds out.
"""

import array
import csv
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .. import disk, messages

COLUMNS = ("prompt", "id", "seed", "steps", "guidance", "width", "height", "negative", "image", "control")
KINDS = ("txt", "jsonl", "csv", "parquet")
PARQUET = "parquet files need pyarrow; install it with: pip install --group parquet"
MOST = 2**63  # seeds and sizes fit into a column of 64 bits
RESERVED = frozenset('./\\:*?"<>|')  # a shard's readers cut a name at its first dot
LONGEST_ID = 200  # bytes; a file name with its ending has 255


@dataclass(frozen=True)
class Row:
    """One image to make. number: from 0, in the file's order; steps, width, height: None for the model's own."""

    number: int
    id: str
    prompt: str
    seed: int
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    negative: str | None = None
    image: str | None = None
    control: str | None = None


@dataclass(frozen=True)
class Defaults:
    """What rows that do not say have. seed: of the first row; row n has seed + n."""

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    negative: str | None = None


def read(path: Path, defaults: Defaults) -> Iterator[Row]:
    """The rows of a file, in its order. Raises ValueError, which names the row, and OSError."""
    seen: dict[str, str] = {}
    count = 0
    for number, (place, columns) in enumerate(_lines(path)):
        row = _row(number, columns, defaults, f"{path}, {place}")
        if row.id in seen:
            raise ValueError(f"{path}, {place}: the id {row.id} is also that of {seen[row.id]}; each needs its own")
        seen[row.id] = place
        count += 1
        yield row
    if not count:
        raise ValueError(f"{path}: no prompts in it")


def _row(number: int, columns: Mapping[str, Any], defaults: Defaults, where: str) -> Row:
    """Raises ValueError for what is not of a column's type."""
    values = {name: value for name, value in columns.items() if value is not None and value != ""}
    try:
        prompt = _text(values.pop("prompt", ""))
        if not prompt.strip():
            raise ValueError("no prompt")
        parsed = {name: READERS[name](value) for name, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    usual = asdict(defaults) | {"seed": (defaults.seed + number) % MOST, "id": f"{number:09d}"}
    return Row(number, prompt=prompt, **(usual | parsed))


# --- values -----------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, not {value!r}")
    if not disk.is_text(value):
        raise ValueError(f"its text is {disk.NOT_TEXT}")
    return value


def _named(name: str, read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Errors name the column."""

    def value_of(value: Any) -> Any:
        try:
            return read(value)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{name} is {messages.clipped(repr(value), 60)}: {error}") from None

    return value_of


def _whole(value: Any) -> int:
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value)
    if isinstance(value, float) and value.is_integer():  # as tables with gaps keep whole numbers
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST:
        raise ValueError("expected a whole number from 0")
    return value


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("expected a number")
    return number


def _identifier(value: Any) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)
    if len(text.encode()) > LONGEST_ID or not text.isprintable() or RESERVED & set(text) or text != text.strip():
        raise ValueError(f"it names files: at most {LONGEST_ID} bytes, without dots, slashes and other signs of paths")
    return text


READERS: dict[str, Callable[[Any], Any]] = {
    name: _named(name, read)
    for name, read in {
        "id": _identifier,
        **dict.fromkeys(("seed", "steps", "width", "height"), _whole),
        "guidance": _number,
        **dict.fromkeys(("negative", "image", "control"), _text),
    }.items()
}


# --- files ------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each row stands, such as "line 3", and its columns. Raises ValueError, OSError."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise ValueError(f"{path}: name it .{', .'.join(KINDS[:-1])} or .{KINDS[-1]}, by what it is")
    if path.is_dir() or not path.exists():
        raise ValueError(f"{path}: {'this is a folder; name a file of prompts' if path.is_dir() else 'no such file'}")
    if kind == "parquet":
        return _of_parquet(path)
    try:
        text = disk.read_text(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if kind == "csv":
        return _of_csv(path, text)
    return _of_jsonl(path, text) if kind == "jsonl" else _of_txt(text)


def _of_txt(text: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", {"prompt": line.strip()}


def _of_jsonl(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number}: expected an object such as {{"prompt": "a cat"}}')
        _check_columns(row, f"{path}, line {number}")
        yield f"line {number}", row


def _of_csv(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    reader, line = csv.DictReader(io.StringIO(text, newline=""), strict=True), 1
    try:
        _check_columns([name.strip() for name in reader.fieldnames or ()], f"{path}, line 1")
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        line = reader.line_num + 1
        for row in reader:
            count = sum(value is not None for value in row.values())
            if None in row or count < len(reader.fieldnames):
                raise ValueError(
                    f"{path}, line {line}: not as many values as there are columns "
                    f"({', '.join(reader.fieldnames)}); put those with commas in quotes"
                )
            yield f"line {line}", row
            line = reader.line_num + 1  # a row may have several lines
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not CSV ({error})") from None


def _of_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: {PARQUET}") from None
    try:
        with parquet.ParquetFile(path) as table:
            _check_columns(table.schema_arrow.names, str(path))
            number = 0
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except ArrowException as error:
        raise ValueError(f"{path}: not a parquet file that can be read ({error})") from None


def _check_columns(names: Iterable[str], where: str) -> None:
    """Raises ValueError for a column that nothing reads, and where there is none of prompts."""
    names = list(names)
    if unknown := [name for name in names if name not in COLUMNS]:
        known = ", ".join(COLUMNS)
        raise ValueError(f"{where}: unknown column {messages.listed(unknown)}; there are {known}")
    if "prompt" not in names:
        raise ValueError(f'{where}: no column "prompt", only {messages.listed(names) or "none at all"}')
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: a column stands there twice ({messages.listed(names, 20)})")


# --- millions of them -------------------------------------------------------------------------------


class Spool:
    """Rows in a file without a name, which goes with the process: a million take some 300 MB of disk, 8 of memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as this does
        self._ends = array.array("Q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, row: Row) -> bytes:
        """Keep a row; returns what is kept of it."""
        line = json.dumps([getattr(row, field.name) for field in fields(Row)]).encode()
        self._file.seek(self._ends[-1])
        self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))
        return line

    def rows(self, start: int, stop: int) -> list[Row]:
        """Rows start to stop - 1."""
        stop = min(stop, len(self))
        self._file.seek(self._ends[start])
        lengths = (self._ends[i + 1] - self._ends[i] for i in range(start, stop))
        return [Row(*json.loads(self._file.read(length))) for length in lengths]
