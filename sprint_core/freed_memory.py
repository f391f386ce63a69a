"""Memory that was freed: kept for the next tensors, not given back to the system, which would clear it for them anew.

Linux's C library gives back what a network frees, as soon as more than 64 MiB at the end of the heap are free. Taking
it again, page by page, was a fifth of a step (docs/benchmarks.md). Blocks above 32 MiB still go back, since a heap with
holes for images would be half as large again. Other threads, as the one of ComfyUI's prompts, have heaps of their own,
for which this does nothing.
"""

import ctypes
import os
import sys

KEPT = {"MALLOC_TRIM_THRESHOLD_": (-1, 2**30), "MALLOC_MMAP_THRESHOLD_": (-3, 2**25)}  # numbers for mallopt(3), bytes


def keep_freed_memory() -> None:
    """For this process, where the environment does not say otherwise."""
    tuned = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and not tuned and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for name, (number, value) in KEPT.items():
            if name not in os.environ:
                libc.mallopt(number, value)
