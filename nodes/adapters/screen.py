"""Messages to the user: on the node itself, and in the log."""

import logging

log = logging.getLogger(__name__)


def say(node_id: str | None, text: str) -> None:
    """Show a line on a node of the running graph. Quiet outside a server."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node_id)


def warn(node_id: str | None, text: str) -> None:
    """`say`, and a warning in the log."""
    log.warning("%s", text)
    say(node_id, text)
