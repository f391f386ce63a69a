"""The workflows in ComfyUI's own editor, in headless Chromium."""

import json
import re
from pathlib import Path

import pytest
from editor import overlaps

from launcher.prompt import api_prompt
from launcher.setup import PACK_NAME

CARD = re.compile("^template-workflow-")
OURS = re.compile("^template-workflow-SANA-Sprint ")
CATEGORY = "SANA-Sprint"  # as locales/ name the pack's folder, in every language
FIRST_IS_OURS = """() => document.querySelector('[data-testid^="template-workflow-"]')
    ?.dataset.testid.startsWith('template-workflow-SANA-Sprint ')"""
SETTLE_MS = 700  # until nodes have been measured
RUNS = ("02 Image to Image", "05 ControlNet Soft Edges")  # whose nodes say something, and show images
RUN = """() => {
    window.over = false;
    app.api.addEventListener('execution_success', () => { window.over = true }, { once: true });
    app.queuePrompt(0);
}"""
WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
UNKNOWN_NODES = "app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))"


def browse(editor) -> None:
    """To the pack's templates in the template browser."""
    editor.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    editor.get_by_role("dialog").get_by_text(CATEGORY, exact=True).click(timeout=60_000)


def listed(editor, count: int) -> list[str]:
    """The pack's templates in the order in which the template browser shows them."""
    cards = editor.get_by_test_id(OURS)
    cards.nth(count - 1).wait_for(timeout=60_000)
    return [card.get_attribute("data-testid").removeprefix("template-workflow-") for card in cards.all()]


def test_template_opens_runs_and_shows_its_image(editor, workflow_names, tmp_path):
    browse(editor)
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


@pytest.mark.parametrize("language", ["en", "ja"])
def test_category_has_the_models_name(editor, setting, language):
    """Not that of the folder; and so has the heading over the templates."""
    setting("Comfy.Locale", language, before="en")
    browse(editor)
    dialog = editor.get_by_role("dialog")
    dialog.get_by_text(CATEGORY, exact=True).nth(1).wait_for(timeout=60_000)
    assert dialog.get_by_text(PACK_NAME, exact=True).count() == 0


def test_sorted_by_name_templates_stand_in_the_order_of_their_numbers(editor, server, workflow_names):
    """Unsorted they stand as the file system lists them: ComfyUI's server and its page keep that order."""
    browse(editor)
    assert listed(editor, len(workflow_names)) == server.json("/workflow_templates")[PACK_NAME]
    editor.get_by_role("dialog").get_by_label("Sort by").click()
    editor.get_by_role("option", name="A → Z").click()
    editor.wait_for_timeout(SETTLE_MS)
    try:
        assert listed(editor, len(workflow_names)) == workflow_names
    finally:
        editor.wait_for_timeout(SETTLE_MS)  # until the page has saved the choice
        server.request("/settings", {"Comfy.Templates.SortBy": "default"})


@pytest.mark.parametrize("word", ["sana", "sprint"])
def test_search_finds_every_template_first(editor, server, word):
    """Before all that are a little like the word, and in the list's order, as no name has fewer words than others.

    Until the page has searched, it shows every template there is.
    """
    names = server.json("/workflow_templates")[PACK_NAME]
    editor.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    editor.get_by_test_id(CARD).first.wait_for(timeout=60_000)
    editor.get_by_role("dialog").get_by_role("textbox").fill(word)
    editor.wait_for_function(FIRST_IS_OURS, timeout=180_000)
    shown = [card.get_attribute("data-testid") for card in editor.get_by_test_id(CARD).all()][: len(names)]
    assert shown == [f"template-workflow-{name}" for name in names]


@pytest.mark.parametrize("is_vue", [False, True], ids=["classic", "nodes2"])
def test_no_node_lies_on_another_when_a_template_opens_and_when_it_has_run(editor, setting, workflow_names, is_vue):
    """As drawn: by the rectangles of the nodes, which notices and images make taller."""
    setting("Comfy.VueNodes.Enabled", is_vue, before=False)
    for name in workflow_names:
        ui = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
        editor.evaluate("async ui => { await app.loadGraphData(ui) }", ui)
        editor.wait_for_timeout(SETTLE_MS)
        assert overlaps(editor) == [], name
        if name.endswith(RUNS):
            editor.evaluate(RUN)
            editor.wait_for_function("window.over", timeout=120_000)
            editor.wait_for_timeout(SETTLE_MS)
            assert overlaps(editor) == [], f"{name}, after a run"


def test_editor_sends_what_we_send(editor, server, workflow):
    ui = json.loads(workflow.read_text(encoding="utf-8"))
    theirs = editor.evaluate(
        "async ui => { await app.loadGraphData(ui); return (await app.graphToPrompt()).output }", ui
    )
    assert editor.evaluate(UNKNOWN_NODES) == []
    assert theirs == api_prompt(ui, server.object_info())
