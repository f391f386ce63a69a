"""What the command lines share: a JSON document on the last line, or one line that says what is wrong."""

import json
import logging
from collections.abc import Callable

from tqdm import tqdm

from . import messages

log = messages.logger(__name__)


def run(work: Callable[[], dict]) -> int:
    """Run a command and return its exit status: 0 after its result, printed as JSON; 1 on ValueError and OSError."""
    messages.carry_any_text()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        result = work()
    except (ValueError, OSError) as error:
        log.error("error: %s", sentence(error))
        return 1
    tqdm.write(json.dumps(result))
    return 0


def sentence(error: Exception) -> str:
    """What an error says, after the file's name where it is the system's."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
