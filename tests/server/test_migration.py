"""A graph with the SANA nodes of ComfyUI_ExtraModels, where that pack is not installed."""

import io

import numpy as np
import pytest
from foreign_graphs import PROMPT, SIDES, api_prompt
from PIL import Image

from launcher.prompt import ComfyError
from sprint_core.weights.presets import BUNDLED_NAME

pytestmark = pytest.mark.oldest


def image_of(server, prompt: dict) -> np.ndarray:
    (saved,) = server.images(server.run(prompt, timeout=300))
    return np.asarray(Image.open(io.BytesIO(server.view(saved))))


def test_their_graph_paints_what_ours_does(server):
    """A queued prompt is read with our nodes; the oracle is the same graph in ours, written here."""
    theirs = image_of(server, api_prompt())
    assert theirs.shape == (256, 192, 3)
    ours = api_prompt()
    ours["1"] = {"class_type": "SanaSprintLoader", "inputs": {"model": BUNDLED_NAME, "dtype": "auto"}}
    for node in ("4", "5"):
        ours[node] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": PROMPT}}
    # All of it is noised away: only its size counts.
    ours["6"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 2]}}
    ours["2"] = {"class_type": "EmptyImage", "inputs": SIDES | {"color": 0}}
    ours["8"]["inputs"]["vae"] = ["1", 2]
    del ours["3"]
    assert (theirs == image_of(server, ours)).all()


def test_the_editor_is_told_what_it_may_offer(server):
    offers, info = server.json("/node_replacements"), server.object_info()
    for old in {node["class_type"] for node in api_prompt().values()} - info.keys():
        (offer,) = offers[old]
        slots = info[offer["new_node_id"]]["input"]
        known = slots.get("required", {}) | slots.get("optional", {})
        assert all(one["new_id"].split(".")[0] in known for one in offer["input_mapping"]), old


@pytest.mark.parametrize("name", ["ScmModelSampling", "SanaResolutionSelect", "SanaResolutionCond"])
def test_what_has_no_counterpart_is_refused_by_name(server, name):
    prompt = api_prompt()
    prompt["10"] = {"class_type": name, "inputs": {"model": ["1", 0]}, "_meta": {"title": name}}
    prompt["7"]["inputs"]["model"] = ["10", 0]
    with pytest.raises(ComfyError, match=name):
        server.queue(prompt)
