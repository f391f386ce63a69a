"""torch.compile for the blocks of transformers: the same networks with the same names of tensors, in fewer kernels.

Blocks alone, as all blocks of a network share one compiled form, and as hooks around them, such as activation
checkpointing and the critic's, stay outside. A copy of a network, such as its moving average, is not compiled.
"""

from collections.abc import Iterable

import torch
from torch import nn

FORMS = 64  # of one block: networks, precisions, lengths of captions, with gradients and without, one by one and mixed


def check(device: torch.device) -> None:
    """Raises ValueError where nothing can be compiled."""
    try:
        if device.type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        else:
            from torch.utils._triton import has_triton

            if not has_triton():
                raise RuntimeError("Triton is missing")
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        needs = "a C++ compiler (apt install g++)" if device.type == "cpu" else "Triton (pip install triton)"
        raise ValueError(f"--compile: {why}; install {needs}, or leave the option out") from None


def compile_blocks(networks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile what is in each network's `transformer_blocks` when it runs next. Changes settings of this process."""
    from torch._functorch import config as differentiation

    torch._dynamo.config.recompile_limit = FORMS
    # Kept for a second backward pass through the same graph, which tells how loud each loss is.
    differentiation.donated_buffer = False
    for network in networks:
        for block in network.get_submodule("transformer_blocks").children():
            block.compile(backend=backend)
