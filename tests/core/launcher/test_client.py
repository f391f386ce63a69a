"""How the client waits, against a server that answers from a list. tests/server has the real one."""

import http.server
import itertools
import json
import threading

import pytest

from launcher.client import LONGEST_POLL_SEC, SHORTEST_POLL_SEC, Client, Server
from launcher.prompt import ComfyError

DONE = {"outputs": {}, "status": {"status_str": "success", "messages": [["execution_start", {}]]}}
NODE = {"node_id": "3", "node_type": "Sampler"}


class Answering(http.server.ThreadingHTTPServer):
    """Answers each GET with the next of `replies`, the last one again and again, and notes all that is asked."""

    def __init__(self, replies: list) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.replies, self.requests = replies, []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        replies = self.server.replies
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        self.send(json.dumps({"mine": reply} if reply else {}).encode())

    def do_POST(self):
        self.send(b"")

    def send(self, body: bytes) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.server.requests.append((self.path, self.rfile.read(length).decode()))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_waiting_looks_often_at_first_and_tells_the_seconds():
    seconds = []
    with Answering([None] * 12 + [DONE]) as server:
        assert Client(server.url).wait("mine", seconds.append) == DONE
    assert [path for path, _ in server.requests] == ["/history/mine"] * 13
    pauses = [b - a for a, b in itertools.pairwise(seconds)]
    assert len(seconds) == 13 and seconds == sorted(seconds)
    assert all(pause >= SHORTEST_POLL_SEC for pause in pauses) and pauses[0] < LONGEST_POLL_SEC


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            [["execution_error", {**NODE, "exception_type": "ValueError", "exception_message": "no steps\n"}]],
            r"^node 3 \(Sampler\): ValueError: no steps$",
        ),
        ([["execution_interrupted", NODE]], r"^interrupted at node 3 \(Sampler\)$"),
        ([], "^the prompt ended with status 'error'$"),
    ],
)
def test_a_prompt_that_failed_says_how(status, message):
    failed = {"outputs": {}, "status": {"status_str": "error", "messages": status}}
    with Answering([None, failed]) as server, pytest.raises(ComfyError, match=message):
        Client(server.url).wait("mine")


def test_a_prompt_that_takes_too_long_is_interrupted():
    with Answering([None]) as server, pytest.raises(ComfyError, match="did not end within 0 s"):
        Client(server.url).wait("mine", timeout=0.1)
    assert server.requests[-1] == ("/interrupt", '{"prompt_id": "mine"}')


def test_a_server_that_is_gone_is_an_error():
    with Answering([None]) as server:
        url = server.url
    with pytest.raises(ComfyError, match=f"{url} answers no more"):
        Client(url).wait("mine")


def test_notes_are_the_packs_lines(tmp_path):
    log = tmp_path / "comfyui.log"
    log.write_text("[INFO] Starting server\n[INFO] SANA-Sprint tiny, fp32\nSANA-Sprint: made a model\nx SANA-Sprint")
    server = Server("python", tmp_path, tmp_path, log)
    assert server.notes() == ["SANA-Sprint tiny, fp32", "SANA-Sprint: made a model"]


def test_a_workflow_with_a_byte_order_mark(tmp_path):
    """As Windows' editors save it."""
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"nodes": [], "links": []}')
    with Answering([{}]) as server:
        assert Client(server.url).prompt_of(tmp_path / "a.json") == {}
