"""Every node of ComfyUI with a MODEL in and a MODEL out, on a Sprint and on a teacher.

Each works (the image changes as it says, or stays where that is its aim), warns once that it has no effect, or is
refused in a sentence. None fails in our code, and none is without effect in silence.
"""

import asyncio
import traceback
from types import SimpleNamespace

import pytest
import safetensors.torch
import standin
import torch
from api_prompts import custom_size
from torch import nn

WORKS, SAME, WARNED, REFUSED = "works", "same image", "warned", "refused"
CONTROLS = (
    "QwenImageDiffsynthControlnet",
    "ZImageFunControlnet",
    "SUPIRApply",
    "AnimaLLLiteApply",
    "USOStyleReference",
)

# (on a Sprint, which takes any cfg as 1, on a teacher at cfg 4.5); every node that is not here works on both.
OUTCOMES = {
    # They set how it runs, not what comes out; wanBlockSwap does nothing in any model, MultiGPU nothing on one.
    **dict.fromkeys(("TorchCompileModel", "SelectModelDevice", "MultiGPU_WorkUnits", "wanBlockSwap"), (SAME, SAME)),
    # Places that a SANA does not have.
    **dict.fromkeys(
        (
            "ARVideoI2V", "ChromaRadianceOptions", "FluxKVCache", "FreeU", "FreeU_V2", "HiDreamO1PatchSeamSmoothing",
            "HyperTile", "HypernetworkLoader", "LTXVReferenceAudio", "NAGuidance", "PatchModelAddDownscale",
            "PerturbedAttentionGuidance", "ScaleROPE", "SelfAttentionGuidance", "TomePatchModel", *CONTROLS,
        ),
        (WARNED, WARNED),
    ),
    # Windows of frames, longer than the image is high.
    **dict.fromkeys(("WanContextWindowsManual", "LTXVContextWindows"), (WARNED, WARNED)),
    # What they do to classifier-free guidance does nothing where there is none.
    **dict.fromkeys(
        (
            "APG", "CFGNorm", "CFGOverride", "CFGZeroStar", "FreSca", "Mahiro", "PerpNeg", "RescaleCFG",
            "SkipLayerGuidanceDiTSimple", "TCFG", "VideoLinearCFGGuidance", "VideoTriangleCFGGuidance",
        ),
        (WARNED, WORKS),
    ),
    **dict.fromkeys(
        (
            "ModelSamplingDiscrete", "ModelSamplingContinuousEDM", "ModelSamplingContinuousV",
            "ModelSamplingStableCascade", "TripoSplatSamplingPreview", "WanUni3CControlnetApply",
            "WanInfiniteTalkToVideo",
        ),
        (REFUSED, REFUSED),
    ),
}  # fmt: skip

VALUES = {  # where the defaults would change nothing
    "CFGOverride": {"cfg": 3.0},
    "ChromaRadianceOptions": {"nerf_tile_size": 0},
    "ContextWindowsManual": {"dim": 2, "context_length": 4, "context_overlap": 2},
    "EasyCache": {"reuse_threshold": 3.0},
    "FreSca": {"scale_high": 2.0, "freq_cutoff": 1},
    "ModelComputeDtype": {"dtype": "bf16"},
    "ModelMergeSimple": {"ratio": 0.5},
    "ModelSamplingSD3": {"shift": 5.0},
    "ModelNoiseScale": {"noise_scale": 0.7},
    "RenormCFG": {"renorm_cfg": 0.5},
    "ScaleROPE": {"scale_x": 2.0},
    "SkipLayerGuidanceDiT": {"double_layers": "0", "single_layers": "0", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceDiTSimple": {"double_layers": "0", "single_layers": ""},
    "SkipLayerGuidanceSD3": {"layers": "1", "start_percent": 0.0, "end_percent": 1.0},
    "TorchCompileModel": {"backend": "eager"},
    "VideoLinearCFGGuidance": {"min_cfg": 3.0},
    "VideoTriangleCFGGuidance": {"min_cfg": 3.0},
    "WanInfiniteTalkToVideo": {"mode": {"mode": "single_speaker"}, "width": 64, "height": 64, "length": 5},
}
HALF = ("UNet", "ModelMerge")  # their floats are factors that change nothing at 1


class OtherFamily(nn.Module):
    """As much of another family's network as its node reads before the run."""

    cond_in_channels, additional_in_dim, project_modules, audio_sample_rate = 3, 0, [], 16000
    process_input_latent_image = staticmethod(lambda latent: latent)
    encode = staticmethod(lambda wave: torch.ones(1, 8, 4, 4))


@pytest.fixture(scope="module")
def every(comfyui_path, node):
    """All of ComfyUI's own nodes, by their ids."""
    import nodes

    async def load():
        for file in sorted((comfyui_path / "comfy_extras").glob("nodes_*.py")):
            await nodes.load_custom_node(str(file), module_parent="comfy_extras")

    asyncio.run(load())
    return nodes.NODE_CLASS_MAPPINGS


def accepts(kind):
    declared = kind.INPUT_TYPES()
    return {**declared.get("required", {}), **declared.get("optional", {})}


def patches_models(kind):
    return "MODEL" in kind.RETURN_TYPES and "MODEL" in [spec[0] for spec in accepts(kind).values()]


@pytest.fixture(scope="module")
def folders(host, pipeline_folder):
    models = host.base / "models"
    tensors = {
        f"lora_unet_transformer_blocks_0_attn1_to_q.lora_{end}.weight": torch.ones(shape) / 16
        for end, shape in (("up", (64, 2)), ("down", (2, 64)))
    }
    for name in ("loras", "hypernetworks"):
        (models / name).mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, models / "loras" / "patch-nodes.safetensors")
    layers = [{"linear.weight": torch.eye(64), "linear.bias": torch.zeros(64)}] * 2
    torch.save({64: layers, "activation_func": "linear"}, models / "hypernetworks" / "patch-nodes.pt")
    return {
        "sprint": pipeline_folder,
        "teacher": standin.make(models / "diffusers" / "patched-teacher", standin.TEACHER),
    }


@pytest.fixture(scope="module", params=["sprint", "teacher"])
def bench(request, every, node, folders, clip, vae, positive, other, pixels, stored):
    """One of both models, what its nodes are given, and `paint(model)`."""
    import comfy.model_patcher

    folder = folders[request.param]
    model = node("SanaSprintModelLoader", model=folder.name)
    tensors = model.model_state_dict("diffusion_model.")
    second = model.clone()
    second.add_patches(
        {name: (torch.ones_like(tensor) * 0.01,) for name, tensor in tensors.items() if name.endswith("to_q.weight")}
    )
    latent = node("SanaSprintEmptyLatent", **custom_size(256, 320))
    mask = torch.linspace(0.2, 1.0, 10)[None, :, None].expand(1, 10, 8)
    image = nn.functional.interpolate(pixels.movedim(-1, 1), (320, 256)).movedim(1, -1)
    encoded = {"samples": node("VAEEncode", vae=vae, pixels=image)["samples"], "noise_mask": mask}
    cpu = torch.device("cpu")
    foreign = comfy.model_patcher.ModelPatcher(OtherFamily(), load_device=cpu, offload_device=cpu)
    lora = {
        f"diffusion_model.transformer_blocks.0.attn1.to_q.lora_{end}.weight": tensor
        for end, tensor in (("up", torch.ones(64, 2) / 16), ("down", torch.ones(2, 64) / 16))
    }
    hidden = torch.ones(1, 4, 8)
    seen = SimpleNamespace(all_hidden_states=torch.ones(1, 24, 4, 8), penultimate_hidden_states=hidden)
    objects = {
        "MODEL": model, "CLIP": clip, "VAE": vae, "IMAGE": image, "LATENT": latent, "MODEL_PATCH": foreign,
        "CONDITIONING": node("CLIPTextEncode", clip=clip, text="a green ring"), "LORA_MODEL": lora,
        "LATENT_OPERATION": node("LatentOperationTonemapReinhard", multiplier=0.3),
        "CLIP_VISION_OUTPUT": seen,
        "AUDIO": {"waveform": torch.zeros(1, 2, 16000), "sample_rate": 16000},
        "AUDIO_ENCODER_OUTPUT": {"encoded_audio_all_layers": [hidden] * 3}, "MASK": mask,
    }  # fmt: skip
    cfg = 1.0 if model.model.sprint else 4.5

    def paint(model):
        run = {"model": model, "positive": positive, "negative": other, "latent_image": encoded, "seed": 1}
        return node("KSampler", **run, steps=6, cfg=cfg, sampler_name="euler", scheduler="simple")["samples"]

    return SimpleNamespace(model=model, second=second, objects=objects, paint=paint, plain=paint(model))


def values_of(id, bench):
    """What a node is given: the defaults, our objects, and VALUES."""
    inputs = {}
    for name, spec in accepts(kinds()[id]).items():
        options = spec[1] if len(spec) > 1 else {}
        if isinstance(spec[0], str) and spec[0] in bench.objects:
            inputs[name] = bench.objects[spec[0]]
        elif "default" in options:
            halved = id.startswith(HALF) and spec[0] == "FLOAT"
            inputs[name] = 0.5 if halved else options["default"]
        elif isinstance(spec[0], list) or spec[0] == "COMBO":
            choices = spec[0] if isinstance(spec[0], list) else options["options"]
            inputs[name] = next((c for c in choices if "patch-nodes" in c), choices[0])
    inputs |= {"model2": bench.second} if "model2" in inputs else {}
    inputs |= {"audio_vae": OtherFamily()} if "audio_vae" in inputs else {}
    return inputs | VALUES.get(id, {})


def kinds():
    import nodes

    return nodes.NODE_CLASS_MAPPINGS


def outcome(node, bench, id, caplog):
    """(what became of a node, what it or the run said)."""
    bench.model.model.told.clear()
    caplog.clear()
    try:
        out = node(id, **values_of(id, bench))
        out = out[list(kinds()[id].RETURN_TYPES).index("MODEL")] if isinstance(out, tuple) else out
        image = bench.paint(out)
    except Exception as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        ours = "/nodes/adapters/" in frames[-1] or "/sprint_core/" in frames[-1]
        assert isinstance(error, ValueError) or not ours, f"{id}: {error!r} in {frames[-1]}"
        return REFUSED, f"{type(error).__name__}: {error}"
    assert image.isfinite().all()
    said = [r.getMessage() for r in caplog.records if r.name.split(".")[-1] == "guard"]
    error = float((image - bench.plain).abs().max() / bench.plain.abs().max())
    if said:
        assert error < 1e-4, f"{id} warns and changes the image by {error}"
        assert len(said) == 1, said
        return WARNED, said[0]
    return (WORKS if error > 1e-5 else SAME), f"changes the image by {error:.2g}"


def test_every_node_works_warns_or_is_refused(bench, node, every, caplog):
    sprint = bench.model.model.sprint
    ids = sorted(id for id, kind in every.items() if patches_models(kind) and not id.startswith("Sana"))
    assert len(ids) > 80
    wrong = []
    for id in ids:
        found, why = outcome(node, bench, id, caplog)
        expected = OUTCOMES.get(id, (WORKS, WORKS))[not sprint]
        print(id, found, why)
        if found != expected:
            wrong.append((id, expected, found, why))
    assert not wrong, "\n".join(map(str, wrong))
    assert torch.equal(bench.paint(bench.model), bench.plain)


@pytest.mark.parametrize(
    "double, single, said",
    [("0", "7", False), ("7", "", True), ("0, 7", "", True), ("", "0", True), ("", "", False)],
)
def test_layers_that_do_not_exist_are_said(bench, node, caplog, double, single, said):
    """The model has blocks 0 and 1, and no single ones, which the node names for other networks."""
    bench.model.model.told.clear()
    layers = {"double_layers": double, "single_layers": single, "start_percent": 0.0, "end_percent": 1.0}
    image = bench.paint(node("SkipLayerGuidanceDiT", model=bench.model, **layers))
    warned = [r.getMessage() for r in caplog.records if "SkipLayerGuidanceDiT: of no effect" in r.getMessage()]
    assert bool(warned) == said
    assert torch.equal(image, bench.plain) == ("0" not in double)


def test_a_run_leaves_the_model_as_it_was(bench, node):
    """What is left out of one run is left in the MODEL, for other models and later runs."""
    patched = node("SelfAttentionGuidance", model=bench.model)
    before = {
        name: list(kind) for name, kind in patched.model_options["transformer_options"]["patches_replace"].items()
    }
    functions = list(patched.model_options["sampler_post_cfg_function"])
    bench.paint(patched)
    options = patched.model_options
    assert {name: list(kind) for name, kind in options["transformer_options"]["patches_replace"].items()} == before
    assert options["sampler_post_cfg_function"] == functions and options["disable_cfg1_optimization"]
    assert torch.equal(bench.paint(bench.model), bench.plain)
