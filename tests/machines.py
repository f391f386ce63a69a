"""What ComfyUI computes on in the tests inside it, by SPRINT_HOST_ON.

    cpu             the default
    cuda            a GPU, where ComfyUI keeps whole networks
    cuda-dynamic    the same with dynamic VRAM, which is how ComfyUI starts on NVIDIA's
    second-MODE     the second device, in one of its memory modes (device/in_comfyui.py)
"""

import os
import sys
from pathlib import Path

import torch

CPU = "cpu"
TESTS = Path(__file__).parent
# Tests that ask what no GPU does, by the part of their ids that names them: why.
ON_THE_CPU: dict[str, str] = {}


def chosen() -> str:
    return os.environ.get("SPRINT_HOST_ON", CPU)


def reason_to_skip(nodeid: str, machine: str) -> str | None:
    if machine == CPU:
        return None
    return next((why for part, why in ON_THE_CPU.items() if part in nodeid), None)


def before_comfyui(machine: str) -> None:
    """As ComfyUI's main.py: comfy-aimdo's library comes before CUDA is used."""
    if machine == "cuda-dynamic":
        import comfy_aimdo.control

        comfy_aimdo.control.init()


def after_comfyui(machine: str) -> None:
    """As ComfyUI's main.py, once its modules are there. Raises RuntimeError where dynamic VRAM cannot be had."""
    if machine == "cuda-dynamic":
        import comfy.memory_management
        import comfy.model_management as mm
        import comfy.model_patcher
        import comfy_aimdo.control

        if not comfy_aimdo.control.init_devices(device.index for device in mm.get_all_torch_devices()):
            raise RuntimeError("cuda-dynamic: comfy-aimdo found no GPU that it knows; take SPRINT_HOST_ON=cuda")
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    elif machine.startswith("second-"):
        sys.path.append(str(TESTS / "device"))
        import in_comfyui
        import second_device

        second_device.register()
        in_comfyui.install(machine.removeprefix("second-"), torch.device(second_device.NAME, 0))


def compute_exactly() -> None:
    """On a GPU: in fp32 unless another type is asked for, without TF32, and the same way each time."""
    import comfy.model_management as mm

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    for name in ("should_use_bf16", *(f"supports_{kind}_compute" for kind in ("fp8", "nvfp4", "mxfp8"))):
        setattr(mm, name, lambda *_, **__: False)
    mm.lora_compute_dtype = lambda *_, **__: torch.float32
