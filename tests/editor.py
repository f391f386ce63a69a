"""ComfyUI's page in headless Chromium: what the browser tests and the tools that photograph it share."""

import contextlib
import itertools
from collections.abc import Iterator

from playwright.sync_api import Browser, FloatRect, Page, Playwright

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
# What would lie over the graph, and name this pack over each of its nodes: the setting, and how to do without.
PLAIN = {"Comfy.Minimap.Visible": False, "Comfy.NodeBadge.NodeSourceBadgeMode": "None"}
ORDINARY = {"Comfy.Minimap.Visible": True, "Comfy.NodeBadge.NodeSourceBadgeMode": "Hide built-in"}
# The corners of all nodes and groups, titles included, on the page.
CORNERS = """() => {
    const groups = app.graph.groups.map(({ pos, size }) => [...pos, ...size]);
    const boxes = [...app.graph.nodes.map(node => node.getBounding()), ...groups];
    const low = [0, 1].map(i => Math.min(...boxes.map(box => box[i])));
    const high = [0, 1].map(i => Math.max(...boxes.map(box => box[i] + box[i + 2])));
    const canvas = document.getElementById('graph-canvas').getBoundingClientRect();
    return [low, high].map(at => app.canvas.ds.convertOffsetToCanvas(at).map((x, i) => x + [canvas.x, canvas.y][i]));
}"""
# Every node as it is drawn: its name, and left, top, right and bottom in the graph's own pixels, title included.
BOXES = """() => {
    const page = document.getElementById('graph-canvas').getBoundingClientRect();
    const { scale, offset } = app.canvas.ds;
    return app.graph.nodes.map(node => {
        const drawn = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`);
        if (!drawn) {
            const [x, y, width, height] = node.getBounding();
            return [`${node.id} ${node.title}`, x, y, x + width, y + height];
        }
        const box = drawn.getBoundingClientRect();
        const [x, y] = [(box.x - page.x) / scale - offset[0], (box.y - page.y) / scale - offset[1]];
        return [`${node.id} ${node.title}`, x, y, x + box.width / scale, y + box.height / scale];
    });
}"""
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


@contextlib.contextmanager
def plain_canvas(server: Client) -> Iterator[None]:
    """Settings for photographs, while it lasts."""
    before = ORDINARY | {name: value for name, value in server.json("/settings").items() if name in PLAIN}
    server.request("/settings", PLAIN)
    try:
        yield
    finally:
        server.request("/settings", before)


def overlaps(page: Page) -> list[str]:
    """The pairs of nodes of the open graph that lie on each other, by a pixel or more."""
    pairs = itertools.combinations(page.evaluate(BOXES), 2)
    apart = lambda a, b: a[3] <= b[1] + 1 or a[4] <= b[2] + 1  # noqa: E731
    return [f"{a[0]} on {b[0]}" for a, b in pairs if not apart(a, b) and not apart(b, a)]


def graph_clip(page: Page, margin_px: int) -> FloatRect:
    """What of the page to photograph: all nodes, with a margin."""
    (left, top), (right, bottom) = page.evaluate(CORNERS)
    width, height = right - left + 2 * margin_px, bottom - top + 2 * margin_px
    return {"x": left - margin_px, "y": top - margin_px, "width": width, "height": height}
