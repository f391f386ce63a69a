"""The workflows in ComfyUI's own editor, in headless Chromium."""

import json
from pathlib import Path

from launcher.prompt import api_prompt
from launcher.setup import PACK_NAME

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
UNKNOWN_NODES = "app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))"


def test_template_opens_runs_and_shows_its_image(editor, workflow_names, tmp_path):
    editor.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    editor.get_by_text(PACK_NAME, exact=True).click(timeout=60_000)
    for name in workflow_names:
        editor.get_by_text(name).first.wait_for(timeout=30_000)
    editor.get_by_text("SANA-Sprint 01 Text to Image").first.click()
    editor.wait_for_function("app.graph.nodes.some(node => node.type.startsWith('SanaSprint'))", timeout=30_000)
    assert editor.evaluate(UNKNOWN_NODES) == []
    editor.evaluate("() => { app.queuePrompt(0) }")
    editor.wait_for_function(
        "app.graph.nodes.some(node => node.imgs?.some(image => image.complete && image.naturalWidth > 0))",
        timeout=300_000,
    )
    editor.screenshot(path=tmp_path / "image.png")


def test_editor_sends_what_we_send(editor, server, workflow):
    ui = json.loads(workflow.read_text(encoding="utf-8"))
    theirs = editor.evaluate(
        "async ui => { await app.loadGraphData(ui); return (await app.graphToPrompt()).output }", ui
    )
    assert editor.evaluate(UNKNOWN_NODES) == []
    assert theirs == api_prompt(ui, server.object_info())
