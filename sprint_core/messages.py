"""What is said to people: one place that makes text fit for every log, terminal and screen.

Names of files and tensors, metadata and prompts come from others and may hold anything: bytes that are not UTF-8, which
Python keeps as lone surrogates, line breaks, colours of terminals, 10 MB of text. `CheckpointError` and `Log` pass all
they say through `readable`, and so does a host's screen.
"""

import io
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LONGEST = 3000  # characters of a message
LISTED = 5  # names in one
NOT_UTF8 = r"\xNN stands for a byte that is not UTF-8"
# Surrogates, control characters, line and paragraph separators, and marks that turn the direction of a line.
UNREADABLE = re.compile("[\ud800-\udfff\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
RAW_BYTE = re.compile("[\udc80-\udcff]")  # how Python keeps a byte of a name that is not UTF-8


class Places:
    """Folders that messages leave out, so that they say nothing of the user's machine; none without a host."""

    def __init__(self):
        self.prefixes: Callable[[], Mapping[str, str]] = dict  # {folder with its separator: what stands for it}

    def shortened(self, text: str) -> str:
        """The text with names in these folders, innermost first, instead of whole paths."""
        for folder, short in sorted(self.prefixes().items(), key=lambda pair: -len(pair[0])):
            text = text.replace(folder, short)
        return text


PLACES = Places()


def clipped(text: str, longest: int = LONGEST) -> str:
    """The text without its middle where it is longer: the name in front and the advice at the end remain."""
    if len(text) <= longest:
        return text
    return f"{text[: longest * 2 // 3]} ... {text[-(longest - longest * 2 // 3) :]}"


def listed(names: Sequence[str], most: int = LISTED) -> str:
    """The first few of some names: 'a, b, ...'."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _escaped(match: re.Match) -> str:
    code = ord(match[0])
    if RAW_BYTE.match(match[0]):
        return f"\\x{code - 0xDC00:02x}"
    return repr(match[0])[1:-1]


def readable(text: object) -> str:
    """One line that every stream of this process can carry, with the folders of `PLACES` left out.

    What cannot be shown is written as Python writes it: \\n, \\x1b, \\ud83d.
    """
    whole = PLACES.shortened(str(text))
    line = clipped(UNREADABLE.sub(_escaped, clipped(whole)))
    if RAW_BYTE.search(whole) and NOT_UTF8 not in line:
        line = f"{line} ({NOT_UTF8})"
    return encodable(line)


def encodable(text: str) -> str:
    """The text as this process's streams can carry it, with all else escaped."""
    for stream in (sys.stdout, sys.stderr):
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def carry_any_text() -> None:
    """Let this process's streams escape what they cannot encode, rather than raise; for command lines."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Log(logging.LoggerAdapter):
    """A logger whose lines are `readable`."""

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        if self.isEnabledFor(level):
            text = str(msg) % args if args else str(msg)
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
            self.logger.log(level, "%s", readable(text), **kwargs)


def logger(name: str) -> Log:
    return Log(logging.getLogger(name), {})
