"""What comes back into the editor: ready subgraphs, and the graph in a saved image."""

import base64
import io
import json
import time
from pathlib import Path

import pytest
import standin
from api_prompts import graph
from PIL import Image

from sprint_core.text.formats import load_instruction

ROOT = Path(__file__).resolve().parents[2]
SUBGRAPHS = sorted((ROOT / "subgraphs").glob("*.json"))
PAINTERS = [file for file in SUBGRAPHS if not file.stem.startswith("Enhance")]
COMPLETE = """async ui => {
    await app.loadGraphData(ui);
    const subgraph = app.graph.nodes[0];
    const add = (type, x) => { const n = LiteGraph.createNode(type); n.pos = [x, 200]; app.graph.add(n); return n };
    subgraph.connect(0, add('SaveImage', 800), 0);
    const slot = subgraph.inputs.findIndex(input => input.type === 'IMAGE');
    if (slot >= 0) add('LoadImage', -200).connect(0, subgraph, slot);
    return (await app.graphToPrompt()).output;
}"""
DROP = """async data => {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([bytes], 'image.png', { type: 'image/png' }));
    const canvas = document.querySelector('#graph-canvas');
    const { left, top } = canvas.getBoundingClientRect();
    const where = { bubbles: true, cancelable: true, clientX: left + 400, clientY: top + 300, dataTransfer: files };
    for (const name of ['dragenter', 'dragover', 'drop']) canvas.dispatchEvent(new DragEvent(name, where));
}"""


def test_comfyui_offers_the_subgraphs(server):
    ours = {entry["name"] for entry in server.json("/global_subgraphs").values() if "sana" in entry["name"].lower()}
    assert ours == {file.stem for file in SUBGRAPHS}


@pytest.mark.parametrize("file", PAINTERS, ids=[file.stem for file in PAINTERS])
def test_a_subgraph_paints(editor, server, file):
    """With nothing but a place to save to, and a drawing where it takes one."""
    drawing = Image.new("RGB", (256, 256))
    drawing.paste("white", (24, 90, 100, 166))
    drawing.save(server.base / "input" / "drawing.png")
    prompt = editor.evaluate(COMPLETE, json.loads(file.read_text(encoding="utf-8")))
    for node in prompt.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = "drawing.png"
    (saved,) = server.images(server.run(prompt, timeout=300))
    image = Image.open(io.BytesIO(server.view(saved)))
    assert image.size == (256, 256)
    if file.stem.startswith("Text"):
        (text,) = [n["inputs"]["text"] for n in prompt.values() if n["class_type"] == "SanaSprintTextEncode"]
        assert text == "a slice of pizza"


ENHANCE = """async ({ui, model}) => {
    await app.loadGraphData(ui);
    const enhance = app.graph.nodes[0];
    const add = (type, x, y) => {
        const node = LiteGraph.createNode(type);
        node.pos = [x, y];
        app.graph.add(node);
        return node;
    };
    const loader = add('SanaSprintLoader', -400, 200);
    const text = add('SanaSprintTextEncode', 800, 200);
    const shown = add('PreviewAny', 800, 600);
    loader.widgets.find(widget => widget.name === 'model').value = model;
    const slot = (node, name) => node.inputs.findIndex(input => input.name === name);
    loader.connect(1, enhance, slot(enhance, 'clip'));
    loader.connect(1, text, slot(text, 'clip'));
    enhance.connect(0, text, slot(text, 'text'));
    enhance.connect(0, shown, 0);
    const promoted = () => enhance.widgets.find(widget => widget.name === 'text');  // some time after the graph
    for (let i = 0; i < 100 && !promoted(); i++) await new Promise(done => setTimeout(done, 100));
    promoted().value = 'a {red|red} kite';
    return (await app.graphToPrompt()).output;
}"""


def test_enhance_prompt_stands_between_a_text_and_its_encoder(editor, server):
    """It writes what Generate Text does behind SANA's instruction, and Text Encode reads it."""
    (file,) = set(SUBGRAPHS) - set(PAINTERS)
    ui = json.loads(file.read_text(encoding="utf-8"))
    prompt = editor.evaluate(ENHANCE, {"ui": ui, "model": standin.NAME})
    nodes = {node["class_type"]: name for name, node in prompt.items()}
    (encoder,) = [node for node in prompt.values() if node["class_type"] == "SanaSprintTextEncode"]
    assert encoder["inputs"]["text"] == [nodes["TextGenerate"], 0]

    question = load_instruction() + "a red kite"
    settings = {"max_length": 256, "sampling_mode": "off", "prompt": question, "clip": [nodes["SanaSprintLoader"], 1]}
    prompt["plain"] = {"class_type": "TextGenerate", "inputs": settings}
    prompt["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["plain", 0]}}
    sampler = {"model": [nodes["SanaSprintLoader"], 0], "positive": [nodes["SanaSprintTextEncode"], 0]}
    painting = graph(sampler=sampler, decode={"vae": [nodes["SanaSprintLoader"], 2]})
    del painting["loader"], painting["text"]
    history = server.run(prompt | painting, timeout=300)
    texts = [output["text"] for output in history["outputs"].values() if "text" in output]
    assert len(texts) == 2 and texts[0] == texts[1] and len(texts[0][0]) > 20
    assert len(server.images(history)) == 1


def test_the_editors_wildcards_are_chosen_in_each_line(editor):
    ui = json.loads((ROOT / "workflows" / "SANA-Sprint 01 Text to Image.json").read_text(encoding="utf-8"))
    editor.evaluate("async ui => { await app.loadGraphData(ui) }", ui)
    values = {"text": "{a red|a red} circle\n{a|a} {blue|blue} square", "one_prompt_per_line": True}
    editor.evaluate(
        "values => app.graph.getNodeById(2).widgets.forEach(w => { if (w.name in values) w.value = values[w.name] })",
        values,
    )
    sent = editor.evaluate("async () => (await app.graphToPrompt()).output")["2"]["inputs"]
    assert sent["text"] == "a red circle\na blue square" and sent["one_prompt_per_line"] is True


def test_a_saved_image_restores_its_graph(editor, server):
    """A PNG from Save Image, dropped on the canvas: every node with every value."""
    ui = json.loads((ROOT / "workflows" / "SANA-Sprint 01 Text to Image.json").read_text(encoding="utf-8"))
    editor.evaluate("async ui => { await app.loadGraphData(ui) }", ui)
    editor.evaluate(
        "text => { app.graph.getNodeById(2).widgets.find(w => w.name === 'text').value = text }", "two crosses"
    )
    sent = editor.evaluate("async () => (await app.graphToPrompt()).output")
    before = set(server.json("/history"))
    editor.evaluate("() => { app.queuePrompt(0) }")
    deadline = time.monotonic() + 300
    while not (new := set(server.json("/history")) - before) and time.monotonic() < deadline:
        editor.wait_for_timeout(250)
    (done,) = new
    (saved,) = server.images(server.json(f"/history/{done}")[done])
    image = server.view(saved)
    editor.evaluate("() => { app.graph.clear() }")
    editor.evaluate(DROP, base64.b64encode(image).decode())
    editor.wait_for_function("app.graph.nodes.some(node => node.type === 'SanaSprintSampler')", timeout=60_000)
    restored = editor.evaluate("async () => (await app.graphToPrompt()).output")
    for node in (*sent.values(), *restored.values()):
        node["inputs"].pop("seed", None)  # drawn anew after each run, as the workflow says
    assert restored == sent
