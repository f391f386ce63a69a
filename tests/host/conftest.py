"""The real ComfyUI in this process, on the CPU or what machines.py offers, with this pack among its custom nodes.

Everything happens as ComfyUI does it: the pack is loaded by its own loader from custom_nodes, nodes run by their
ids, and each test runs in inference mode.
"""

import asyncio
import contextlib
import importlib
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import machines
import pytest
import torch
from api_prompts import custom_size

HERE = Path(__file__).parent
ROOT = HERE.resolve().parents[1]
PACK = "sana-sprint"
EXTRAS = (
    "custom_sampler", "flux", "model_advanced", "differential_diffusion", "model_merging", "torch_compile", "mask",
    "latent", "hooks", "slg", "cond", "controlnet", "easycache", "lumina2",
    "lora_debug", "train", "align_your_steps", "gits", "textgen", "string",
)  # fmt: skip
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
SIZE = custom_size(128, 96)  # latent 3 x 4: not square, so that swapped axes show


def start_comfyui(comfyui: Path, base: Path, machine: str = machines.CPU):
    """Import ComfyUI in `base` and load the pack. Returns its module's name and what ComfyUI was before and after."""
    sys.path.insert(0, str(comfyui))  # in front: it has a module `nodes`, as this repository has
    from comfy.cli_args import args

    machines.before_comfyui(machine)
    args.base_directory, args.disable_all_custom_nodes = str(base), True
    import folder_paths

    import nodes

    for key, (folders, _) in folder_paths.folder_names_and_paths.items():
        folder_paths.folder_names_and_paths[key][0][:] = [f for f in folders if Path(f).is_relative_to(base)]
    link = base / "custom_nodes" / PACK
    link.parent.mkdir()
    link.symlink_to(ROOT, target_is_directory=True)

    async def load():
        for name in EXTRAS:
            file = comfyui / "comfy_extras" / f"nodes_{name}.py"
            assert await nodes.load_custom_node(str(file), module_parent="comfy_extras"), name
        before = snapshot()
        assert await nodes.load_custom_node(str(link)), "ComfyUI could not load the pack; its log says why"
        return before, snapshot()

    machines.after_comfyui(machine)
    before, after = asyncio.run(load())
    return SimpleNamespace(name=str(link).replace(".", "_x_"), before=before, after=after)


def snapshot() -> dict[str, object]:
    """What packs are tempted to extend or replace in ComfyUI, by name."""
    import comfy.k_diffusion.sampling
    import comfy.ldm.modules.attention
    import comfy.lora
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.samplers
    import comfy.sd
    import comfy.supported_models
    import folder_paths

    import nodes

    modules = (
        comfy.k_diffusion.sampling, comfy.ldm.modules.attention, comfy.lora, comfy.model_base, comfy.model_patcher,
        comfy.ops, comfy.samplers, comfy.sd, comfy.supported_models, nodes,
    )  # fmt: skip
    members = {f"{m.__name__}.{k}": v for m in modules for k, v in vars(m).items() if callable(v)}
    methods = {f"{name}.{k}": m for name, c in members.items() if isinstance(c, type) for k, m in vars(c).items()}
    return {
        "members": members | methods,
        "samplers": list(comfy.samplers.SAMPLER_NAMES),
        "schedulers": list(comfy.samplers.SCHEDULER_HANDLERS),
        "models": list(comfy.supported_models.models),
        "folders": {
            key: (list(paths), set(kinds)) for key, (paths, kinds) in folder_paths.folder_names_and_paths.items()
        },
        "nodes": dict(nodes.NODE_CLASS_MAPPINGS),
    }


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == HERE and (reason := machines.reason_to_skip(item.nodeid, machines.chosen())):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    if item.path.parent != HERE:  # pytest calls this hook for the tests of every folder
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny: on a busy machine threads would only wait for each other
    with torch.inference_mode():  # as ComfyUI's executor
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def host(comfyui_path):
    """ComfyUI with the pack: `.base` its folder, `.pack(name)` one of the pack's modules, `.before`, `.after`."""
    base = Path(tempfile.mkdtemp(prefix="sana-sprint-host-"))
    started = start_comfyui(comfyui_path, base, machines.chosen())
    if machines.chosen().startswith("cuda"):
        machines.compute_exactly()
    started.base = base
    started.pack = lambda module: importlib.import_module(f"{started.name}.{module}")
    yield started
    shutil.rmtree(base)


@pytest.fixture(scope="session")
def node(host):
    return node_runner()


def node_runner():
    """Run a node: node("VAEDecode", vae=vae, samples=latent). Left-out inputs take their defaults."""
    from comfy_api.latest import io
    from comfy_api.latest._io import build_nested_inputs
    from comfy_api.latest._io import get_finalized_class_inputs as finalized

    import nodes

    def run(id, /, **inputs):
        kind = nodes.NODE_CLASS_MAPPINGS[id]
        declared, dynamic = kind.INPUT_TYPES(), {}
        if hasattr(kind, "PREPARE_CLASS_CLONE"):
            combos = {k: v[1]["options"][0]["key"] for k, v in declared["required"].items() if v[0] == DYNAMIC_COMBO}
            inputs = combos | inputs
            declared, _, dynamic = finalized(declared, inputs)
        for name, spec in declared.get("required", {}).items():
            if name not in inputs and len(spec) > 1 and "default" in spec[1]:
                inputs[name] = spec[1]["default"]
            elif name not in inputs and isinstance(spec[0], list):
                inputs[name] = spec[0][0]
        if hasattr(kind, "PREPARE_CLASS_CLONE"):
            out = getattr(kind.PREPARE_CLASS_CLONE(None), kind.FUNCTION)(**build_nested_inputs(inputs, dynamic))
            out = out.result if isinstance(out, io.NodeOutput) else out
        else:
            out = getattr(kind(), kind.FUNCTION)(**inputs)
        out = out.get("result", ()) if isinstance(out, dict) else out
        return out[0] if out and len(out) == 1 else out

    run.ids = nodes.NODE_CLASS_MAPPINGS
    return run


@pytest.fixture(scope="session")
def pipeline_folder(host) -> Path:
    """A model with seeded random weights in the published layout, where a user would put it.

    Most tests use it, since its prompts carry the authors' instruction; test_bundled.py has the bundled model.
    """
    import standin

    return standin.make(host.base / "models" / "diffusers" / standin.NAME)


@pytest.fixture(scope="module")
def pipeline(pipeline_folder):
    """The core's, with its weights copied: mapped ones may lie at any byte, which changes how a product rounds."""
    from sprint_core.pipeline import Pipeline

    pipeline = Pipeline.load(pipeline_folder)
    for part in (pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder.gemma):
        part.load_state_dict({name: tensor.clone() for name, tensor in part.state_dict().items()}, assign=True)
    return pipeline


@pytest.fixture(scope="session")
def loaded(node, pipeline_folder):
    """(MODEL, CLIP, VAE) of the stand-in."""
    return node("SanaSprintLoader", model=pipeline_folder.name)


@pytest.fixture(scope="session")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="session")
def clip(loaded):
    return loaded[1]


@pytest.fixture(scope="session")
def vae(loaded):
    return loaded[2]


@pytest.fixture(scope="session")
def positive(node, clip):
    return node("CLIPTextEncode", clip=clip, text="a red circle")


@pytest.fixture(scope="session")
def other(node, clip):
    return node("CLIPTextEncode", clip=clip, text="a large blue square to the left of it")


@pytest.fixture
def empty(node):
    return node("SanaSprintEmptyLatent", **SIZE)


@pytest.fixture(scope="session")
def pixels():
    """A smooth image [1, 96, 128, 3]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 128), indexing="ij")
    return torch.stack([x, y, (x * 6).sin() / 2 + 0.5], dim=-1)[None]


@pytest.fixture(scope="session")
def encoded(node, vae, pixels):
    return node("VAEEncode", vae=vae, pixels=pixels)


@pytest.fixture
def sample(node, model, positive, empty):
    """Sample with our node: sample(seed=1, steps=4, ...)."""

    def run(**inputs):
        inputs = {"model": model, "positive": positive, "latent_image": empty} | inputs
        return node("SanaSprintSampler", **inputs)["samples"]

    return run


@pytest.fixture
def ksample(node, model, positive, empty):
    """Sample with KSampler as the pack documents it: lcm, simple, cfg 1, 4 steps."""

    def run(id="KSampler", **inputs):
        defaults = {"steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple", "seed": 1}
        start = {"model": model, "positive": positive, "negative": positive, "latent_image": empty}
        return node(id, **(start | defaults | inputs))["samples"]

    return run


@pytest.fixture
def custom(node, model, positive, empty):
    """Sample with SamplerCustomAdvanced and our SIGMAS and SAMPLER; returns the denoised output."""

    def run(seed=1, guider=None, sigmas=None, sampler=None, latent_image=empty, model=model, positive=positive):
        return node(
            "SamplerCustomAdvanced",
            noise=node("RandomNoise", noise_seed=seed),
            guider=guider or node("BasicGuider", model=model, conditioning=positive),
            sampler=sampler or node("SanaSprintTrigFlowSampler"),
            sigmas=node("SanaSprintSchedule", steps=4, schedule="app") if sigmas is None else sigmas,
            latent_image=latent_image,
        )[0]["samples"]

    return run


@pytest.fixture
def unchanged(sample):
    """`with unchanged():` around an error: afterwards the next run works and gives what it gave before."""

    @contextlib.contextmanager
    def check():
        before = sample(seed=3)
        yield
        assert torch.equal(sample(seed=3), before)

    return check


@pytest.fixture(scope="session")
def write_lora(host):
    """write_lora(name, prefix, {module: shape}): a LoRA of rank 2 in models/loras. Returns {module: its change}."""
    import safetensors.torch

    def write(name, prefix, modules, separator="_"):
        generator, tensors, changes = torch.Generator().manual_seed(5), {}, {}
        for module, (rows, columns) in modules.items():
            up, down = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
            key = prefix + module.replace(".", separator)
            tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
            changes[module] = up @ down
        folder = host.base / "models" / "loras"
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, folder / name)
        return changes

    return write


@pytest.fixture(scope="session")
def stored(host, pipeline_folder):
    """stored(kind, name, change, config): the stand-in's weights, changed, as a native file in models/checkpoints."""
    from sprint_core.text.loading import find_tokenizer
    from sprint_core.weights import checkpoint, layouts

    def write(kind, name, change=lambda tensors: tensors, config=None):
        weights = checkpoint.load(pipeline_folder, layouts.PARTS[kind])
        weights.tensors = change(dict(weights.tensors))
        weights.config = config or weights.config
        if kind == "text_encoder":
            tokenizer = find_tokenizer(weights)
            weights.extras = {tokenizer.state_key: torch.tensor(list(tokenizer.data), dtype=torch.uint8)}
        checkpoint.save(host.base / "models" / "checkpoints" / name, [weights], {})
        return name

    return write


@pytest.fixture(scope="session")
def close():
    """close(a, b, limit): the largest difference is at most that fraction of b's largest value. Returns it.

    On a GPU it may be a thousandth.
    """

    def check(a, b, limit):
        assert a.shape == b.shape
        error = float((a - b).abs().max() / b.abs().max())
        assert error <= machines.limit(limit)
        return error

    return check
