"""The folder of a job: which shards are there, who makes which, and what was made in all.

    DIR/train-00003-of-00064.tar      a shard, under its name from the moment that it is whole
    DIR/manifest.json, failures.jsonl once all shards are there
    DIR/.batch/job.json               what the job is; another one's folder is refused
    DIR/.batch/claims                 byte i is locked by the process that makes shard i, until it ends in any way
    DIR/.batch/records/00003.json     rows without an image, seconds, hash of the pixels
    DIR/.batch/train-...              shards in the making

Every shard's name has "train" in it, so that `datasets` reads these files alone.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import disk
from .generate import Failure, by_kind
from .writing import ENDINGS, WRITERS

PAUSE_SEC = 0.5  # between two looks at what others make


@dataclass(frozen=True)
class Folder:
    """A job's folder. shards: of the whole job; format: a key of WRITERS."""

    path: Path
    shards: int
    format: str

    @property
    def hidden(self) -> Path:
        return self.path / ".batch"

    def name(self, shard: int) -> str:
        return f"train-{shard:05d}-of-{self.shards:05d}{ENDINGS[self.format]}"

    def record_file(self, shard: int) -> Path:
        return self.hidden / "records" / f"{shard:05d}.json"

    def is_done(self, shard: int) -> bool:
        """A shard without any image is no file, which some readers cannot open, but a record."""
        if (self.path / self.name(shard)).exists():
            return True
        file = self.record_file(shard)
        return file.is_file() and disk.read_json(file)["images"] == 0

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of these shards that are not there yet."""
        return [shard for shard in numbers if not self.is_done(shard)]

    def record(self, shard: int) -> dict:
        """What was noted of a shard. Raises OSError, ValueError."""
        return disk.read_json(self.record_file(shard))


def begin(path: Path, job: Mapping[str, object], threads: int | None, usual_threads: int) -> dict:
    """Make the folder, or go on in it; returns the job as the first command had it. Raises ValueError, OSError.

    job: what decides the bytes of its files, but for threads: None takes the folder's own, and the usual in a new one.
    """
    job = {**job, "threads": threads or usual_threads}
    file = path / ".batch" / "job.json"
    disk.check_writable(file)
    if not file.exists():
        if path.is_dir() and any(entry.name != ".batch" for entry in path.iterdir()):
            raise ValueError(f"{path}: not empty, and not of this command; choose a new folder")
        with disk.replacing(file) as temporary:
            temporary.write_text(json.dumps(job, indent=1), encoding="utf-8")
            try:
                os.link(temporary, file)  # the first of several processes decides
            except FileExistsError:
                pass
            except OSError:  # no such links on this disk
                os.replace(temporary, file)
            temporary.write_bytes(file.read_bytes())
    try:
        there = disk.read_json(file)
        job["threads"] = threads or there["threads"]
        differing = [name for name in job if there[name] != job[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); choose a new folder") from None
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path}: of another job, whose {name} is {there[name]}, not {job[name]}; choose a new folder, or the same "
            "options and prompts"
        )
    return there


class Claims:
    """Which shards this process makes. The system forgets a claim with the process, however that ends."""

    def __init__(self, folder: Folder):
        folder.hidden.mkdir(parents=True, exist_ok=True)
        self._file = open(folder.hidden / "claims", "ab+")  # noqa: SIM115  # locked while it is open

    def take(self, shard: int) -> bool:
        """Whether nobody else makes it."""
        try:
            _lock(self._file.fileno(), shard)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Give all back."""
        self._file.close()


def _lock(file: int, byte: int) -> None:
    """Lock one byte for this process. Raises OSError where another has it."""
    if os.name == "nt":
        import msvcrt

        os.lseek(file, byte, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)


class Shard:
    """A shard in the making: `add` its images, then `publish`. Raises OSError, which names the shard."""

    def __init__(self, folder: Folder, number: int, image_format: str):
        self.folder, self.number = folder, number
        self.path = folder.path / folder.name(number)
        self._temporary = folder.hidden / folder.name(number)
        self._pixels = hashlib.sha256()
        self.images, self.failures = 0, list[Failure]()
        with disk.naming(self.path):
            self._writer = WRITERS[folder.format](self._temporary, image_format)

    def add(self, key: str, files: Mapping[str, bytes], pixels: bytes) -> None:
        """One image: its files by ending, and its pixels for the shard's hash."""
        with disk.naming(self.path):
            self._writer.add(key, files)
        self._pixels.update(pixels)
        self.images += 1

    def publish(self, seconds: float) -> None:
        """Note what was made and how long it took, then give the shard its name."""
        about = {
            "images": self.images,
            "failures": [asdict(failure) for failure in self.failures],
            "seconds": round(seconds, 3),
            "pixels_sha256": self._pixels.hexdigest(),
        }
        with disk.naming(self.path):
            self._writer.close()
            write_json(self.folder.record_file(self.number), about)
            if self.images:
                os.replace(self._temporary, self.path)


def write_json(path: Path, document: object) -> None:
    """Whole or not at all. Raises OSError."""
    with disk.replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")


def write_manifest(folder: Folder, job: Mapping[str, object]) -> dict:
    """What the finished job made, which is also written: counts, failures by kind, seconds, hash of all pixels.

    seconds: of all workers, from one shard to the next; images_per_second: of one worker.
    """
    records = [folder.record(shard) for shard in range(folder.shards)]
    failures = [failure for record in records for failure in record["failures"]]
    images, seconds = (sum(record[name] for record in records) for name in ("images", "seconds"))
    hashes = "".join(record["pixels_sha256"] for record in records)
    manifest = {
        "rows": images + len(failures),
        "images": images,
        "failed": len(failures),
        "failures": by_kind(failures),
        "shards": sum(record["images"] > 0 for record in records),
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 3) if seconds else 0.0,
        "pixels_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        "job": dict(job),
    }
    with disk.replacing(folder.path / "failures.jsonl") as temporary:
        temporary.write_bytes("".join(json.dumps(failure) + "\n" for failure in failures).encode())
    write_json(folder.path / "manifest.json", manifest)
    return manifest
