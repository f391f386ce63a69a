"""Devices and dtypes: what people may name, and tensors on their way between devices."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def usable_device(name: str) -> torch.device:
    """The device of this name, such as 'cpu' or 'cuda:1'. Raises ValueError where torch cannot use it."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the second from a torch without CUDA
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise ValueError(f"--device {name}: it holds no numbers; choose cpu or cuda")
    return device


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for it: AVX-512 BF16, which those with AMX have, too."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def cpu_has_amx() -> bool:
    """Whether the CPU multiplies tiles of matrices."""
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def copied(network: Network, dtype: torch.dtype) -> Network:
    """A copy in another dtype, without one in its own on the way."""
    memo: dict[int, object] = {id(x): nn.Parameter(x.to(dtype), requires_grad=False) for x in network.parameters()}
    return copy.deepcopy(network, memo)


def fp32(x: Tensor) -> Tensor:
    """x in fp32, for the few places that need it; float64 stays, so that derivatives can be checked in it."""
    return x if x.dtype == torch.float64 else x.float()


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x from the CPU to a device. A GPU copies it from pinned memory by itself, so that the CPU does not wait for it.

    (Compiled code cannot pin; there it contains the copy.)
    """
    if torch.device(device).type != "cuda" or torch.compiler.is_compiling():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
