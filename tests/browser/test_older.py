"""Graphs that ComfyUI's page saved with version 0.1.0 of this pack, before choices brought inputs of their own."""

import json
from pathlib import Path

import pytest

SAVED = Path(__file__).with_name("version_0_1_0.json")
SCHEDULE, SAMPLER, LATENT, TEXT = (f"SanaSprint{name}" for name in ("Schedule", "Sampler", "EmptyLatent", "TextEncode"))
# In the order in which they were added: a node, and what it says today.
TODAY = [
    (SCHEDULE, {"steps": 3, "schedule": "paper", "denoise": 0.5}),
    (SCHEDULE, {"steps": 2, "schedule": "custom", "schedule.angles": "1.5, 1.0, 0.4", "denoise": 0.75}),
    (SCHEDULE, {"steps": 2, "schedule": "custom", "schedule.angles": ["11", 0], "denoise": 1}),
    (SAMPLER, {"seed": 7, "guidance": 4, "steps": 4, "schedule": "app", "denoise": 0.5, "latent_image": ["6", 0]}),
    (SAMPLER, {"seed": 8, "guidance": 4.5, "steps": 2, "schedule": "custom", "schedule.angles": "1", "denoise": 0.25}),
    (LATENT, {"size": "16:9, 1344 x 768", "batch_size": 3}),
    (LATENT, {"size": "custom", "size.width": 640, "size.height": 320, "batch_size": 2}),
    (LATENT, {"size": "custom", "size.width": ["12", 0], "size.height": 320, "batch_size": ["12", 0]}),
    (TEXT, {"text": "a cat", "instruction": "off", "prompt_format": "diffusers", "one_prompt_per_line": False}),
    (
        TEXT,
        {
            "text": "a dog",
            "instruction": "custom",
            "instruction.custom_instruction": "Draw: ",
            "prompt_format": "authors",
            "one_prompt_per_line": False,
        },
    ),
]
SENT = "async () => (await app.graphToPrompt()).output"


@pytest.mark.parametrize("renderer", ["classic", "nodes2"])
def test_an_older_graph_says_the_same(editor, setting, renderer, tmp_path):
    """In today's words; so it does when it is saved anew and loaded again."""
    if renderer == "nodes2":
        setting("Comfy.VueNodes.Enabled", True, before=False)
    ui = json.loads(SAVED.read_text(encoding="utf-8"))
    for _ in range(2):
        editor.evaluate("async ui => { await app.loadGraphData(ui) }", ui)
        sent = editor.evaluate(SENT)
        assert [(node["class_type"], node["inputs"]) for node in list(sent.values())[: len(TODAY)]] == TODAY
        sockets = editor.evaluate("app.graph.nodes.map(node => node.inputs.map(input => input.name)).flat()")
        assert not {"angles", "width", "height", "custom_instruction"} & set(sockets)
        ui = editor.evaluate("() => app.graph.serialize()")
    editor.screenshot(path=tmp_path / "older.png")
