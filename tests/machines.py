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

from tools.gpu_pack import ALLOCATOR

CPU = "cpu"
TESTS = Path(__file__).parent
GPU_LIMIT = 1e-3  # of an image or a latent whose values are about 1, in fp32
HOST_TENSORS = "it calls a network, or reads weights, with tensors in main memory"
OTHER_NOISE = "stock samplers draw noise where the latent is, and a GPU draws other numbers"
OF_THE_CPU = "it is about the CPU"
# Tests that say nothing of a GPU, by the part of their ids that names them: why.
ON_THE_CPU = {
    "test_equality.py::test_a_padded_batch": HOST_TENSORS,
    "test_equality.py::test_ksampler_lcm_equals": OTHER_NOISE,
    "test_equality.py::test_ksampler_image_to_image": OTHER_NOISE,
    "test_lora.py::test_dora": HOST_TENSORS,
    "test_lora.py::test_equals_diffusers": HOST_TENSORS,
    "test_lora.py::test_stacking": HOST_TENSORS,
    "test_lora.py::test_strength[": HOST_TENSORS,
    "test_memory.py::test_where_nothing_can_be_compiled": OF_THE_CPU,
    "test_multigpu.py": "it splits between two devices that are the CPU",
    "test_negative.py::test_it_works_with_stock_samplers": OTHER_NOISE,
    "test_patches.py::test_model_merge_simple": HOST_TENSORS,
    "test_patches.py::test_model_save_keeps_a_teachers": HOST_TENSORS,
    "test_stock_nodes.py::test_previews_show_the_clean_image": HOST_TENSORS,
    "test_teachers.py::test_the_time_scale": HOST_TENSORS,
    "test_text.py::test_cached_states_belong": OF_THE_CPU,
    "test_threads.py": OF_THE_CPU,
}
NO_BACKWARD = "the second device has no gradients of convolutions"
ON_THE_SECOND = {"test_foreign_sigmas.py::test_training": NO_BACKWARD, "test_lora_training.py": NO_BACKWARD}


def chosen() -> str:
    """Raises ValueError for a machine that is none, on which nothing would be compared."""
    name = os.environ.get("SPRINT_HOST_ON", CPU)
    if name not in (CPU, "cuda", "cuda-dynamic") and not name.startswith("second-"):
        raise ValueError(f"SPRINT_HOST_ON={name}: it is cpu, cuda, cuda-dynamic or second-MODE")
    return name


def reason_to_skip(nodeid: str, machine: str) -> str | None:
    if machine == CPU:
        return None
    reasons = ON_THE_CPU if machine.startswith("cuda") else ON_THE_CPU | ON_THE_SECOND
    return next((why for part, why in reasons.items() if part in nodeid), None)


def limit(error: float) -> float:
    """The largest error that a test allows against the CPU, or another order of work: a GPU rounds otherwise."""
    return error if chosen() == CPU else max(error, GPU_LIMIT)


def before_comfyui(machine: str) -> None:
    """As ComfyUI's main.py: comfy-aimdo's library comes before CUDA is used.

    The allocator that main.py asks for has to be in the environment before torch is imported: ALLOCATOR.
    """
    from comfy.cli_args import args

    args.cpu = not machine.startswith("cuda")
    args.cuda_malloc = ALLOCATOR in os.environ.items()
    if machine == "cuda-dynamic":
        import comfy_aimdo.control

        comfy_aimdo.control.init(nvml_pressure=True)


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
