"""Ending a training before its end, with everything saved: at a signal, or when its hours are over."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # of a cluster's scheduler, and Ctrl+C


class Stopped(Exception):
    """A training that has saved its state and goes on with the same command. stage: its name; step: how far it came."""

    def __init__(self, stage: str, step: int, reason: str):
        super().__init__(f"{stage} stopped after step {step}, {reason}: the same command continues")
        self.stage, self.step = stage, step


class Stop:
    """Whether a training is asked to stop. max_hours: counted from now."""

    def __init__(self, max_hours: float = math.inf):
        if not max_hours > 0:
            raise ValueError(f"--max-hours {max_hours}: more than 0 is needed")
        self.max_hours = max_hours
        self._ends = time.monotonic() + 3600 * max_hours
        self._signal: int | None = None

    @property
    def reason(self) -> str:
        """Why to stop; '' where there is no reason."""
        if self._signal is not None:
            return f"as asked by {signal.Signals(self._signal).name}"
        return f"its {self.max_hours:g} hours being over" if time.monotonic() >= self._ends else ""

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile a signal asks to stop, and a second one does what it otherwise does. In the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {int(number): signal.signal(number, self._ask) for number in SIGNALS}
        self._former = former
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(number, self._former[number])
