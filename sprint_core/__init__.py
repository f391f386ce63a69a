"""SANA-Sprint (arXiv 2503.09641) without ComfyUI: read pipeline.py first."""

import os
import sys

from .freed_memory import keep_freed_memory
from .threads import WAIT_PASSIVELY

if sys.argv[:1] == ["-m"]:  # Python looks for one of our command lines, and nothing has imported torch yet
    os.environ.update(WAIT_PASSIVELY | os.environ)
    keep_freed_memory()
