"""Headless Chromium on a running ComfyUI."""

import os
from pathlib import Path

import pytest
import sheet
from editor import launch_chromium, open_editor, wait_until_ready
from playwright.sync_api import sync_playwright

from launcher.setup import PACK_NAME
from sprint_core.weights.presets import BUNDLED_NAME

HERE = Path(__file__).parent
APPLE = {"text": "a red apple", "seed": 4, "control_after_generate": "fixed", "mode": "lines"}


def pytest_collection_modifyitems(config, items):
    """A page and a server beside other work: what fails is tried once more, and pytest's summary says so."""
    if config.pluginmanager.hasplugin("rerunfailures"):
        for item in items:
            if item.path.parent == HERE:
                item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(scope="module")  # not longer: Playwright's event loop runs as long, and no other may beside it
def chromium():
    path = os.environ.get("SPRINT_CHROMIUM")
    if not path:
        pytest.fail("SPRINT_CHROMIUM names no browser: install Chromium, run `python run.py test`", pytrace=False)
    with sync_playwright() as playwright:
        browser = launch_chromium(playwright, path)
        yield browser
        browser.close()


@pytest.fixture
def editor(chromium, server):
    """ComfyUI's page, ready, without its first-run dialog; at the end no error may have come from this pack."""
    page = chromium.new_page(viewport={"width": 1400, "height": 900})
    errors = []
    page.on("console", lambda m: m.type == "error" and errors.append(f"{m.text} ({m.location['url']})"))
    page.on("pageerror", lambda error: errors.append(error.stack or str(error)))
    open_editor(page, server)
    yield page
    page.close()
    # The editor asks for a help page in the user's language first, and a test may have stopped the server.
    usual = ("404", "/docs/"), ("WebSocket", "net::ERR_"), ("WebSocket", "Connection closed before receiving")
    ours = [error for error in errors if PACK_NAME in error]
    assert not [error for error in ours if not any(a in error and b in error for a, b in usual)]


@pytest.fixture
def setting(editor, server):
    """Change one of the editor's settings, reload, and put it back at the end."""
    changed = {}

    def change(name, value, before):
        changed[name] = before
        server.request("/settings", {name: value})
        editor.reload()
        wait_until_ready(editor)

    yield change
    for name, before in changed.items():
        server.request("/settings", {name: before})


@pytest.fixture(params=["classic", "nodes2"])
def page(request, editor, setting):
    """The editor with one live canvas, in each renderer."""
    if request.param == "nodes2":
        setting("Comfy.VueNodes.Enabled", True, before=False)
    sheet.build(editor, BUNDLED_NAME, f"{BUNDLED_NAME} ControlNet", **APPLE)
    yield editor
    editor.evaluate("() => app.graph.clear()")  # closes the connection, and with it what is live
