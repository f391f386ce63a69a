"""Prompts on several ComfyUIs, here two small servers that speak its API. tests/server has real ones."""

import collections
import hashlib
import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import pytest

import run
from launcher import spread
from launcher.client import free_port
from launcher.prompt import ComfyError

ROOT = Path(__file__).resolve().parents[3]
COUNT = 24
NODES = {
    "CLIPTextEncode": {"input": {"required": {"text": ["STRING", {}]}}},
    "SanaSprintSampler": {"input": {"required": {"steps": ["INT", {}], "seed": ["INT", {}]}}},
}
GRAPH = {
    "nodes": [
        {"id": 1, "type": "CLIPTextEncode", "widgets_values": ["a cat"]},
        {"id": 2, "type": "SanaSprintSampler", "widgets_values": [2, 0, "fixed"]},
    ],
    "links": [],
}


class Painter(http.server.ThreadingHTTPServer):
    """Speaks as a ComfyUI does: one prompt after another, whose image is the hash of its text, steps and seed."""

    daemon_threads = True

    def __init__(self, port: int = 0, seconds: float = 0.02, refuses: Sequence[str] = ()) -> None:
        super().__init__(("127.0.0.1", port), Answer)
        self.seconds, self.refuses = seconds, refuses
        self.queue, self.history, self.painted = collections.deque(), {}, []
        self.most_queued = self.count = 0
        self.is_open, self.connections = True, set()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        threading.Thread(target=self.paint, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self) -> None:
        """No answer to anything from now on, in the middle of a request as well."""
        if self.is_open:
            self.is_open = False
            self.shutdown()
            self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def paint(self) -> None:
        while self.is_open:
            if not self.queue:
                time.sleep(0.002)
                continue
            time.sleep(self.seconds)
            name, prompt = self.queue[0]
            inputs = {key: value for node in prompt.values() for key, value in node["inputs"].items()}
            words = (inputs["text"], inputs["steps"], inputs["seed"])
            entry = {"outputs": {"9": {"images": [{"filename": name, "subfolder": "", "type": "output"}]}}}
            entry["status"] = {"status_str": "success", "messages": []}
            if inputs["text"] in self.refuses:
                reason = {"exception_type": "MemoryError", "exception_message": "too large"}
                entry["status"] = {
                    "status_str": "error",
                    "messages": [["execution_error", {"node_id": "2", "node_type": "Sampler", **reason}]],
                }
            self.painted.append(words)
            self.history[name] = entry | {"image": image_of(*words)}
            self.queue.popleft()


def image_of(text: str, steps: int, seed: int) -> bytes:
    return hashlib.sha256(f"{text} {steps} {seed}".encode()).digest()


class Answer(http.server.BaseHTTPRequestHandler):
    server: Painter

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        if not self.server.is_open:
            return self.close_connection_now()
        if url.path == "/object_info":
            return self.send(NODES)
        if url.path == "/system_stats":
            return self.send({"system": {}})
        if url.path == "/queue":
            return self.send({"queue_running": [[0, name] for name, _ in self.server.queue], "queue_pending": []})
        if url.path == "/view":
            name = urllib.parse.parse_qs(url.query)["filename"][0]
            return self.send(self.server.history[name]["image"])
        name = url.path.rpartition("/")[2]
        entry = self.server.history.get(name)
        return self.send({name: {k: v for k, v in entry.items() if k != "image"}} if entry else {})

    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        if not self.server.is_open:
            return self.close_connection_now()
        self.server.count += 1
        name = f"{self.server.count}.png"
        self.server.queue.append((name, prompt))
        self.server.most_queued = max(self.server.most_queued, len(self.server.queue))
        return self.send({"prompt_id": name})

    def close_connection_now(self):
        self.close_connection = True

    def send(self, answer) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def job(tmp_path, monkeypatch) -> dict:
    monkeypatch.setattr(spread, "RETRY_SEC", 0.05)
    monkeypatch.setattr(spread, "PATIENCE_SEC", 0.5)
    (tmp_path / "prompts.txt").write_text("".join(f"a cat of {i} kilograms\n" for i in range(COUNT)))
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    return {
        "prompts": tmp_path / "prompts.txt",
        "out": tmp_path / "out",
        "workflow": tmp_path / "graph.json",
        "model": None,
        "seed": 5,
    }


WANTED = {f"{i:09d}.png": image_of(f"a cat of {i} kilograms", 2, 5 + i) for i in range(COUNT)}


def images(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.glob("*.png"))}


def test_two_share_the_rows_and_the_same_command_goes_on(job):
    with Painter() as a, Painter() as b:
        report = spread.run(**job, urls=[a.url, b.url])
        assert images(job["out"]) == WANTED
        assert report["rows"] == report["images"] == COUNT and report["failed"] == 0
        assert report["run"]["by"] == {a.url: len(a.painted), b.url: len(b.painted)}
        assert len(a.painted) + len(b.painted) == COUNT and min(len(a.painted), len(b.painted)) >= COUNT // 4
        assert a.most_queued == b.most_queued == spread.AT_ONCE  # one waits, so that no GPU does
        for name in ("000000003.png", "000000007.png"):
            (job["out"] / name).unlink()
        again = spread.run(**job, urls=[b.url])
        assert again["run"]["images"] == 2 and images(job["out"]) == WANTED


def test_one_is_killed_and_the_other_makes_its_rows(job):
    with Painter() as a, Painter() as b:
        seen = []

        def on_wait(made: int, of: int) -> None:
            seen.append(made)
            if made >= 4:
                a.kill()

        report = spread.run(**job, urls=[a.url, b.url], on_wait=on_wait)
        assert images(job["out"]) == WANTED and report["images"] == COUNT and report["failed"] == 0
        assert 0 < report["run"]["by"][a.url] < COUNT // 2 and sum(report["run"]["by"].values()) == COUNT
        # It was asked for nothing that was there: what it makes twice is at most what the other had in flight.
        assert len(b.painted) == len(set(b.painted)) and len(a.painted) + len(b.painted) <= COUNT + spread.AT_ONCE


def test_one_that_was_started_anew_has_forgotten_and_takes_part_again(job, monkeypatch):
    monkeypatch.setattr("launcher.client.QUEUE_POLL_SEC", 0.1)
    port = free_port()
    with Painter(seconds=0.1) as a:
        first, second = Painter(port), []

        def on_wait(made: int, of: int) -> None:
            if made >= 4 and not second:
                first.kill()
                second.append(Painter(port).__enter__())

        with first:
            report = spread.run(**job, urls=[a.url, first.url], on_wait=on_wait)
        assert images(job["out"]) == WANTED and report["failed"] == 0
        assert second[0].painted
        second[0].kill()


def test_a_prompt_that_the_server_no_longer_knows_is_asked_for_anew(job, monkeypatch):
    """Its queue was cleared, and nothing else would ever say so."""
    monkeypatch.setattr("launcher.client.QUEUE_POLL_SEC", 0.1)
    with Painter(seconds=0.05) as a:

        def on_wait(made: int, of: int) -> None:
            if made == 4 and len(a.queue) == spread.AT_ONCE:
                a.queue.pop()

        report = spread.run(**job, urls=[a.url], on_wait=on_wait)
    assert images(job["out"]) == WANTED and report["failed"] == 0


def test_what_one_fails_at_another_makes_and_what_all_fail_at_is_recorded(job):
    heavy = [f"a cat of {i} kilograms" for i in (3, 5, 6)]
    with Painter(refuses=heavy[:2]) as a, Painter(refuses=heavy[1:]) as b:
        report = spread.run(**job, urls=[a.url, b.url])
    assert images(job["out"]) == {name: image for name, image in WANTED.items() if name != "000000005.png"}
    assert (report["images"], report["failed"]) == (COUNT - 1, 1)
    failure = json.loads((job["out"] / "failures.jsonl").read_text())
    assert failure["id"] == "000000005" and set(failure["reasons"]) == {a.url, b.url}
    assert failure["reasons"][a.url] == "node 2 (Sampler): MemoryError: too large"


def test_when_none_answers_any_more_it_ends_and_the_same_command_goes_on(job):
    with Painter() as a, Painter() as b:

        def on_wait(made: int, of: int) -> None:
            if made >= 4:
                a.kill()
                b.kill()

        with pytest.raises(ComfyError, match=rf"{a.url}|{b.url}.*rows are left"):
            spread.run(**job, urls=[a.url, b.url], on_wait=on_wait)
    there = images(job["out"])
    assert 4 <= len(there) < COUNT and there == {name: WANTED[name] for name in there}
    with Painter() as c:
        spread.run(**job, urls=[c.url])
        assert images(job["out"]) == WANTED and len(c.painted) == COUNT - len(there)


def test_an_exported_api_prompt_is_a_workflow_too(job):
    text = {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}}
    sampler = {"class_type": "SanaSprintSampler", "inputs": {"steps": 3, "seed": 0}}
    job["workflow"].write_text(json.dumps({"4": text, "5": sampler}))
    with Painter() as a:
        spread.run(**job, urls=[a.url])
    assert images(job["out"])["000000002.png"] == image_of("a cat of 2 kilograms", 3, 7)


def test_columns_and_what_is_wrong_with_them(job, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a dog", "id": "dog", "seed": 1, "steps": 4}\n\n{"prompt": "a cow"}\n')
    with Painter() as a:
        spread.run(**job | {"prompts": file}, urls=[a.url])
    assert images(job["out"]) == {"dog.png": image_of("a dog", 4, 1), "000000001.png": image_of("a cow", 2, 6)}
    for line, message in (
        ("{", "line 4: Expecting"),
        ('{"text": "a cat"}', "line 4: expected a prompt"),
        ('{"prompt": "a cat", "width": 64}', "line 4: unknown column width"),
        ('{"prompt": "a cat", "id": "dog"}', "line 4: the id dog came before"),
        ('{"prompt": "a cat", "id": "../dog"}', "line 4: id: it names a file"),
        ('{"prompt": "a cat", "seed": "1"}', "line 4: seed: expected a whole number"),
        ('{"prompt": "a cat", "negative": 1}', "line 4: negative: expected a text"),
    ):
        (tmp_path / "bad.jsonl").write_text(file.read_text() + line)
        with pytest.raises(ComfyError, match=message):
            spread.run(**job | {"prompts": tmp_path / "bad.jsonl"}, urls=["http://127.0.0.1:9"])


def test_a_full_disk_ends_it_and_is_no_fault_of_a_row(job):
    job["out"].mkdir()
    about = spread.job_of(spread.read(job["prompts"], 5), job["workflow"], None)
    (job["out"] / "job.json").write_text(json.dumps(about))
    (job["out"] / ".000000003.png.part").mkdir()  # in place of a file
    with Painter() as a:
        with pytest.raises(ComfyError, match=r"000000003.png: not written \(Is a directory\); the same"):
            spread.run(**job, urls=[a.url])
        (job["out"] / ".000000003.png.part").rmdir()
        assert spread.run(**job, urls=[a.url])["failed"] == 0
    assert images(job["out"]) == WANTED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph: graph["nodes"].pop(), r"graph.json at http://127.0.0.1:\d+: the workflow needs one of"),
        (lambda graph: graph["nodes"][0].update(type="Other"), r"127.0.0.1:\d+: node 1 \(Other\): the server"),
        (lambda graph: graph.update(nodes=3), "graph.json at http.*: not a workflow as ComfyUI saves it"),
    ],
)
def test_a_workflow_that_cannot_be_run_is_said_at_once(job, change, message):
    graph = json.loads(json.dumps(GRAPH))
    change(graph)
    job["workflow"].write_text(json.dumps(graph))
    with Painter() as a, pytest.raises(ComfyError, match=message):
        spread.run(**job, urls=[a.url])
    assert not job["out"].exists()


def test_another_jobs_folder_is_refused(job, capsys):
    with Painter() as a:
        spread.run(**job, urls=[a.url])
        with pytest.raises(ComfyError, match="out: of another job, whose prompts differs"):
            spread.run(**job | {"seed": 6}, urls=[a.url])
        with pytest.raises(ComfyError, match="stands there twice"):
            spread.run(**job, urls=[a.url, a.url])
        line = ["spread", job["prompts"], "--out", job["out"], "--url", a.url, "--workflow", job["workflow"]]
        assert run.main([*map(str, line), "--seed", "5"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["run"]["images"] == 0
        (mine := job["workflow"].parent / "mine").mkdir()
        (mine / "a.png").touch()
        with pytest.raises(ComfyError, match="mine: not empty, and not of this command"):
            spread.run(**job | {"out": mine}, urls=[a.url])
        with spread.alone(job["out"]), pytest.raises(ComfyError, match="another command is at work there"):
            spread.run(**job, urls=[a.url])
    with pytest.raises(ComfyError, match=f"--url {a.url}: no ComfyUI answers there"):
        spread.run(**job, urls=[a.url])
