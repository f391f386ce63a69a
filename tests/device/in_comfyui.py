"""ComfyUI with a GPU that is none: the second device, in its memory modes. Prints what runs took, as JSON.

    python tests/device/in_comfyui.py COMFYUI MODES      # cpu normal low novram dynamic mixed streamed tight

Each mode has a fork of the process that has imported ComfyUI, which takes longer than the mode's images. Only what
ComfyUI asks of the machine is replaced, in that fork: which device there is, and how much memory it has.
"""

import functools
import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import safetensors.torch
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS.parent), str(TESTS)]

import dynamic_vram  # noqa: E402
import second_device  # noqa: E402

GIB = 2**30
TOTAL, FREE = 8 * GIB, 7 * GIB
PROMPT = "two small blue squares"
LORA = "text.safetensors"
# Modes of ComfyUI's dynamic VRAM, and from how many bytes on a network is not loaded as a whole, where that is not
# left to the pack: between the stand-in's text encoder with its transformer and the others, and every network.
DYNAMIC = {"dynamic": None, "mixed": 870_000, "streamed": 0, "tight": 0}


def install(mode: str, device: torch.device) -> None:
    """What ComfyUI believes of its machine."""
    import comfy.model_management as mm

    states = {"low": mm.VRAMState.LOW_VRAM, "novram": mm.VRAMState.NO_VRAM}
    mm.cpu_state, mm.lowvram_available = mm.CPUState.GPU, True
    mm.vram_state = states.get(mode, mm.VRAMState.NORMAL_VRAM)
    if mode in DYNAMIC:
        dynamic_vram.install(tight=mode == "tight")

    def always(value):
        return lambda *_, **__: value

    def memory(amount: int):
        return lambda dev=None, both=False, torch_total_too=False, torch_free_too=False: (
            (amount, amount) if both or torch_total_too or torch_free_too else amount
        )

    replaced = {
        "get_torch_device": always(device),
        "get_all_torch_devices": always([device]),
        "get_torch_device_name": always(second_device.NAME),
        "get_total_memory": memory(TOTAL),
        "get_free_memory": memory(FREE),
        "should_use_bf16": always(False),
        # Or ComfyUI leaves text encoders on the CPU.
        "should_use_fp16": lambda device=None, *_, **__: device is None or not mm.is_device_cpu(device),
        **{f"supports_{kind}_compute": always(False) for kind in ("fp8", "nvfp4", "mxfp8")},
        "is_nvidia": always(False),
        "is_amd": always(False),
        "lora_compute_dtype": always(torch.float32),
        "soft_empty_cache": always(None),
        "synchronize": always(None),
    }
    for name, function in replaced.items():
        setattr(mm, name, function)


def conftest():
    """tests/host/conftest.py, which knows how to start ComfyUI."""
    spec = importlib.util.spec_from_file_location("host_conftest", TESTS / "host" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(node, folder: str, control: str) -> dict:
    """Calls that make images, and one that writes tokens, by name."""
    model, clip, vae = node("SanaSprintLoader", model=folder)
    net = node("SanaSprintControlNetLoader", control_net=control)
    size = node("SanaSprintEmptyLatent", size={"size": "custom", "width": 96, "height": 64})
    pixels = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))

    def positive(clip=clip):
        return node("SanaSprintTextEncode", clip=clip, text=PROMPT)

    def decoded(latent):
        return node("VAEDecode", vae=vae, samples=latent)

    def sampled(text, latent=size, **more):
        return decoded(node("SanaSprintSampler", model=model, positive=text, latent_image=latent, seed=3, **more))

    def steered():
        drawn = node("SanaSprintSoftEdges", image=pixels)
        return sampled(node("SanaSprintControlNetApply", positive=positive(), control_net=net, image=drawn, vae=vae)[0])

    def hooked():  # by half of a LoRA in the first step, by all of it in the second
        frames = node("CreateHookKeyframe", strength_mult=0.5, start_percent=0.0)
        frames = node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.1, prev_hook_kf=frames)
        hooks = node("SetHookKeyframes", hooks=node("CreateHookLora", lora_name=LORA), hook_kf=frames)
        return sampled(positive(node("SetClipHooks", clip=clip, hooks=hooks, schedule_clip=True)), steps=2)

    def written():
        return torch.tensor(clip.generate(clip.tokenize(PROMPT, skip_template=True), do_sample=False, max_length=4))

    def stock():  # of one step: lcm draws later noise where the latent is, so that a GPU draws other numbers
        both = {"positive": positive(), "negative": positive(), "cfg": 1.0, "denoise": 1.0}
        how = {"seed": 3, "steps": 1, "sampler_name": "lcm", "scheduler": "simple"}
        return decoded(node("KSampler", model=model, latent_image=size, **both, **how))

    return {
        "hed": lambda: node("SanaSprintSoftEdges", image=pixels, method="HED"),
        "text": lambda: sampled(positive(), steps=1),
        "image": lambda: sampled(positive(), node("VAEEncode", pixels=pixels, vae=vae), steps=2, denoise=0.6),
        "control": steered,
        "stock": stock,
        "hooked": hooked,
        "written": written,
        "unhooked": lambda: sampled(positive(), steps=1),
    }


def make_room(mode: str, device: torch.device) -> None:
    """As for a huge model, which dynamic VRAM, where it is on, brings layer by layer."""
    import comfy.model_management as mm

    mm.free_memory(1e32, device, for_dynamic=mode in DYNAMIC)
    left = [one.model for one in mm.current_loaded_models if one.device == device and not one.model.is_dynamic()]
    assert not left, f"still loaded: {left}"


def measure(runner, pack: str, folder: str, control: str, mode: str) -> dict:
    """What a later run of each image with its prompt gave and took, in one mode."""
    library, device = (second_device.register(), torch.device(second_device.NAME, 0)) if mode != "cpu" else (None, None)
    if library:
        install(mode, device)
    if DYNAMIC.get(mode) is not None:
        importlib.import_module(f"{pack}.nodes.adapters.residence").SHARE = DYNAMIC[mode] / TOTAL
    results = {}
    with torch.inference_mode():
        for name, make in images(runner, folder, control).items():
            make()
            if library:
                make_room(mode, device)
                make()
                library.reset()
            dynamic_vram.Range.read = 0
            image = make()
            assert not dynamic_vram.in_use(), f"{name}: weights that are not let go of"
            counts = library.counts() if library else {}
            counts.pop("operations", None)
            results[name] = {"image": image.cpu().flatten().tolist(), "read": dynamic_vram.Range.read, **counts}
    return results


def forked(work, file: Path) -> bool:
    """Whether work() could be done, in a fork that writes what it returns to a file."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    code = 1
    try:
        file.write_text(json.dumps(work()), encoding="utf-8")
        code = 0
    except BaseException:  # or os._exit would swallow it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(comfyui: str, *modes: str) -> int:
    torch.set_num_threads(1)  # a fork has no threads but the one that made it
    host = conftest()
    base = Path(tempfile.mkdtemp(prefix="second-device-"))
    pack = host.start_comfyui(Path(comfyui), base).name
    import standin

    from sprint_core.models import hed
    from sprint_core.models.controlnet import AUTHORS
    from sprint_core.weights import checkpoint

    folder = standin.make(base / "models" / "diffusers" / standin.NAME)
    control = base / "models" / "controlnet" / "control.safetensors"
    control.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(control, [standin.control(AUTHORS)], {})
    annotators = base / "models" / "annotators"
    annotators.mkdir()
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in hed.HED().state_dict().items()}
    torch.save(standin.random_tensors(shapes), annotators / "ControlNetHED.pth")
    loras = base / "models" / "loras"
    loras.mkdir()
    layer = "lora_te_layers_0_self_attn_q_proj"
    sizes = {f"{layer}.lora_up.weight": (64, 2), f"{layer}.lora_down.weight": (2, 64)}
    safetensors.torch.save_file(standin.random_tensors(sizes), loras / LORA)
    runner, results = host.node_runner(), {}
    for mode in modes:
        file = base / f"{mode}.json"
        if not forked(functools.partial(measure, runner, pack, folder.name, control.name, mode), file):
            return 1
        results[mode] = json.loads(file.read_text(encoding="utf-8"))
    shutil.rmtree(base)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
