"""What nodes show while they run, as the editor hears it: over ComfyUI's WebSocket."""

import asyncio
import json
import struct

import aiohttp
import pytest
from api_prompts import custom_size, graph, with_model

from launcher.prompt import ComfyError

TEXT = 3  # ComfyUI's number for text on a node, in front of a binary message


def heard(server, prompt: dict) -> list[tuple[str, str]]:
    """(node, text) of all that nodes show during a prompt, which may fail."""

    async def listen() -> list[tuple[str, str]]:
        shown = []
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/ws?clientId=editor") as socket:
            body = {"prompt": prompt, "client_id": "editor"}
            async with session.post(f"{server.url}/prompt", json=body) as reply:
                prompt_id = (await reply.json())["prompt_id"]
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY and struct.unpack(">I", message.data[:4])[0] == TEXT:
                    end = 8 + struct.unpack(">I", message.data[4:8])[0]
                    shown.append((message.data[8:end].decode(), message.data[end:].decode()))
                elif message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    ended = event["type"] in ("execution_success", "execution_error")
                    if ended and event["data"]["prompt_id"] == prompt_id:
                        return shown
        raise ConnectionError("ComfyUI closed the connection")

    return asyncio.run(asyncio.wait_for(listen(), 120))


def ksampler(cfg: float, seed: int) -> dict:
    inputs = {"model": ["loader", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["latent", 0]}
    inputs |= {"seed": seed, "steps": 1, "cfg": cfg, "sampler_name": "lcm", "scheduler": "simple", "denoise": 1.0}
    return graph() | {"sampler": {"class_type": "KSampler", "inputs": inputs}}


def test_an_error_is_on_its_node_until_it_runs_again(server):
    path = server.base / "models" / "diffusion_models" / "later.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    prompt = with_model(server, path.name)
    assert ("model", "later.safetensors: the file is empty; download it again") in heard(server, prompt)
    whole = server.base / "models" / "diffusion_models" / "Sana_Sprint_0.6B_1024px_fp8.safetensors"
    path.write_bytes(whole.read_bytes())
    texts = [text for node, text in heard(server, prompt) if node == "model"]
    path.unlink()
    assert texts == [""]


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("inputs", "shown"),
    [
        ({"steps": 1}, "1 step, angles by the paper: 1.571"),
        ({"steps": 4}, "4 steps, angles by the paper: 1.568, 1.3, 1.1, 0.6"),
        ({"steps": 5}, "5 steps, angles by the authors' app: 1.571, 1.257, 0.9425, 0.6283, 0.3142"),
        ({"steps": 2, "schedule": "app", "denoise": 0.5}, "2 steps, angles by the authors' app: 0.7854, 0.65"),
        ({"schedule": "custom", "schedule.angles": "1.5, 1, 0.4"}, "3 steps, angles as entered: 1.5, 1, 0.4"),
    ],
)
def test_the_sampler_shows_its_steps_and_angles(server, inputs, shown):
    assert ("sampler", shown) in heard(server, graph(sampler=inputs))


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("inputs", "shown"),
    [
        (custom_size(64, 96), "64 x 96 pixels"),
        (custom_size(100, 64), "100 x 64 rounded to 96 x 64"),
        ({"size": "1:1, 1024 x 1024", "model": ["loader", 0]}, "256 x 256 pixels, the model's own size"),
        ({"size": "16:9, 1344 x 768", "model": ["loader", 0]}, "320 x 192 pixels, the model's own size"),
        ({"size": "1344 x 768", "model": ["loader", 0]}, "320 x 192 pixels, the model's own size"),
    ],
    ids=["custom", "rounded", "square", "wide", "older"],
)
def test_the_latent_shows_the_size_that_is_made(server, inputs, shown):
    assert ("latent", shown) in heard(server, graph(latent=inputs))


def test_stock_nodes_show_what_this_pack_refuses_there(server):
    prompt = ksampler(1.0, 1)
    prompt["latent"] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 64}}
    prompt["latent"]["inputs"] |= {"length": 1, "batch_size": 1}
    shown = dict(heard(server, prompt))
    assert shown["sampler"].startswith("this latent is a video's, of shape")
    with pytest.raises(ComfyError, match=r"\(KSampler\): ValueError: this latent is a video's"):
        server.run(prompt, timeout=120)


def test_ksampler_shows_what_it_does_with_cfg_until_it_is_1(server):
    for seed in (1, 2):  # at each run, though the log says it once
        texts = [text for node, text in heard(server, ksampler(8.0, seed)) if node == "sampler"]
        assert texts[-1].startswith("SANA-Sprint has its guidance built in: cfg 8 is treated as 1")
    assert [text for node, text in heard(server, ksampler(1.0, 1)) if node == "sampler"] == [""]
