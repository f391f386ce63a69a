"""ComfyUI's page in headless Chromium: what the browser tests and make_graph.py share."""

from playwright.sync_api import Browser, Page, Playwright

from launcher.client import Client

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = "window.app?.graph && window.app.canvas && window.app.extensionManager?.command"


def launch_chromium(playwright: Playwright, chromium: str) -> Browser:
    return playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)


def open_editor(page: Page, server: Client) -> None:
    """To the editor, ready, without its first-run dialog."""
    server.request("/settings", {"Comfy.TutorialCompleted": True})
    page.goto(server.url)
    wait_until_ready(page)


def wait_until_ready(page: Page) -> None:
    page.wait_for_function(READY, timeout=90_000)
