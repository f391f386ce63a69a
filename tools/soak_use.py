"""The use of a server by several clients at once, and the tally of what comes of it; soak.py starts it."""

import collections
import contextlib
import hashlib
import io
import json
import random
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
from PIL import Image

from launcher.client import Client, Server
from launcher.prompt import ComfyError
from tools import soak_mix
from tools.soak_mix import Broken, Case, Mix

CLIENTS = 4
PATIENCE_SEC = 900  # for an answer or a start, on a machine that is busy with other things
STUCK_SEC = 1800  # since a prompt has ended
STEADY_SEC = 5  # without a change: a connection lingers for seconds after its answer
REPORT_SEC = 60
WARM_UP_SHARE, WARM_UP_PROMPTS = 0.2, 60  # both have to be reached
SHOWN = 20  # errors and differences in full, in the log
# What a client does next, and how often.
ACTIONS = {"case": 50, "new_text": 20, "interrupt": 10, "dequeue": 5, "broken": 10, "out_of_range": 4, "free": 1}

Images = dict[str, tuple[str, ...]]  # hashes of an output node's images, by the node's id
Alone = list[tuple[Case, Images]]  # cases, and what they give with nothing else going on


class Stopped(BaseException):
    """The run has to end now."""


class PatientClient(Client):
    def request(self, path: str, body: object = None, timeout: float = PATIENCE_SEC) -> bytes:
        return super().request(path, body, max(timeout, PATIENCE_SEC))


class Usage(NamedTuple):
    """What the server's process holds while nobody asks for anything."""

    memory_mib: float  # resident
    open_files: int  # all descriptors, sockets included
    mapped: int  # weight files that are mapped into memory
    untrimmed_mib: float = 0.0  # resident before the C library gave back what it keeps of freed memory

    @classmethod
    def of(cls, process: psutil.Process) -> "Usage":
        files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
        maps = process.memory_maps() if hasattr(process, "memory_maps") else []  # which macOS has not
        mapped = {m.path for m in maps if ".safetensors" in m.path or ".pth" in m.path}
        return cls(process.memory_info().rss / 2**20, files, len(mapped))


@dataclass
class Tally:
    """What happened so far; all clients write into it."""

    done: int = 0
    compared: int = 0
    expected: collections.Counter = field(default_factory=collections.Counter)
    others: collections.Counter = field(default_factory=collections.Counter)  # neither prompts done nor errors
    unexpected: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    usage: list[Usage] = field(default_factory=list)
    last_end: float = field(default_factory=time.monotonic)
    waited_sec: float = 1.0  # moving mean, from queueing a prompt to its end
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ended(self, seconds: float) -> None:
        with self.lock:
            self.last_end = time.monotonic()
            self.waited_sec += 0.1 * (seconds - self.waited_sec)

    def growth(self) -> float | None:
        """Of the memory between warm-up and end, as a share; None before the end."""
        return round(self.usage[2].memory_mib / self.usage[1].memory_mib - 1, 4) if len(self.usage) > 2 else None

    def document(self) -> dict:
        return {
            "prompts": self.done,
            "unexpected": len(self.unexpected),
            "different": len(self.different),
            "memory_growth": self.growth(),
            "open_files": [usage.open_files for usage in self.usage],
        }

    def lines(self) -> Iterator[str]:
        expected = ", ".join(f"{count} {what}" for what, count in sorted(self.expected.items()))
        yield f"prompts done: {self.done}, of which {self.compared} were compared with the same prompt run alone"
        yield f"errors, expected: {self.expected.total()} ({expected})"
        yield f"errors, unexpected: {len(self.unexpected)}"
        yield f"prompts whose images differ: {len(self.different)}"
        yield "besides: " + ", ".join(f"{count} {what}" for what, count in sorted(self.others.items()))
        for when, usage in zip(("at the start", "after the warm-up", "at the end"), self.usage, strict=False):
            kept = usage.untrimmed_mib - usage.memory_mib
            memory = f"{usage.memory_mib:.1f} MiB, and {kept:.1f} MiB freed but kept by the C library"
            yield f"{when}: {memory}; {usage.open_files} open files, {usage.mapped} weight files mapped"
        if (growth := self.growth()) is not None:
            yield f"memory since the warm-up: {growth:+.2%}"


class Litter:
    """Saved images are deleted, so that hours fit on the disk, once no cache of the server can name them again.

    The caches are empty after /free. So what no prompt has named between one /free and the next is past use, if in
    between so many have ended that none from before can be left.
    """

    def __init__(self, base: Path, between: int = 10 * CLIENTS) -> None:
        self.base, self.between = base, between
        self.old: set[Path] = set()
        self.new: set[Path] = set()
        self.ended = 0  # prompts since the last sweep
        self.lock = threading.Lock()

    def add(self, images: list[dict]) -> None:
        with self.lock:
            self.ended += 1
            self.new |= {self.base / image["type"] / image["subfolder"] / image["filename"] for image in images}

    def sweep(self) -> None:
        """To be called just before a /free."""
        with self.lock:
            if self.ended < self.between:
                return
            self.ended = 0
            past, self.old, self.new = self.old - self.new, self.new, set()
        for path in past:
            if path.parent.name != "input":
                path.unlink(missing_ok=True)


def hashes(client: Client, history: dict) -> Images:
    """Of the pixels that each node has saved or previewed."""
    result = {}
    for node, output in history["outputs"].items():
        images = [Image.open(io.BytesIO(client.view(image))) for image in output.get("images", [])]
        result[node] = tuple(
            hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest() for image in images
        )
    return result


def is_running(client: Client, prompt_id: str) -> bool:
    return any(item[1] == prompt_id for item in client.json("/queue")["queue_running"])


class Soak:
    """A server under use, the images of the cases alone, and the tally."""

    def __init__(self, server: Server, mix: Mix, alone: Alone, say: Callable[[str], None], tally: Tally) -> None:
        self.server, self.mix, self.alone, self.say, self.tally = server, mix, alone, say, tally
        self.litter = Litter(server.base)
        self.actions = dict(ACTIONS)
        self.stop = threading.Event()
        self.numbers = iter(range(10**9))
        self.started = time.monotonic()
        self.interrupts: collections.deque[float] = collections.deque(maxlen=100)  # when they were sent

    def phase(self, ended: Callable[[], bool], seed: str) -> None:
        """Let the clients work until `ended()`, and wait until all of their prompts are done."""
        work = [threading.Thread(target=self.use, args=(ended, f"{seed}/{i}"), daemon=True) for i in range(CLIENTS)]
        for thread in work:
            thread.start()
        self.tally.last_end = reported = time.monotonic()
        try:
            while any(thread.is_alive() for thread in work) and not self.stop.is_set():
                time.sleep(0.2)
                if time.monotonic() - reported > REPORT_SEC:
                    reported += REPORT_SEC
                    self.report()
                    self.find_stuck()
        except (psutil.NoSuchProcess, OSError):
            self.unexpected("the server is gone" + self.server.log_tail())
        finally:
            if any(thread.is_alive() for thread in work):
                self.stop.set()

    def report(self) -> None:
        usage, minutes = Usage.of(psutil.Process(self.server.process.pid)), (time.monotonic() - self.started) / 60
        self.say(f"{minutes:.0f} min, {usage.memory_mib:.0f} MiB: {json.dumps(self.tally.document())}")

    def find_stuck(self) -> None:
        """End the run if ComfyUI's worker has died, or if nothing has ended for very long."""
        since_sec = time.monotonic() - self.tally.last_end
        dead = "(prompt_worker)" in self.server.log_text()  # as Python names the thread of an exception
        if dead or since_sec > STUCK_SEC:
            what = "its worker has died" if dead else f"no prompt has ended for {since_sec:.0f} s"
            self.unexpected(f"ComfyUI is stuck: {what}{self.server.log_tail()}")
            self.stop.set()

    def use(self, ended: Callable[[], bool], seed: str) -> None:
        """What one client does."""
        client, rng = PatientClient(self.server.url), random.Random(seed)
        while not ended() and not self.stop.is_set():
            action = rng.choices(list(self.actions), list(self.actions.values()))[0]
            try:
                getattr(self, action)(client, rng)
            except Stopped:
                return
            except Exception as error:
                if not self.stop.is_set():
                    self.unexpected(f"{action}: {type(error).__name__}: {error}")
                if self.server.process.poll() is not None:
                    self.stop.set()

    def unexpected(self, message: str) -> None:
        with self.tally.lock:
            self.tally.unexpected.append(message)
            if len(self.tally.unexpected) <= SHOWN:
                self.say(f"unexpected: {message}")

    def count(self, counter: collections.Counter, what: str) -> None:
        with self.tally.lock:
            counter[what] += 1

    def wait(self, client: Client, prompt_id: str, on_wait: Callable[[float], None] = lambda seconds: None) -> Images:
        """The images of a prompt that is queued; its entry in the server's history is deleted, as the editor can."""

        def look(seconds: float) -> None:
            if self.stop.is_set():
                raise Stopped
            on_wait(seconds)

        started = time.monotonic()
        try:
            history = client.wait(prompt_id, look, timeout=float("inf"))
            self.litter.add(client.images(history))
            return hashes(client, history)
        finally:
            self.tally.ended(time.monotonic() - started)
            if not self.stop.is_set():
                client.request("/history", {"delete": [prompt_id]})

    def compare(self, case: Case, images: Images, alone: Images | None) -> None:
        with self.tally.lock:
            self.tally.done += 1
            if alone is None:
                return
            self.tally.compared += 1
            if images != alone:
                nodes = [node for node in images.keys() | alone.keys() if images.get(node) != alone.get(node)]
                self.tally.different.append(case.name)
                if len(self.tally.different) <= SHOWN:
                    self.say(f"different: nodes {sorted(nodes)} of {case.name}")

    def pick(self, rng: random.Random) -> tuple[Case, Images]:
        return rng.choice(self.alone)

    def run(self, client: Client, case: Case, alone: Images | None = None) -> None:
        sent = time.monotonic()
        try:
            images = self.wait(client, client.queue(case.prompt))
        except ComfyError as error:
            # ComfyUI looks whether a prompt runs and only then interrupts, which may hit the next one.
            if "interrupted" in str(error) and any(moment >= sent for moment in list(self.interrupts)):
                self.count(self.tally.others, "interrupts that hit another prompt")
                return
            raise ComfyError(f"{case.name}: {error}") from error
        self.compare(case, images, alone)

    # What clients do: methods by the names in ACTIONS.

    def case(self, client: Client, rng: random.Random) -> None:
        self.run(client, *self.pick(rng))

    def new_text(self, client: Client, rng: random.Random) -> None:
        self.run(client, self.mix.vary(rng.choice(list(self.mix.prompts)), rng))

    def interrupt(self, client: Client, rng: random.Random) -> None:
        """Interrupt at a random moment after the prompt has begun; it may have ended by then."""
        case, alone = self.pick(rng)
        prompt_id, delay, begun = client.queue(case.prompt), rng.uniform(0, self.tally.waited_sec / CLIENTS), None

        def look(seconds: float) -> None:
            nonlocal begun
            if begun is None and is_running(client, prompt_id):
                begun = seconds
            if begun is not None and delay <= seconds - begun < float("inf"):
                begun = float("inf")  # once
                self.interrupts.append(time.monotonic())
                client.request("/interrupt", {"prompt_id": prompt_id})

        try:
            self.compare(case, self.wait(client, prompt_id, look), alone)
        except ComfyError as error:
            if "interrupted" not in str(error):
                raise ComfyError(f"{case.name}, interrupted: {error}") from error
            self.count(self.tally.expected, "interrupted")

    def dequeue(self, client: Client, rng: random.Random) -> None:
        """Take a prompt out of the queue; one that has begun already runs to its end."""
        case, alone = self.pick(rng)
        prompt_id = client.queue(case.prompt)
        time.sleep(rng.uniform(0, self.tally.waited_sec))
        client.request("/queue", {"delete": [prompt_id]})
        if is_running(client, prompt_id) or client.json(f"/history/{prompt_id}"):
            self.compare(case, self.wait(client, prompt_id), alone)
        else:
            self.count(self.tally.others, "taken out of the queue")

    def broken(self, client: Client, rng: random.Random) -> None:
        self.refused(client, soak_mix.broken(self.mix, next(self.numbers), rng), "of broken files")

    def out_of_range(self, client: Client, rng: random.Random) -> None:
        self.refused(client, soak_mix.out_of_range(self.mix, rng), "of values")

    def refused(self, client: Client, case: Case, kind: str) -> None:
        """A prompt that has to fail, with words that tell why."""
        words = "SanaSprint"
        if isinstance(case, Broken):
            words, path = case.words, self.server.base / case.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(case.data)
        try:
            self.wait(client, client.queue(case.prompt))
        except ComfyError as error:
            if words not in str(error):
                raise ComfyError(f"{case.name}: nothing names {words}: {error}") from error
            self.count(self.tally.expected, kind)
        else:
            raise ComfyError(f"{case.name}: no error")
        finally:
            if isinstance(case, Broken):
                path.unlink(missing_ok=True)

    def free(self, client: Client, rng: random.Random) -> None:
        whole = rng.random() < 0.7
        if whole:
            self.litter.sweep()
        client.request("/free", {"unload_models": True, "free_memory": whole})
        self.count(self.tally.others, "/free")

    def measure(self) -> None:
        """Empty the caches of the idle server, wait until what it holds is steady, and note that."""
        client = PatientClient(self.server.url)
        client.request("/free", {"unload_models": True, "free_memory": True})
        process = psutil.Process(self.server.process.pid)
        usage, steady_sec = Usage.of(process), 0
        for _ in range(60):
            time.sleep(1)
            now = Usage.of(process)
            same = abs(now.memory_mib - usage.memory_mib) < 0.5 and now.open_files == usage.open_files
            steady_sec = steady_sec + 1 if same else 0
            usage = now
            if steady_sec == STEADY_SEC:
                break
        with contextlib.suppress(urllib.error.HTTPError):  # a server without soak_node.py
            self.say(f"Python holds {client.json('/soak/trim')}")
        trimmed, of_files = Usage.of(process).memory_mib, getattr(process.memory_info(), "shared", 0) / 2**20
        self.say(f"resident: {trimmed:.1f} MiB, of which files (mapped libraries, too): {of_files:.1f} MiB")
        self.tally.usage.append(usage._replace(memory_mib=trimmed, untrimmed_mib=usage.memory_mib))

    def whole(self, minutes: float) -> None:
        """Measure, warm up, measure, work, measure."""
        started, tally = time.monotonic(), self.tally
        past = lambda share: time.monotonic() - started >= 60 * minutes * share  # noqa: E731
        self.measure()
        self.phase(lambda: past(WARM_UP_SHARE) and tally.done >= min(WARM_UP_PROMPTS, 5 * minutes), "warm-up")
        if not self.stop.is_set():
            self.measure()
            self.say(f"warmed up: {tally.usage[1]}")
            self.phase(lambda: past(1), "work")
        if not self.stop.is_set():
            self.measure()
