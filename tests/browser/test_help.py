"""Help pages and other languages, as ComfyUI's editor shows them."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPEN = """async name => {
    app.graph.clear();
    const node = LiteGraph.createNode(name);
    node.pos = [500, 300];
    app.graph.add(node);
    app.canvas.selectNode(node);
}"""
SCHEDULE = "app.graph.nodes[0].widgets.find(widget => widget.name === 'schedule')"


def show(editor, name: str) -> None:
    """One node alone, selected. The graph that the editor starts with may come late, and take its place."""
    for _ in range(12):
        editor.evaluate(OPEN, name)
        editor.wait_for_timeout(2500)
        if editor.get_by_test_id("info-button").count():
            return
    raise AssertionError(f"{name} cannot be selected")


def test_help_opens_beside_the_graph(editor, tmp_path):
    """The page of a node, with its image."""
    show(editor, "SanaSprintControlNetApply")
    editor.get_by_test_id("info-button").first.click()
    editor.get_by_text("Lets edges or a drawing decide").first.wait_for(timeout=60_000)
    loaded = "Array.from(document.images).some(i => i.src.endsWith('SanaSprintControlNetApply.png') && i.naturalWidth)"
    editor.wait_for_function(loaded, timeout=60_000)
    editor.screenshot(path=tmp_path / "help.png")


def test_nodes_speak_the_users_language(editor, setting, tmp_path):
    setting("Comfy.Locale", "ja", before="en")
    name = json.loads((ROOT / "locales" / "ja" / "nodeDefs.json").read_text(encoding="utf-8"))["SanaSprintSampler"]
    show(editor, "SanaSprintSampler")
    title = "app.graph.nodes[0].title"
    editor.wait_for_function(f"{title} === {json.dumps(name['display_name'])}", timeout=60_000)
    labels = editor.evaluate("app.graph.nodes[0].inputs.map(slot => slot.label ?? slot.localized_name)")
    assert name["inputs"]["positive"]["name"] in labels
    words = json.loads((ROOT / "locales" / "ja" / "main.json").read_text(encoding="utf-8"))["sanaSprint"]["options"]
    shown = editor.evaluate(f"(({{ options, value }}) => [options.getOptionLabel(value), value])({SCHEDULE})")
    assert shown == [words["auto"], "auto"]
    editor.screenshot(path=tmp_path / "japanese.png")
