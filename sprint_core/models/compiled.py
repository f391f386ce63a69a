"""torch.compile in place: a network keeps its names, weights and calls, so that hosts still patch and offload it."""

import functools

import torch
from torch import nn


def compile_in_place(*networks: nn.Module, backend: str = "inductor") -> None:
    """From now on a network's calls are compiled, anew for each of the first sizes of their inputs."""
    for network in networks:
        network.compile(backend=backend)


@functools.cache
def require_compiler(device_type: str, backend: str = "inductor") -> None:
    """Raises ValueError where torch.compile fails at its least, which takes some seconds to find out.

    It needs a C++ compiler, and Triton for a GPU.
    """
    try:
        torch.compile(torch.sin, backend=backend)(torch.zeros(16, device=device_type))
    except Exception as error:  # of whatever torch compiles with
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch cannot compile for {device_type} on this machine ({reason}); install a C++ compiler, and for a "
            "GPU the triton package, or do without compiling"
        ) from error
