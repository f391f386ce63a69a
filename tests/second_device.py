"""Builds and registers the second device (device/second_device.cpp), torch.device("second"). Needs a C++ compiler.

The built library is kept in .host/, by the versions of torch and of the source.
"""

import hashlib
import os
import shutil
import sysconfig
import types
from pathlib import Path

import torch

NAME = "second"
HERE = Path(__file__).parent
SOURCE = HERE / "device" / "second_device.cpp"
FOLDER = HERE.parent / ".host" / "second_device"


def can_build() -> bool:
    """Whether a compiler, ninja and Python's headers are there."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return header.is_file() and all(map(shutil.which, (os.environ.get("CXX", "c++"), "ninja")))


def _library():
    from torch.utils.cpp_extension import load

    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    folder = FOLDER / digest
    folder.mkdir(parents=True, exist_ok=True)
    return load(f"second_device_{digest}", [str(SOURCE)], extra_cflags=["-O1"], build_directory=str(folder))


def register():
    """Makes the device known to torch. Returns the library: reset() and counts()."""
    library = _library()
    library.init()
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    values = {
        "is_available": True, "is_initialized": True, "_is_in_bad_fork": False, "device_count": 1,
        "current_device": 0, "manual_seed_all": None, "synchronize": None, "set_device": None, "_lazy_init": None,
        "set_rng_state": None, "get_rng_state": torch.empty(0, dtype=torch.uint8), "is_autocast_enabled": False,
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    }  # fmt: skip
    for name, value in values.items():
        setattr(module, name, lambda *_, value=value: value)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return library
