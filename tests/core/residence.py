"""What of a mapped file is in memory (Linux)."""

from pathlib import Path

import torch


def resident_bytes(tensor: torch.Tensor) -> int:
    """How much of the memory map that a tensor lies in is resident."""
    here, size = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name and not name.endswith(":"):
            start, end = (int(number, 16) for number in name.split("-"))
            here = start <= tensor.data_ptr() < end
        elif here and name == "Rss:":
            size = 1024 * int(values[0])
    return size
