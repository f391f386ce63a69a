"""What each part of an image costs on this machine, beside diffusers: python -m benchmarks."""

import sprint_core  # noqa: F401  before torch: it says how threads wait
