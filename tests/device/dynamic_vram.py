"""ComfyUI's dynamic VRAM on the second device: what comfy-aimdo's native library, which needs a GPU, does for it.

comfy-aimdo gives each network a range of addresses (ModelVBAR). ComfyUI asks for a layer's part before it computes
(vbar_fault), fills it unless its signature is the one that it had when it was filled, and lets go of it afterwards
(vbar_unpin); from then on it may be taken away. Here a part is a tensor, and each is taken away as late as that allows,
or in `tight` as soon and as often as a full GPU would: what still reads it then, reads NaN.
"""

import collections
import ctypes
import itertools
import json
import mmap
import random
import warnings
import weakref

import torch

JUNK = 0xFF  # of which every float is NaN
MISSES, EVICTED = 0.4, 0.3  # in `tight`: shares of parts that get no memory, and that lose it once let go of


class Range:
    """Stands in for comfy_aimdo.model_vbar.ModelVBAR. A part is (range, offset, bytes); sizes are in bytes."""

    signatures = itertools.count()
    read = 0  # parts that came straight from a file
    all: "weakref.WeakSet[Range]" = weakref.WeakSet()

    def __init__(self, size: int, device: int):
        self.all.add(self)
        self.size, self.end = size, 0
        self.device = torch.device(torch._C._get_privateuse1_backend_name(), device)
        self.parts: dict[int, torch.Tensor] = {}
        self.signature: dict[int, bytes] = {}
        self.pinned: collections.Counter[int] = collections.Counter()  # how often each part is in use

    def prioritize(self) -> None:
        pass

    def alloc(self, size: int) -> tuple["Range", int, int]:
        part = (self, self.end, size)
        self.end += size
        if self.end > self.size:
            raise MemoryError("more is asked for than was reserved")
        return part

    def fill(self, offset: int, size: int) -> None:
        """Memory for a part that has none; what is in it is not the part's."""
        if offset not in self.parts:
            self.parts[offset] = torch.full((size,), JUNK, dtype=torch.uint8, device=self.device)
            self.signature[offset] = next(self.signatures).to_bytes(8, "little")

    def evict(self, offset: int) -> int:
        """Takes a part's memory away, for others to write to. Returns its size."""
        taken = self.parts.pop(offset, None)
        return 0 if taken is None else taken.fill_(JUNK).numel()

    def loaded_size(self) -> int:
        return sum(part.numel() for part in self.parts.values())

    def free_memory(self, size: float) -> int:
        freed = 0
        for offset in [offset for offset in self.parts if not self.pinned[offset]]:
            if freed >= size:
                break
            freed += self.evict(offset)
        return freed


def in_use() -> int:
    """Parts that were asked for and not let go of, which no other network can have the memory of."""
    return sum(range_.pinned.total() for range_ in Range.all)


class HostBuffer:
    """Stands in for comfy_aimdo.host_buffer.HostBuffer: pinned memory, of which there is none."""

    def __init__(self, *_):
        self.size = 0

    def truncate(self, *_, **__) -> None:
        pass


def install(tight: bool) -> None:
    """Turns dynamic VRAM on in the ComfyUI of this process, as its main.py does."""
    import comfy.memory_management
    import comfy.model_patcher
    import comfy.utils
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    from comfy.cli_args import args

    chance = random.Random(0)

    def fault(part):
        range_, offset, size = part
        if tight and not range_.pinned[offset] and chance.random() < MISSES:
            range_.evict(offset)
            return None
        range_.fill(offset, size)
        range_.pinned[offset] += 1
        return range_.signature[offset]

    def unpin(part):
        if part is None:
            return
        range_, offset, _ = part
        range_.pinned[offset] = max(0, range_.pinned[offset] - 1)
        if tight and not range_.pinned[offset] and chance.random() < EVICTED:
            range_.evict(offset)

    def load_safetensors(path):
        """As ComfyUI's, whose tensors know where in the file they lie, and cannot be written to."""
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:begin]))
        metadata, tensors = header.pop("__metadata__", {}), {}
        for name, about in header.items():
            start, end = about["data_offsets"]
            kind = comfy.utils._TYPES[about["dtype"]]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what cannot be written to
                tensors[name] = torch.frombuffer(data[begin + start : begin + end], dtype=kind).view(about["shape"])
            where = comfy.memory_management.TensorFileSlice(path, None, begin + start, end - start)
            tensors[name].untyped_storage()._comfy_tensor_file_slice = where
        return tensors, metadata

    def read_file_to_device(path, offset, size, stream, address, *_, **__):
        """Its memory is this process's."""
        with open(path, "rb") as file:
            file.seek(offset)
            ctypes.memmove(address, file.read(size), size)
        Range.read += 1

    patcher = comfy.model_patcher.ModelPatcherDynamic
    list_layers = patcher._load_list

    def load_list(self, for_dynamic=False, default_device=None):
        """ComfyUI moves data of parameters beside layers in place, which torch refuses for a device of ours."""
        for module in self.model.modules():
            if default_device is not None and any(module.children()):
                for name, own in list(module.named_parameters(recurse=False)):
                    setattr(module, name, torch.nn.Parameter(own.to(default_device), requires_grad=False))
        return list_layers(self, for_dynamic, default_device)

    args.disable_pinned_memory = True
    replaced = {
        comfy_aimdo.model_vbar: {"ModelVBAR": Range, "vbar_fault": fault, "vbar_unpin": unpin},
        comfy_aimdo.torch: {"aimdo_to_tensor": lambda part, _: part[0].parts[part[1]]},
        comfy_aimdo.host_buffer: {"HostBuffer": HostBuffer, "read_file_to_device": read_file_to_device},
        comfy.utils: {"load_safetensors": load_safetensors},
        comfy.memory_management: {"aimdo_enabled": True},
        comfy.model_patcher: {"CoreModelPatcher": patcher},
        patcher: {"_load_list": load_list},
    }
    for module, members in replaced.items():
        for name, member in members.items():
            setattr(module, name, member)
