"""The engine of one machine: a process for each device, the standard library's.

Processes ask for one shard after another, so that a slow device does not hold up the others. A process ends when its
parent does, whatever ended that.
"""

import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from .. import cli, thread_count
from .folder import Folder
from .generate import Generate, Settings
from .plan import Plan
from .rows import Row
from .work import Report, work


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
    """Make these shards, by one worker for each of `devices`, in which one may stand several times.

    Raises ValueError, OSError. Without another process where one worker is enough.
    """
    if len(devices) == 1:
        with thread_count.threads(threads):
            generate = Generate(settings, devices[0], weights_hash)
            work(generate, folder, ((shard, plan.rows(shard)) for shard in shards), report, overlap)
        return
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, Any] = {}
    try:
        for device in devices:
            ours, theirs = context.Pipe()
            arguments = (theirs, settings, folder, device, threads, weights_hash, overlap)
            process = context.Process(target=_serve, args=arguments, name=f"worker {len(workers)} on {device}")
            process.start()
            theirs.close()
            workers[ours] = process
        _dispatch(workers, plan, iter(shards), report)
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


def _dispatch(
    workers: dict[Connection, Any], plan: Plan, shards: Iterator[int], report: Callable[[Report], None]
) -> None:
    """Answer the workers until all have ended. Raises ValueError where one fails."""
    running = set(workers)
    while running:
        for connection in multiprocessing.connection.wait(list(running)):
            assert isinstance(connection, Connection)
            process = workers[connection]
            try:
                message = connection.recv()
            except (EOFError, ConnectionError):
                process.join()
                if process.exitcode:
                    raise ValueError(
                        f"{process.name} ended with code {process.exitcode}; the same command goes on"
                    ) from None
                running.remove(connection)
                continue
            if isinstance(message, Report):
                report(message)
            elif message is None:  # asks for work
                shard = next(shards, None)
                connection.send(None if shard is None else (shard, plan.rows(shard)))
            else:
                raise ValueError(f"{process.name}: {message}")


def _serve(
    connection: Connection,
    settings: Settings,
    folder: Folder,
    device: str,
    threads: int,
    weights_hash: str,
    overlap: bool,
) -> None:
    """A worker's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the parent's
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def shards() -> Iterator[tuple[int, list[Row]]]:
        while True:
            connection.send(None)
            message = connection.recv()
            if message is None:
                return
            yield message

    def report(of_one: Report) -> None:
        if parent is not None and not parent.is_alive():
            raise EOFError
        connection.send(of_one)

    try:
        work(Generate(settings, device, weights_hash), folder, shards(), report, overlap)
    except (EOFError, ConnectionError):  # the parent is gone
        return
    except (ValueError, OSError) as error:
        connection.send(cli.sentence(error))
