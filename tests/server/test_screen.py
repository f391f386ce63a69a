"""What nodes show while they run, as the editor hears it: over ComfyUI's WebSocket."""

import asyncio
import json
import struct

import aiohttp
import pytest
from api_prompts import graph, with_model

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
