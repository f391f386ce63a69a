"""An image for each line of a file, made by several ComfyUIs at once; one that goes away costs nothing but its time.

    OUT/ID.png           under its name from the moment that it is whole: so the same command goes on
    OUT/failures.jsonl   rows that every ComfyUI refused, with what each said
    OUT/job.json         what the folder is of; another job's is refused

Each ComfyUI has one prompt running and one waiting. What it had when it went away, the others make; once it answers
again, it takes part again.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import hashlib
import json
import os
import threading
import time
import urllib.error
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.client import NO_ANSWER, Client, ServerGone
from launcher.prompt import ComfyError, api_prompt, avoid, edit

AT_ONCE = 2  # prompts of one ComfyUI
RETRY_SEC = 2.0  # between two looks at one that went away
CONNECT_SEC = 10.0
PATIENCE_SEC = 60.0  # while none of them answers
COLUMNS = ("prompt", "id", "seed", "steps", "negative")
LONGEST_ID = 60  # characters, of up to 4 bytes; a file's name has 255
RESERVED = frozenset('./\\:*?"<>|')


@dataclass(frozen=True)
class Row:
    """One image to make. steps: None for the workflow's own."""

    id: str
    prompt: str
    seed: int
    steps: int | None = None
    negative: str | None = None


class Spread:
    """Rows on their way to images.

    make: (client, row) -> images; keep: what becomes of them. `failures` holds the rows that all ComfyUIs
    have refused, and why.
    """

    def __init__(
        self,
        urls: Sequence[str],
        rows: Iterable[Row],
        make: Callable[[Client, Row], list[bytes]],
        keep: Callable[[Row, list[bytes]], None],
    ) -> None:
        self.clients = [Client(url) for url in urls]
        self.waiting = collections.deque(rows)
        self.make, self.keep = make, keep
        self.failures: list[dict] = []
        self.made = collections.Counter[str]()  # by url
        self._refusals: dict[str, dict[str, str]] = {}  # by id and url
        self._gone: dict[str, str] = {}  # urls that do not answer, and what was heard instead
        self._in_flight, self._error = 0, None
        self._change = threading.Condition()

    def run(self, on_wait: Callable[[int], None] = lambda made: None) -> None:
        """Make all rows; `on_wait(images so far)` now and then.

        Raises what `keep` raises, and ComfyError when for `PATIENCE_SEC` none answers that could make what is left.
        """
        threads = [
            threading.Thread(target=self._serve, args=(client,), daemon=True)
            for client in self.clients
            for _ in range(AT_ONCE)
        ]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                on_wait(self.made.total())
                for thread in threads:
                    thread.join(0.2 / len(threads))
        except BaseException:
            self._stop(KeyboardInterrupt())
            raise
        on_wait(self.made.total())
        if self._error:
            raise self._error

    def _serve(self, client: Client) -> None:
        """One of a ComfyUI's two prompts at once, until there are no more rows for it."""
        try:
            while (row := self._take(client.url)) is not None:
                self._try(client, row)
        except Exception as error:  # of our disk, say: no other row would do better
            self._stop(error)

    def _try(self, client: Client, row: Row) -> None:
        try:
            images = self.make(client, row)
        except ServerGone as error:
            self._give_back(row, client.url, str(error))
            self._await(client)
        except ComfyError as error:
            self._refuse(row, client.url, str(error))
        else:
            self.keep(row, images)
            self._done(client.url)

    def _take(self, url: str) -> Row | None:
        """The next row that this ComfyUI did not refuse; None once there can be no more of them."""
        with self._change:
            while not self._error:
                for row in self.waiting:
                    if url not in self._refusals.get(row.id, {}):
                        self.waiting.remove(row)
                        self._in_flight += 1
                        return row
                if not self._in_flight:
                    return None
                self._change.wait()
            return None

    def _done(self, url: str) -> None:
        with self._change:
            self._in_flight -= 1
            self.made[url] += 1
            self._change.notify_all()

    def _give_back(self, row: Row, url: str, reason: str) -> None:
        with self._change:
            self._in_flight -= 1
            self._gone[url] = reason
            self.waiting.appendleft(row)
            self._change.notify_all()

    def _refuse(self, row: Row, url: str, reason: str) -> None:
        """To another ComfyUI, which may have the model or the memory; a failure, where all have refused."""
        with self._change:
            self._in_flight -= 1
            refusals = self._refusals.setdefault(row.id, {})
            refusals[url] = reason
            if len(refusals) == len(self.clients):
                self.failures.append({"id": row.id, "prompt": row.prompt, "reasons": refusals})
            else:
                self.waiting.append(row)
            self._change.notify_all()

    def _await(self, client: Client) -> None:
        """Until it answers again, or there is nothing left to do."""
        since = time.monotonic()
        while True:
            with self._change:
                self._change.wait(RETRY_SEC)
                if self._error or not (self.waiting or self._in_flight):
                    return
                if self._in_flight:  # others are at work
                    since = time.monotonic()
            try:
                client.json("/system_stats", timeout=5)
            except (OSError, ValueError):
                if time.monotonic() - since > PATIENCE_SEC:
                    reasons = "; ".join(self._gone.values())
                    return self._stop(ComfyError(f"{reasons}; {len(self.waiting)} rows are left, the same goes on"))
            else:
                with self._change:
                    self._gone.pop(client.url, None)
                return None

    def _stop(self, error: BaseException) -> None:
        with self._change:
            self._error = self._error or error
            self._change.notify_all()


# --- prompts ------------------------------------------------------------------------------------------


def read(path: Path, seed: int) -> list[Row]:
    """The rows of a file: .txt with a prompt on each line, .jsonl with `COLUMNS`. Raises ComfyError with the line.

    seed: of the first row that has none of its own; row n has seed + n. A row's id is its number, unless it has one.
    """
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise ComfyError(f"{path}: name it .txt, with a prompt on each line, or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ComfyError(f"{path}: cannot be read ({error})") from None
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _row(line.strip(), path.suffix.lower() == ".jsonl", len(rows), seed)
            if row.id in rows:
                raise ValueError(f"the id {row.id} came before; each row needs its own")
        except (ValueError, RecursionError) as error:
            raise ComfyError(f"{path}, line {number}: {error}") from None
        rows[row.id] = row
    if not rows:
        raise ComfyError(f"{path}: no prompts in it")
    return list(rows.values())


def _row(line: str, is_json: bool, number: int, seed: int) -> Row:
    """Raises ValueError."""
    columns = json.loads(line) if is_json else {"prompt": line}
    if not isinstance(columns, dict) or not isinstance(columns.get("prompt"), str) or not columns["prompt"].strip():
        raise ValueError('expected a prompt, as in {"prompt": "a cat"}')
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise ValueError(f"unknown column {unknown[0]}; there are {', '.join(COLUMNS)}, and the workflow has the rest")
    usual = {"id": f"{number:09d}", "seed": seed + number, "steps": None, "negative": None}
    values: dict[str, Any] = usual | {name: value for name, value in columns.items() if value is not None}
    for name in ("seed", "steps"):
        value = values[name]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ValueError(f"{name}: expected a whole number from 0, not {value!r}")
    if not isinstance(values["negative"] or "", str):
        raise ValueError(f"negative: expected a text, not {values['negative']!r}")
    name = values["id"]
    if not isinstance(name, str) or not name.isprintable() or RESERVED & set(name) or not 0 < len(name) <= LONGEST_ID:
        raise ValueError(f"id: it names a file, so it has 1 to {LONGEST_ID} characters, without dots and slashes")
    return Row(**values)


# --- files --------------------------------------------------------------------------------------------


def begin(out: Path, job: dict) -> None:
    """Make the folder, or go on in it. Raises ComfyError where it is of another job."""
    file = out / "job.json"
    if not file.exists():
        if out.is_dir() and any(entry.name != ".lock" for entry in out.iterdir()):
            raise ComfyError(f"{out}: not empty, and not of this command; choose a new folder")
        out.mkdir(parents=True, exist_ok=True)
        _write(file, json.dumps(job, indent=1).encode())
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        differing = [name for name in job if there[name] != job[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise ComfyError(f"{file}: cannot be read ({error}); choose a new folder") from None
    if differing:
        raise ComfyError(f"{out}: of another job, whose {differing[0]} differs; choose a new folder")


def keep(out: Path, row: Row, images: Sequence[bytes]) -> None:
    """ID.png; of workflows that make several ID.2.png and so on before it, so that all are there when it is."""
    for number, image in reversed(list(enumerate(images, 1))):
        _write(out / (f"{row.id}.png" if number == 1 else f"{row.id}.{number}.png"), image)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all. Raises ComfyError."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise ComfyError(f"{path}: not written ({error.strerror}); the same command goes on") from None


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Nobody else makes this folder's images meanwhile. Raises ComfyError where somebody does."""
    with open(out / ".lock", "a+") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ComfyError(f"{out}: another command is at work there; wait for it, or stop it") from None
        yield


# --- all of it ----------------------------------------------------------------------------------------


class Maker:
    """A workflow's images of rows, by any of the ComfyUIs, each of which is asked for its own account of its nodes.

    Raises ComfyError, which names the ComfyUI that does not have them.
    """

    def __init__(self, urls: Sequence[str], workflow: Path, model: str | None) -> None:
        self.model = model
        self._ready: dict[str, tuple[dict, dict]] = {}  # by url: the API prompt, and what the nodes are
        for url in urls:
            try:
                object_info = Client(url).object_info()
                self._ready[url] = prompt_of(workflow, object_info), object_info
                self._edited(url, Row("", "a cat", 0))
            except (*NO_ANSWER, ComfyError) as error:
                raise ComfyError(f"{workflow.name} at {url}: {error}") from error

    def _edited(self, url: str, row: Row) -> dict:
        """The prompt for a row. Raises ComfyError."""
        prompt, object_info = self._ready[url]
        prompt = copy.deepcopy(prompt)
        edit(prompt, row.prompt, row.steps, row.seed, self.model)
        if row.negative is not None:
            avoid(prompt, row.negative, object_info)
        return prompt

    def __call__(self, client: Client, row: Row) -> list[bytes]:
        """The files of its images. Raises ComfyError, ServerGone."""
        try:
            images = client.images(client.run(self._edited(client.url, row)))
            if not images:
                raise ComfyError("the workflow saves no image")
            return [client.view(image) for image in images]
        except urllib.error.HTTPError as error:
            raise ComfyError(f"{error.url} answered {error.code}") from error
        except NO_ANSWER as error:
            raise ServerGone(f"{client.url} does not answer: {error}") from error


def prompt_of(workflow: Path, object_info: dict) -> dict:
    """The API prompt of a workflow file, which may be one itself (Export (API)). Raises ComfyError."""
    try:
        graph = json.loads(workflow.read_text(encoding="utf-8-sig"))
        if all("class_type" in node for node in graph.values() if isinstance(node, dict)) and "nodes" not in graph:
            return graph
        return api_prompt(graph, object_info)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ComfyError(f"not a workflow as ComfyUI saves it ({error!r}); save it again in the editor") from None


def run(
    prompts: Path,
    out: Path,
    urls: Sequence[str],
    workflow: Path,
    model: str | None = None,
    seed: int = 0,
    on_wait: Callable[[int, int], None] = lambda made, of: None,
) -> dict:
    """Make what is not there yet, and return the report. on_wait: takes how many are made, of how many.

    Raises ComfyError.
    """
    started, rows = time.monotonic(), read(prompts, seed)
    urls = [(url if "://" in url else f"http://{url}").rstrip("/") for url in urls]
    check(urls)
    job, maker = job_of(rows, workflow, model), Maker(urls, workflow, model)
    begin(out, job)
    with alone(out):
        missing = [row for row in rows if not (out / f"{row.id}.png").exists()]
        spread = Spread(urls, missing, maker, lambda row, images: keep(out, row, images))
        spread.run(lambda made: on_wait(made, len(missing)))
        failures = "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in spread.failures)
        _write(out / "failures.jsonl", failures.encode())
    by = {url: spread.made[url] for url in urls}
    return {
        "rows": len(rows),
        "images": len(rows) - len(spread.failures),
        "failed": len(spread.failures),
        "out": str(out.resolve()),
        "run": {"images": spread.made.total(), "seconds": round(time.monotonic() - started, 3), "by": by},
    }


def check(urls: Sequence[str]) -> None:
    """Raises ComfyError where one stands twice or does not answer, before anything is made."""
    for url in urls:
        if urls.count(url) > 1:
            raise ComfyError(f"--url {url}: it stands there twice")
        try:
            Client(url).json("/system_stats", timeout=CONNECT_SEC)
        except (*NO_ANSWER, ValueError) as error:
            raise ComfyError(f"--url {url}: no ComfyUI answers there ({error}); start it, or leave it out") from None


def job_of(rows: Sequence[Row], workflow: Path, model: str | None) -> dict:
    """All that decides what is in the images. Raises ComfyError."""
    try:
        graph = hashlib.sha256(workflow.read_bytes()).hexdigest()
    except OSError as error:
        raise ComfyError(f"{workflow}: cannot be read ({error.strerror})") from None
    prompts = hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()
    return {"prompts": prompts, "workflow": graph, "model": model}
