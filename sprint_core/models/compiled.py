"""torch.compile in place: a network keeps its names, weights and calls, so that hosts still patch and offload it."""

import functools

import torch
from torch import nn


def compile_in_place(*networks: nn.Module, backend: str = "inductor") -> None:
    """Compile the calls of each network from now on, anew for each of the first sizes of their inputs."""
    for network in networks:
        network.compile(backend=backend)


@functools.cache
def require_compiler(device_type: str) -> None:
    """Raise ValueError where torch.compile cannot compile even a sine, which takes some seconds to find out.

    It needs a C++ compiler, and Triton for a GPU.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(16, device=device_type))
    except Exception as error:  # each compiler that torch uses has its own exceptions
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch cannot compile for {device_type} on this machine ({reason}); install a C++ compiler, and for a "
            "GPU the triton package, or do without compiling"
        ) from error
