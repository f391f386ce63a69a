"""What a network freed is there for its next step, in our command lines alone, unless the user has said otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sprint_core.freed_memory import KEPT

ROOT = Path(__file__).resolve().parents[2]
# Pages of memory that the system had to give while blocks of 24 MiB were filled and freed, five at a time and again.
COUNT = """
import sys
sys.argv[0] = {argument!r}
import sprint_core
import resource

def turn():
    blocks = [bytearray(24 << 20) for _ in range(5)]
    del blocks

for _ in range(3):
    turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have other heaps")
@pytest.mark.parametrize(
    "argument, said, kept", [("-m", {}, True), ("x.py", {}, False), ("-m", {"TRIM": 2**17}, False)]
)
def test_freed_memory_is_kept(argument, said, kept):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {f"MALLOC_{name}_THRESHOLD_": str(value) for name, value in said.items()}
    command = [sys.executable, "-c", COUNT.format(argument=argument)]
    faults = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (int(faults) < 1000) == kept, faults


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have other heaps")
def test_large_blocks_go_back():
    assert KEPT["MALLOC_MMAP_THRESHOLD_"][1] == 32 << 20
    code = COUNT.format(argument="-m").replace("24 <<", "48 <<")
    faults = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(faults) > 10_000
