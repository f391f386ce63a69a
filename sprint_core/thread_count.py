"""How many of torch's threads run what follows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run what follows with so many of torch's threads; other threads of the process keep theirs.

    torch sets OpenMP's count for the calling thread. Only a thread that asks torch for its first operation meanwhile
    would inherit it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
