"""Weights in parts over the processes (FSDP2): each keeps a part of a transformer, its gradients, moments and average.

A block's weights are gathered when it runs, and let go after it. The function is PyTorch's `fully_shard`, which
Accelerate's plugin of FSDP2 calls as well; that plugin wraps a module that is called whole, and sCM calls a student's
transformer alone. The critic's heads, which are small, stay whole in every process.
"""

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .processes import ProcessGroup

Network = TypeVar("Network", bound=nn.Module)
BLOCKS = "transformer_blocks"


def shard(module: nn.Module, processes: ProcessGroup) -> None:
    """Leave to each process its part of a transformer, and of modules beside it, that is the same in all of them.

    A module without a transformer stays whole. (Beside one it may not: an optimizer takes no mixture.)
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for part in _parts(module) if is_shared(module) else ():
        for block in part.get_submodule(BLOCKS).children() if _is_transformer(part) else ():
            fully_shard(block, mesh=mesh)
        fully_shard(part, mesh=mesh, reshard_after_forward=True)  # what is around blocks, too


def is_shared(module: nn.Module) -> bool:
    """Whether there is a transformer in it, so that each process takes a part of it."""
    return any(map(_is_transformer, _parts(module)))


def _parts(module: nn.Module) -> list[nn.Module]:
    return [module] if _is_transformer(module) else [*module.children()]


def _is_transformer(module: nn.Module) -> bool:
    return isinstance(getattr(module, BLOCKS, None), nn.ModuleList)


def gather(module: nn.Module) -> None:
    """Gather what lies in parts until it has run once: forward-mode differentiation cannot while it runs."""
    for network in module.modules():
        if unshard := getattr(network, "unshard", None):  # as every FSDPModule has
            unshard()


def is_part(tensor: Tensor | None) -> bool:
    """Whether the tensor is a DTensor, known by its mesh: the import of the class takes a second."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this may be a part. All processes must ask."""
    return cast(Any, tensor).full_tensor() if is_part(tensor) else tensor


def state(module: nn.Module, keeps: bool = True) -> dict[str, Tensor]:
    """A module's whole tensors, on the CPU. All processes must ask, of which those that keep nothing get nothing."""
    return _on_cpu(module.state_dict(), keeps)


def optimizer_state(optimizer: torch.optim.Optimizer, keeps: bool = True) -> dict[str, Any]:
    """The same of an optimizer, in the form of its state_dict."""
    document = optimizer.state_dict()
    return document | {"state": {number: _on_cpu(of, keeps) for number, of in document["state"].items()}}


def _on_cpu(tensors: dict[str, Any], keeps: bool) -> dict[str, Any]:
    gathered = ((name, whole(tensor)) for name, tensor in tensors.items())  # one at a time, and at once off the device
    return {name: tensor.detach().cpu() for name, tensor in gathered if keeps}


def load(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put whole tensors into a module, of which this process may have parts. Raises RuntimeError for other ones."""
    own = module.state_dict()
    module.load_state_dict({name: _part(tensor, own.get(name)) for name, tensor in tensors.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, document: dict[str, Any]) -> None:
    """The same of an optimizer."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    parts = {
        number: {name: _part(value, parameters.get(number)) for name, value in of.items()}
        for number, of in document["state"].items()
    }
    optimizer.load_state_dict(document | {"state": parts})


def _part(tensor: Tensor, of: Tensor | None) -> Tensor:
    """This process's rows of a whole tensor, as it has those of a parameter; what has no row for each stays whole."""
    if of is None or not is_part(of) or not tensor.ndim:
        return tensor
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placement = Shard(0) if len(tensor) == len(of) else Replicate()
    mesh = cast(Any, of).device_mesh
    return distribute_tensor(tensor.to(of.device), mesh, [placement], src_data_rank=None)


def like(module: Network) -> Network:
    """A module of the same shapes without data, to gather this one into once it lies in parts."""
    return copy.deepcopy(module).to("meta")


def gathered(module: nn.Module, into: Network, device: torch.device) -> Network:
    """Fill `into`, of the same shapes, with all of the module. All processes must ask."""
    tensors = {name: whole(tensor).detach().to(device) for name, tensor in module.state_dict().items()}
    into.load_state_dict(tensors, assign=True)
    return into.requires_grad_(False)
