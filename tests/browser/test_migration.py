"""The editor offers our nodes for those of ComfyUI_ExtraModels, and exchanges them when asked."""

import pytest
from foreign_graphs import NAMES, PROMPT, SIDES, workflow

from sprint_core.weights.presets import BUNDLED_NAME

TYPES = "() => Object.fromEntries(app.graph.nodes.map(node => [String(node.id), node.type]))"
OURS = {
    "1": "SanaSprintModelLoader",
    "2": "SanaSprintTextEncoderLoader",
    "3": "SanaSprintVAELoader",
    "4": "SanaSprintTextEncode",
    "5": "SanaSprintTextEncode",
    "6": "SanaSprintEmptyLatent",
}


@pytest.mark.parametrize("is_vue", [False, True], ids=["classic", "nodes2"])
def test_their_graph_stays_until_the_exchange_is_asked_for(editor, setting, is_vue):
    if is_vue:
        setting("Comfy.VueNodes.Enabled", True, before=False)
    editor.evaluate("async ui => { await app.loadGraphData(ui) }", workflow())
    editor.get_by_text("View details").click()
    replace = editor.get_by_role("button", name="Replace All")
    replace.wait_for()
    assert editor.evaluate(TYPES) == NAMES
    replace.click()
    editor.wait_for_function("app.graph.nodes.every(node => !node.type.startsWith('Gemma'))")
    assert editor.evaluate(TYPES) == NAMES | OURS
    prompt = editor.evaluate("async () => (await app.graphToPrompt()).output")
    inputs = {node: entry["inputs"] for node, entry in prompt.items()}
    assert (inputs["1"]["model"], inputs["2"]["text_encoder"], inputs["3"]["vae"]) == (BUNDLED_NAME,) * 3
    assert (inputs["4"]["text"], inputs["4"]["instruction"], inputs["4"]["clip"]) == (PROMPT, "model default", ["2", 0])
    assert (inputs["5"]["text"], inputs["5"]["instruction"], inputs["5"]["clip"]) == ("blurry", "off", ["2", 0])
    # The page hands no values to what comes with a choice: a custom size is then entered anew.
    assert inputs["6"] == {"size": "custom", "size.width": 1024, "size.height": 1024, "batch_size": SIDES["batch_size"]}
    sockets = {"model": ["1", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["6", 0]}
    assert inputs["7"].items() >= sockets.items()
    assert inputs["8"] == {"samples": ["7", 0], "vae": ["3", 0]}
