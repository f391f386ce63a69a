"""In both renderers: inputs that come with a choice, a prompt in each line, and a negative prompt."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sight import ground, shows

ROOT = Path(__file__).resolve().parents[2]
# A node's combo, and the inputs that come with its choice `custom`.
WITH_CUSTOM = {
    "SanaSprintSampler": ("schedule", ["schedule.angles"]),
    "SanaSprintSchedule": ("schedule", ["schedule.angles"]),
    "SanaSprintEmptyLatent": ("size", ["size.width", "size.height"]),
    "SanaSprintTextEncode": ("instruction", ["instruction.custom_instruction"]),
}
# The names of a node's values, on it and sent: as it is added, with `custom`, and with its first choice again.
CHOOSE = """async ([type, combo]) => {
    const node = LiteGraph.createNode(type);
    node.pos = [300, 200];
    app.graph.add(node);
    const widget = node.widgets.find(widget => widget.name === combo);
    const first = widget.value;
    const seen = [];
    for (const choice of [first, 'custom', first]) {
        widget.value = choice;
        widget.callback?.(choice);
        await new Promise(done => setTimeout(done, 100));
        const { inputs } = (await app.graphToPrompt()).output[node.id];
        seen.push([node.widgets.map(({ name }) => name), Object.keys(inputs), inputs[combo] === choice]);
    }
    return seen;
}"""
# Lines in the prompt, and a node of this pack between the model and the sampler that avoids another prompt.
AVOID = """async ({ ui, lines, negative, seed }) => {
    await app.loadGraphData(ui);
    const byType = type => app.graph.nodes.find(node => node.type === type);
    const slot = (node, name) => node.inputs.findIndex(input => input.name === name);
    const set = (node, values) => node.widgets.forEach(w => { if (w.name in values) w.value = values[w.name] });
    const add = (type, y) => { const n = LiteGraph.createNode(type); n.pos = [600, y]; app.graph.add(n); return n };
    const [loader, sampler] = [byType('SanaSprintLoader'), byType('SanaSprintSampler')];
    set(byType('SanaSprintTextEncode'), { text: lines.join('\\n'), one_prompt_per_line: true });
    set(byType('SanaSprintEmptyLatent'), { batch_size: lines.length });
    set(sampler, { seed });
    if (negative) {
        const [text, nag] = [add('SanaSprintTextEncode', 900), add('SanaSprintNegative', 1300)];
        set(text, { text: negative });
        loader.connect(1, text, slot(text, 'clip'));
        loader.connect(0, nag, slot(nag, 'model'));
        text.connect(0, nag, slot(nag, 'negative'));
        nag.connect(0, sampler, slot(sampler, 'model'));
    }
    return (await app.graphToPrompt()).output;
}"""


@pytest.fixture(params=[False, True], ids=["classic", "nodes2"])
def page(request, editor, setting):
    """The editor in each renderer."""
    if request.param:
        setting("Comfy.VueNodes.Enabled", True, before=False)
    return editor


def test_inputs_come_and_go_with_their_choice(page):
    """On the node and in what is sent."""
    for node, (combo, own) in WITH_CUSTOM.items():
        (shown, sent, _), (shown_custom, sent_custom, _), back = seen = page.evaluate(CHOOSE, [node, combo])
        assert all(chosen for *_, chosen in seen), node
        assert [name for name in shown_custom if name not in shown] == own, node
        assert [name for name in sent_custom if name not in sent] == own, node
        assert back[:2] == [shown, sent], node


def test_each_line_is_an_image_and_none_shows_what_is_to_be_avoided(page, server):
    """One of them stands on sky blue by some seed, until that is a negative prompt."""
    ui = json.loads((ROOT / "workflows" / "SANA-Sprint 01 Text to Image.json").read_text(encoding="utf-8"))
    lines = ["a red apple", "a slice of pizza"]

    def paint(seed: int, negative: str = "") -> list[np.ndarray]:
        prompt = page.evaluate(AVOID, {"ui": ui, "lines": lines, "negative": negative, "seed": seed})
        images = server.images(server.run(prompt, timeout=300))
        return [np.asarray(Image.open(io.BytesIO(server.view(image))).convert("RGB")) for image in images]

    for seed in range(16):  # not every seed's: docs/benchmarks.md says how many
        before, after = paint(seed), paint(seed, "a sky blue background")
        assert not any(map(np.array_equal, before, after))
        names = ("red apple", "pizza")
        if any(
            ground(one) == "sky blue" and shows(other, name, ground="white")
            for name, one, other in zip(names, before, after, strict=True)
        ):
            return
    raise AssertionError("no image leaves sky blue")
