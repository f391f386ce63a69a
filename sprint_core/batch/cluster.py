"""The engine of many machines: the same shards, made by actors of Ray, each of which has a `Generate` of its own.

Ray hands out shards, starts actors that died anew, and asks again for what they had. What is done is known by the
files, as everywhere, and not by a checkpoint of Ray's: so a run may begin with one engine and go on with the other.
Every machine has to see DIR, the model and this repository under the same paths.

RAY_ADDRESS names a cluster; without it Ray starts on this machine, and ends with the command.
"""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch

from .. import cli, messages
from .folder import Folder
from .generate import Generate, Settings
from .plan import Plan
from .rows import Row
from .work import Report, work

log = messages.logger(__name__)

FREE_CPUS = 1.0  # for tasks of Ray's own: where actors have all, these wait for ever, and nothing says so
LEAST_CPUS = 0.01  # Ray counts in ten thousandths
CONNECT_SEC = 10
REPOSITORY = Path(__file__).resolve().parents[2]
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "WARNING", "RAY_BACKEND_LOG_LEVEL": "fatal"}


def ray() -> Any:
    """Ray with its datasets. Raises ValueError where it is missing."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("--engine ray: Ray is missing; install it with: pip install --group ray") from None
    return ray


def check() -> None:
    """Before anything is made: Ray would try to reach a cluster for minutes. Raises ValueError."""
    ray()
    address = os.environ.get("RAY_ADDRESS", "")
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isascii() and port.isdigit()):  # "auto", "local"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SEC).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"RAY_ADDRESS={address}: nothing answers there ({error}); start it, or unset it") from None


class Shards:
    """An actor: shards, one after another, to what was made of them."""

    def __init__(self, settings: Settings, folder: Folder, device: str, threads: int, weights_hash: str, overlap: bool):
        self.model = settings, device, weights_hash
        self.folder, self.threads, self.overlap = folder, threads, overlap
        self.generate: Generate | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        """batch: number and rows, as JSON, of one shard.

        Returns what is wrong as a sentence, since Ray would try an actor that raises again, and again.
        """
        made = {"images": 0, "failed": 0, "error": ""}

        def report(of_one: Report) -> None:
            made["images"] += of_one.images
            made["failed"] += of_one.failed

        shards = zip(batch["shard"], batch["rows"], strict=True)
        parsed = ((int(number), [Row(*row) for row in json.loads(rows)]) for number, rows in shards)
        try:
            if self.generate is None:
                torch.set_num_threads(self.threads)
                self.generate = Generate(*self.model)
            work(self.generate, self.folder, parsed, report, self.overlap)
        except (ValueError, OSError) as error:
            made["error"] = cli.sentence(error)
        return {name: [value] for name, value in made.items()}


def run(
    settings: Settings,
    folder: Folder,
    plan: Plan,
    shards: Sequence[int],
    devices: Sequence[str],
    threads: int,
    weights_hash: str,
    report: Callable[[Report], None],
    overlap: bool = True,
) -> None:
    """Make these shards by as many actors as there are `devices`, which are all of one kind, such as "cuda".

    Raises ValueError, OSError.
    """
    library, device = ray(), torch.device(devices[0]).type
    where = replace(folder, path=folder.path.resolve())
    rows = [{"shard": shard, "rows": json.dumps([astuple(row) for row in plan.rows(shard)])} for shard in shards]
    with _session(library):
        actors = min(len(devices), len(rows))
        cpus = cpus_of_an_actor(library.cluster_resources().get("CPU", 1.0), actors, threads)
        log.info("Ray: %d actors, each with %g CPUs and %d threads", actors, cpus, threads)
        made = library.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Shards,
            batch_size=1,
            compute=library.data.ActorPoolStrategy(size=actors),
            num_cpus=cpus,
            num_gpus=1 if device == "cuda" else None,
            fn_constructor_args=(absolute(settings), where, device, threads, weights_hash, overlap),
        )
        try:
            for row in made.iter_rows():
                if row["error"]:
                    raise ValueError(row["error"])
                report(Report(row["images"], row["failed"]))
        except library.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"--engine ray: {reason} (the same command goes on)") from error


@contextlib.contextmanager
def _session(library: Any) -> Iterator[None]:
    """Ray on the cluster of RAY_ADDRESS, or on this machine; a session that is there stays. Raises ValueError."""
    if library.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"  # not what an earlier `ray start` left a note of
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    try:
        library.init(
            address,
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"--engine ray: Ray does not start: {str(error).strip().splitlines()[0]}") from error
    library.data.DataContext.get_current().enable_progress_bars = False  # ours counts images
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it would say so
    try:
        yield
    finally:
        library.shutdown()


def cpus_of_an_actor(cpus: float, actors: int, threads: int) -> float:
    """As many as it has threads, or less, so that `FREE_CPUS` of the cluster stay free."""
    return max(LEAST_CPUS, min(float(threads), (cpus - FREE_CPUS) / actors))


def absolute(settings: Settings) -> Settings:
    """With whole paths, since actors run elsewhere. Raises CheckpointError."""
    names = ("vae", "text_encoder", "control_model", "folder")
    paths = {name: str(Path(value).resolve()) for name in names if (value := getattr(settings, name))}
    return replace(settings, model=str(settings.path.resolve()), **paths)
