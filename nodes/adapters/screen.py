"""Messages to the user: on the node itself, and in the log."""

import logging

from comfy_execution.utils import get_executing_context

log = logging.getLogger(__name__)


def say(node_id: str | None, text: str) -> None:
    """Show a line on a node of the running graph. Quiet outside a server."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node_id)


def running_node() -> str | None:
    """The node that runs in this thread, for code that no node calls directly; None outside a graph."""
    context = get_executing_context()
    return None if context is None else context.node_id


def warn(node_id: str | None, text: str) -> None:
    """`say`, and a warning in the log."""
    log.warning("%s", text)
    say(node_id, text)
