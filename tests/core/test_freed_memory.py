"""What a network freed is there for its next step, in our command lines alone, unless the user has it otherwise."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# MiB that stay in memory after blocks were filled and freed, five at a time and three times.
KEEP = """
import sys
sys.argv[0] = {argument!r}
import sprint_core

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

before = resident()
for _ in range(3):
    blocks = [bytearray({mib} << 20) for _ in range(5)]
    del blocks
print(resident() - before)
"""


def kept_mib(argument: str, block_mib: int = 24, **environment: str) -> int:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", KEEP.format(argument=argument, mib=block_mib)]
    ended = subprocess.run(command, env=own | environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(ended.stdout)


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="other C libraries have other heaps"
)


def test_command_lines_keep_it():
    assert kept_mib("-m") > 100  # of 120
    assert kept_mib("x.py") < 60  # as a library nothing is set


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_TRIM_THRESHOLD_": str(2**17)}, {"GLIBC_TUNABLES": f"glibc.malloc.trim_threshold={2**17}"}],
)
def test_what_the_user_has_set_stays(environment):
    assert kept_mib("-m", **environment) < 60


def test_large_blocks_go_back():
    assert kept_mib("-m", block_mib=48) < 60  # of 240
