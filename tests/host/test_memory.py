"""ComfyUI's memory management on our objects: partly loaded, moved, cast, they compute the same."""

import functools
import threading

import pytest
import torch

from sprint_core.weights import presets

LIMIT = 1e-5


@pytest.fixture
def encode(node, clip):
    return lambda clip=clip: node("CLIPTextEncode", clip=clip, text="a cat")[0][0]


@pytest.fixture
def round_trip(node, vae, pixels):
    return lambda vae=vae: node("VAEDecode", vae=vae, samples=node("VAEEncode", vae=vae, pixels=pixels))


@pytest.fixture
def low_memory(monkeypatch):
    """low_memory(budget in bytes): what is loaded from now on keeps only that much on the compute device."""
    import comfy.model_management as mm

    real = mm.LoadedModel.model_load

    def start(budget):
        mm.unload_all_models()
        load = lambda self, lowvram_model_memory=0, **kwargs: real(self, budget, **kwargs)  # noqa: E731
        monkeypatch.setattr(mm.LoadedModel, "model_load", load)

    yield start
    monkeypatch.undo()
    mm.unload_all_models()


# --- partial loading, as --lowvram and --novram do it --------------------------------------------------


@pytest.mark.parametrize("budget", [1, 200_000])
def test_a_partly_loaded_model_gives_the_same_image(model, sample, low_memory, budget):
    expected = sample()
    low_memory(budget)
    assert torch.equal(sample(), expected)
    assert model.model.model_lowvram and model.loaded_size() < model.model_size() / 2 + 200_000


def test_a_partly_loaded_model_takes_patches_of_every_weight(node, model, clip, stored, sample, low_memory, close):
    """Merging changes all tensors, the modulation tables included."""
    change = lambda tensors: {k: v * (1.7 if "scale_shift_table" in k else 0.9) for k, v in tensors.items()}  # noqa: E731
    second = node("SanaSprintModelLoader", model=stored("transformer", "low-memory.safetensors", change))
    merged = node("ModelMergeSimple", model1=model, model2=second, ratio=0.5)
    expected = sample(model=merged, steps=1)
    low_memory(1)
    close(sample(model=merged, steps=1), expected, LIMIT)
    assert model.model.model_lowvram


def test_a_partly_loaded_text_encoder_and_vae_give_the_same(clip, vae, encode, round_trip, low_memory):
    before = encode(), round_trip()
    low_memory(1)
    assert torch.equal(encode(), before[0]) and clip.patcher.model.model_lowvram
    assert torch.equal(round_trip(), before[1]) and vae.patcher.model.model_lowvram


def test_a_model_can_be_unloaded_a_bit_at_a_time(model, sample):
    expected = sample()
    freed = model.partially_unload(model.offload_device, 50_000)
    assert freed >= 50_000
    assert torch.equal(sample(), expected)


def test_comfyui_can_make_a_plain_copy_of_each_object(model, clip, vae, sample, round_trip, pipeline_folder):
    """What TorchCompileModel, hooks and device selection ask for where weights are streamed."""
    for patcher in (model, clip.patcher, vae.patcher):
        factory, arguments = patcher.cached_patcher_init
        copy = factory(*arguments, disable_dynamic=True)
        assert not copy.is_dynamic()
        ours, theirs = patcher.model.state_dict(), copy.model.state_dict()
        assert ours.keys() == theirs.keys()
    assert torch.equal(sample(model=model.cached_patcher_init[0](*model.cached_patcher_init[1])), sample())


def test_memory_estimates_grow_with_the_image(model, vae):
    small, large = [1, 32, 8, 8], [1, 32, 64, 64]
    assert 0 < model.memory_required(small) < model.memory_required(large)
    for estimate, scale in ((vae.memory_used_decode, 1), (vae.memory_used_encode, 32)):
        one, two = (estimate([1, 3, n * scale, n * scale], torch.bfloat16) for n in (8, 16))
        assert two == 4 * one > 0
        assert estimate([1, 3, 8 * scale, 8 * scale], torch.float32) == 2 * one


# --- devices ----------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch):
    """device(bf16=, fp16=): what the compute device is said to be good at."""
    import comfy.model_management as mm

    def pretend(bf16, fp16):
        monkeypatch.setattr(mm, "should_use_bf16", lambda *args, **kwargs: bf16)
        monkeypatch.setattr(mm, "should_use_fp16", lambda *args, **kwargs: fp16)

    return pretend


@pytest.mark.parametrize("bf16", [False, True])
def test_text_encoder_and_vae_never_run_in_fp16(node, device, pipeline_folder, encode, round_trip, sample, bf16):
    device(bf16=bf16, fp16=True)
    model, clip, vae = node("SanaSprintLoader", model=pipeline_folder.name)
    allowed = (torch.bfloat16, torch.float32) if bf16 else (torch.float32,)
    assert clip.cond_stage_model.compute_dtype == allowed[0]
    assert vae.vae_dtype in allowed
    assert model.model.get_dtype_inference() in allowed
    assert sample(model=model).isfinite().all()
    assert encode(clip).isfinite().all() and round_trip(vae).isfinite().all()


@pytest.mark.parametrize("quantised", [False, True])
def test_fp16_is_computed_when_asked_for_by_name(node, device, stored, quantised):
    def change(tensors):
        marker = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if quantised else {}
        return tensors | marker | ({"proj_out.scale_weight": torch.ones(())} if quantised else {})

    device(bf16=False, fp16=True)
    file = stored("transformer", f"fp16-{quantised}.safetensors", change)
    for dtype, expected in (("fp16", torch.float16), ("auto", torch.float32)):
        model = node("SanaSprintModelLoader", model=file, dtype=dtype)
        assert model.model.get_dtype_inference() == expected


def test_an_fp16_file_of_gemma_is_computed_in_fp32_where_there_is_no_bf16(node, stored, encode, close):
    half = stored("text_encoder", "half.safetensors", lambda t: {k: v.half() for k, v in t.items()})
    clip = node("SanaSprintTextEncoderLoader", text_encoder=half)
    assert clip.cond_stage_model.compute_dtype == torch.float32
    close(encode(clip), encode(), 0.01)


def test_sdpa_replaces_only_the_slow_attention_functions(host, monkeypatch):
    import comfy.ldm.modules.attention as attention

    adapter = host.pack("nodes.adapters.model")
    flash = lambda *args, **kwargs: None  # noqa: E731
    for chosen, expected in (
        (attention.attention_sub_quad, attention.attention_pytorch),
        (attention.attention_split, attention.attention_pytorch),
        (attention.attention_pytorch, attention.attention_pytorch),
        (flash, flash),
    ):
        monkeypatch.setattr(attention, "optimized_attention", chosen)
        assert adapter.attention_function() is expected


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_plain_copy_under_dynamic_memory_has_one_dtype(host, stored, monkeypatch, dtype):
    """With comfy-aimdo on, ComfyUI fills layers late, in the file's dtype; compile and hooks ask for plain copies."""
    import comfy.memory_management
    import comfy.model_management as mm

    stored_dtype = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    convert = lambda tensors: {name: tensor.to(stored_dtype) for name, tensor in tensors.items()}  # noqa: E731
    model_name = stored("transformer", f"late-{dtype}.safetensors", convert)
    vae_name = stored("autoencoder", f"late-vae-{dtype}.safetensors", convert)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(mm, "should_use_bf16", lambda *args, **kwargs: True)
    folder = host.base / "models" / "checkpoints"
    patcher = host.pack("nodes.adapters.model").load_model(folder / model_name, disable_dynamic=True)
    vae = host.pack("nodes.adapters.vae").load_vae(folder / vae_name)
    assert {p.dtype for p in patcher.model.diffusion_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in vae.first_stage_model.parameters()} == {torch.bfloat16}
    x, s = torch.randn(1, 32, 2, 2).bfloat16(), torch.tensor([0.5])
    velocity = patcher.model.diffusion_model(x, s, torch.randn(1, 4, 64).bfloat16(), guidance=4.5)
    assert velocity.isfinite().all()
    assert vae.first_stage_model.decode(x).isfinite().all()


def test_fp16_vae_asked_for_on_the_command_line_becomes_bf16_or_fp32(node, pipeline_folder, monkeypatch):
    import comfy.model_management as mm

    monkeypatch.setattr(mm.args, "fp16_vae", True)
    assert node("SanaSprintVAELoader", vae=pipeline_folder.name).vae_dtype == torch.float32


def test_the_vae_decodes_in_another_thread(vae):
    """Threads start outside inference mode, in which the loader ran."""
    decoded = []

    def decode():
        with torch.no_grad():
            decoded.append(vae.decode(torch.zeros(1, 32, 2, 2)))

    thread = threading.Thread(target=decode)
    thread.start()
    thread.join()
    assert decoded[0].shape == (1, 64, 64, 3)


def test_a_compiled_vae_gives_the_same(host, node, stored, round_trip, close, monkeypatch):
    """Whole and by tiles; it is loaded as a whole, as weights that come late would break the graph at every layer."""
    import comfy.model_patcher

    class Streaming(comfy.model_patcher.ModelPatcher):
        """Stands in for what ComfyUI chooses on a GPU with comfy-aimdo."""

    compiled, used = host.pack("nodes.adapters.vae").compiled, []

    def backend(graph, inputs):
        used.append(graph)
        return graph.forward

    compile_in_place = functools.partial(compiled.compile_in_place, backend=backend)
    monkeypatch.setattr(compiled, "compile_in_place", compile_in_place)
    monkeypatch.setattr(compiled, "require_compiler", lambda device_type: None)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Streaming)
    monkeypatch.setattr(host.pack("nodes.adapters.residence"), "SHARE", 0.0)
    torch._dynamo.reset()
    file = stored("autoencoder", "compiled.safetensors", lambda tensors: tensors)
    fast, plain = (node("SanaSprintVAELoader", vae=file, compile=on) for on in (True, False))
    used.clear()
    close(round_trip(fast), round_trip(plain), LIMIT)
    assert len(used) == 2 and fast.disable_offload
    latent, tiles = {"samples": torch.randn(1, 32, 4, 6)}, {"tile_size": 64, "overlap": 32}
    close(*(node("VAEDecodeTiled", vae=one, samples=latent, **tiles) for one in (fast, plain)), LIMIT)
    assert type(plain.patcher) is Streaming and type(fast.patcher) is comfy.model_patcher.ModelPatcher
    assert fast.first_stage_model.state_dict().keys() == plain.first_stage_model.state_dict().keys()
    factory, arguments = plain.patcher.cached_patcher_init
    assert type(factory(*arguments, disable_dynamic=True)) is comfy.model_patcher.ModelPatcher
    torch._dynamo.reset()


@pytest.mark.parametrize("small", [True, False])
def test_what_is_small_beside_the_device_is_loaded_as_a_whole(host, node, stored, monkeypatch, small):
    """In the precision that it is held in there, and not as the file has it."""
    import comfy.model_management as mm
    import comfy.model_patcher

    class Streaming(comfy.model_patcher.ModelPatcher):
        """Stands in for what ComfyUI chooses on a GPU with comfy-aimdo."""

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Streaming)
    for kind, loader in (("transformer", "Model"), ("text_encoder", "TextEncoder"), ("autoencoder", "VAE")):
        sizes = []

        def remember(tensors, sizes=sizes):
            sizes.append(sum(tensor.numel() for tensor in tensors.values()))
            return tensors

        file = stored(kind, f"small-{kind}.safetensors", remember)
        memory = sizes[0] * 2 / host.pack("nodes.adapters.residence").SHARE - (not small)
        monkeypatch.setattr(mm, "get_total_memory", lambda *_, memory=memory, **__: memory)
        input_name = {"Model": "model", "TextEncoder": "text_encoder", "VAE": "vae"}[loader]
        loaded = node(f"SanaSprint{loader}Loader", **{input_name: file}, dtype="bf16")
        assert type(getattr(loaded, "patcher", loaded)) is (comfy.model_patcher.ModelPatcher if small else Streaming)


def test_where_nothing_can_be_compiled_the_loader_says_so(host, node, stored, monkeypatch):
    compiled = host.pack("nodes.adapters.vae").compiled

    def fail(*args, **kwargs):
        raise RuntimeError("Triton is missing")

    compiled.require_compiler.cache_clear()
    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ValueError, match=r"cannot compile for cpu on this machine \(Triton is missing\)"):
        node("SanaSprintVAELoader", vae=presets.BUNDLED_NAME, compile=True)
    compiled.require_compiler.cache_clear()


def test_text_encoder_stays_on_the_cpu(node, monkeypatch):
    """Where it was told to, whatever device ComfyUI would choose."""
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "text_encoder_device", lambda: torch.device("meta"))
    clip = node("SanaSprintTextEncoderLoader", text_encoder=presets.BUNDLED_NAME, device="cpu")
    assert clip.patcher.load_device == clip.patcher.offload_device == torch.device("cpu")
    conditioning = node("SanaSprintTextEncode", clip=clip, text="a red circle")
    assert conditioning[0][0].device.type == "cpu" and conditioning[0][0].isfinite().all()
