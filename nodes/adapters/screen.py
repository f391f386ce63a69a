"""Messages to the user: on the node itself, in the log, and in the error that a run ends with.

ComfyUI prints an error with its class, and each line of its way through the code. What people can mend needs none of
that: at the edge of this pack it becomes a ValueError of one sentence.
"""

import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
from comfy_execution.utils import get_executing_context

from ...sprint_core import messages

log = messages.logger(__name__)

PACK = "sana-sprint"
LONGEST = 400  # characters on a node
_held: set[str] = set()  # nodes that show a fault or a warning, until they run again


def server() -> Any | None:
    """ComfyUI's PromptServer; None where there is none, as in tools."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def say(node_id: str | None, text: str) -> None:
    """Show a line on a node of the running graph. Quiet outside a server."""
    running = server()
    if running is not None and node_id is not None and hasattr(running, "send_progress_text"):
        running.send_progress_text(messages.clipped(messages.readable(text), LONGEST), node_id)


def warn(node_id: str | None, text: str) -> None:
    """`say`, and a warning in the log."""
    log.warning("%s", text)
    say(node_id, text)


def running_node() -> str | None:
    """The node that ComfyUI runs now, of any pack; None outside a run."""
    context = get_executing_context()
    return None if context is None else context.node_id


def hold(text: str) -> None:
    """Show a line on the running node until it runs again."""
    if (node_id := running_node()) is not None:
        _held.add(node_id)
        say(node_id, text)


def release() -> None:
    """Take away what `hold` has shown."""
    if (node_id := running_node()) in _held:
        _held.discard(node_id)
        say(node_id, "")


def places() -> dict[str, str]:
    """What messages write for folders of this machine: names in ComfyUI's model folders, as the loaders list them."""
    roots = {root for folders, _ in folder_paths.folder_names_and_paths.values() for root in folders}
    known = dict.fromkeys((*roots, folder_paths.models_dir, folder_paths.base_path), "")
    here = Path(__file__)
    ours = dict.fromkeys((str(here.parents[2]), str(here.resolve().parents[2])), f"{PACK}/")
    shortened = {os.path.expanduser("~"): "~/"} | known | ours
    return {os.path.join(folder, ""): short for folder, short in shortened.items() if len(folder) > 1}


def require(**inputs: Any) -> None:
    """Refuse inputs that came as None, which other packs' nodes hand over. Raises ValueError."""
    if missing := [name for name, value in inputs.items() if value is None]:
        raise ValueError(f"{', '.join(missing)}: nothing came in; the node that is connected there made none, check it")


def one_sentence(method: Callable, *, keep: bool = False) -> Callable:
    """Of what ComfyUI calls: an error that people can mend leaves it as ValueError of one sentence, shown on the node.

    Such are the ValueErrors that this pack raises, and files that cannot be opened. All others, which are faults of
    some program, pass with their lines of code, if the log can take them. keep: the node goes on showing what it shows,
    as this is not where it begins.
    """

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not keep:
            release()
        try:
            return method(*args, **kwargs)
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            mendable = _mendable(error)
            if not mendable and _encodable(trace):
                raise
            sentence = _sentence(error)
        # Outside the handler: an error that came before would be printed as well.
        for line in trace.splitlines():
            log.debug("%s", line)
        hold(sentence)
        raise ValueError(sentence) if mendable else RuntimeError(sentence)

    # So that no path of this machine is in the lines that ComfyUI prints and keeps.
    wrapper.__code__ = wrapper.__code__.replace(co_filename=f"{PACK}/nodes/adapters/{Path(__file__).name}")
    return functools.update_wrapper(wrapper, method)


def fault_of(check: Callable, *args: Any) -> bool | str:
    """For a node's `validate_inputs`: the sentence of the ValueError that a check raises, or True.

    Values that other nodes hand over come as None, as they are not known before a run: then nothing is checked.
    """
    if any(arg is None for arg in args):
        return True
    try:
        check(*args)
    except ValueError as error:
        return messages.readable(error)
    return True


def _mendable(error: Exception) -> bool:
    if isinstance(error, OSError) and error.filename is not None:
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError | OSError) and frame.f_globals["__name__"].startswith(
        __name__.split(".nodes.")[0]
    )


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return messages.readable(f"{os.fsdecode(error.filename)}: {error.strerror}; check the file and who may read it")
    return messages.readable(str(error) or type(error).__name__)


def _encodable(text: str) -> bool:
    """Whether the streams that ComfyUI's log goes to take it: where they do not, its worker thread ends."""
    return messages.encodable(text) == text
