"""Advice on the threads of a ComfyUI that runs on the CPU: torch is there already, so this pack cannot set them."""

import os
import sys

from comfy import model_management

from ...sprint_core import messages
from ...sprint_core.threads import WAIT_PASSIVELY

log = messages.logger(__name__)


def advise() -> None:
    """One line in the log where spinning threads may slow everything down."""
    on_cpu = model_management.get_torch_device().type == "cpu"
    if on_cpu and sys.platform == "linux" and not WAIT_PASSIVELY.keys() & os.environ.keys():
        setting = " ".join(f"{name}={value}" for name, value in WAIT_PASSIVELY.items())
        log.info(
            "on a CPU that is busy with other things, ComfyUI may be faster with %s set before it starts",
            setting,
        )
