"""Images for the official benchmarks, GenEval and MJHQ-30K, whose own tools then judge them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from .. import disk
from ..images.files import save
from ..weights import tensorfile
from .scoring import Painter

GENEVAL_SAMPLES = 4  # of each prompt, from seeds 0 to 3, as its authors ask for


def geneval_jobs(path: Path, out: Path) -> Iterator[tuple[str, int, Path]]:
    """(prompt, seed, file) for GenEval: 00000/samples/0000.png and so on, beside each prompt's metadata.jsonl."""
    try:
        lines = disk.read_text(path).split("\n")  # what splits lines elsewhere may stand in a prompt
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for i, (number, line) in enumerate(rows):
        text = _prompt_of(line, f"{path}, line {number}")
        folder = out / f"{i:05d}"
        with disk.replacing(folder / "metadata.jsonl") as temporary:
            temporary.write_bytes(line.strip().encode())
        for j in range(GENEVAL_SAMPLES):
            yield text, j, folder / "samples" / f"{j:04d}.png"


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f"{where}: no prompt, as GenEval's evaluation_metadata.jsonl has on every line")
    return _checked(row["prompt"], where)


def _checked(prompt: str, where: str) -> str:
    """A prompt that can be tokenised. Raises ValueError."""
    if not disk.is_text(prompt):
        raise ValueError(f"{where}: its prompt holds half of a surrogate pair, which is no character; correct it")
    return prompt


def mjhq_jobs(path: Path, out: Path) -> Iterator[tuple[str, int, Path]]:
    """(prompt, seed, file) for MJHQ-30K: category/id.png, the folders whose FID is taken."""
    for i, (name, entry) in enumerate(tensorfile.read_json(path).items()):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("prompt", "category")):
            raise ValueError(f"{path}: {name} has no prompt and category, as MJHQ-30K's meta_data.json has")
        if not (disk.is_name(name) and disk.is_name(entry["category"])):
            raise ValueError(f"{path}: {name!r} of {entry['category']!r} cannot name a file in a folder; correct it")
        yield _checked(entry["prompt"], f"{path}: {name}"), i, out / entry["category"] / f"{name}.png"


def paint_files(paint: Painter, jobs: Sequence[tuple[str, int, Path]], seed: int) -> int:
    """Paint what is missing, one image at a time; returns how many."""
    missing = [job for job in jobs if not job[2].is_file()]
    for text, offset, path in tqdm(missing, unit="images"):
        save(paint([text], [seed + offset]), [path])
    return len(missing)
