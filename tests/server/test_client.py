"""The client that run.py and these tests share, against the real server."""

import sys

import pytest

from launcher.client import Client, Server
from launcher.prompt import ComfyError

PREVIEW = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
GREY = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 2, "color": 0x808080}}


def test_images_of_a_prompt_come_back(server):
    save = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "client"}}
    images = server.images(server.run({"1": GREY, "2": save}))
    assert [image["type"] for image in images] == ["output"] * 2
    assert server.view(images[0]).startswith(b"\x89PNG")


def test_refused_prompt_names_the_node_and_the_input(server):
    with pytest.raises(ComfyError, match=r"node 1 \(EmptyImage\): .*width"):
        server.run({"1": {**GREY, "inputs": {**GREY["inputs"], "width": 0}}, "2": PREVIEW})


def test_unknown_node_is_refused(server):
    with pytest.raises(ComfyError, match="NoSuchNode"):
        server.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_failing_node_is_named_and_the_server_goes_on(server):
    load = {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}
    (server.base / "input" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ComfyError, match=r"node 1 \(LoadImage\): .*[Ii]mage"):
        server.run({"1": load, "2": PREVIEW})
    assert server.images(server.run({"1": GREY, "2": PREVIEW}))


def test_each_client_gets_the_history_of_its_own_prompt(server):
    other = Client(server.url)
    mine = server.queue({"1": GREY, "2": PREVIEW})
    theirs = other.queue({"1": {**GREY, "inputs": {**GREY["inputs"], "color": 1}}, "2": PREVIEW})
    assert other.wait(theirs)["prompt"][1] == theirs
    assert server.wait(mine)["prompt"][1] == mine


def test_server_that_does_not_start_shows_its_output(comfyui_path, tmp_path):
    log = tmp_path / "comfyui.log"
    with pytest.raises(ComfyError, match=r"(?s)ended with code 2.*--no-such-option"):
        Server(sys.executable, comfyui_path, tmp_path, log, ("--no-such-option",)).__enter__()


def test_a_port_in_use_is_said(server, comfyui_path, tmp_path):
    with pytest.raises(ComfyError, match=f"port {server.port} is in use"):
        Server(sys.executable, comfyui_path, tmp_path, tmp_path / "log", port=server.port).start()
