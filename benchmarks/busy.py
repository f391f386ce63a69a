"""Other processes that want the CPU, as on a desktop that does something else meanwhile."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

SPIN = "print(flush=True)\nwhile True: pass"


@contextlib.contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes spin, from here to the end of the block."""
    with contextlib.ExitStack() as ending:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE)
            ending.callback(process.wait)
            ending.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()  # it runs
            ending.callback(process.stdout.close)
        yield
