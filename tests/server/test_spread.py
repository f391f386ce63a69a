"""Prompts on two addresses of the real server, one of which goes away midway: all of them are made, and none twice."""

import http.server
import io
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from launcher import spread
from launcher.client import Server
from launcher.prompt import edit

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "SANA-Sprint 01 Text to Image.json"
COUNT = 6


class Way(http.server.ThreadingHTTPServer):
    """Another address of a server, until it is cut."""

    daemon_threads = True

    def __init__(self, server: Server) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.to, self.is_open, self.prompts = server.url, True, 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def cut(self) -> None:
        if self.is_open:
            self.is_open = False
            self.shutdown()
            self.server_close()


class Passing(http.server.BaseHTTPRequestHandler):
    server: Way

    def do_GET(self, body: bytes | None = None) -> None:
        request = urllib.request.Request(self.server.to + self.path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            answer = reply.read()
        if self.server.is_open:
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    def do_POST(self) -> None:
        self.server.prompts += 1
        self.do_GET(self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, *_) -> None:
        pass


def test_one_of_two_goes_away_and_nothing_is_lost(server, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"a circle, the {i}th\n" for i in range(COUNT)))
    way = Way(server)

    def on_wait(made: int, of: int) -> None:
        if made >= 2 and way.prompts:
            way.cut()

    job = {"prompts": tmp_path / "prompts.txt", "out": tmp_path / "out", "workflow": WORKFLOW, "seed": 7}
    report = spread.run(**job, urls=[server.url, way.url], on_wait=on_wait)
    way.cut()
    assert (report["images"], report["failed"]) == (COUNT, 0) and way.prompts
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [file.name for file in files] == [f"{i:09d}.png" for i in range(COUNT)]
    assert len({file.read_bytes() for file in files}) == COUNT
    prompt = server.prompt_of(WORKFLOW)
    edit(prompt, "a circle, the 4th", None, 11)
    alone = server.view(server.images(server.run(prompt))[0])
    assert np.array_equal(pixels(alone), pixels(files[4].read_bytes()))
    assert spread.run(**job, urls=[server.url])["run"]["images"] == 0


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)))
