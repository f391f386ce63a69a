"""Lets the core tests import `sprint_core` from the repository, without installing it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
