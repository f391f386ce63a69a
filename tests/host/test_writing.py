"""The text encoder writes for ComfyUI's own Generate Text: with the core's tokens, progress, Cancel and all."""

import gc
import weakref

import pytest
import torch

from sprint_core.text.generation import Sampling, chat_text, generate, stop_ids
from sprint_core.text.loading import find_tokenizer
from sprint_core.text.tokenizers import decode
from sprint_core.weights import checkpoint, layouts, presets

OFF = {"sampling_mode": "off"}
ON = {"sampling_mode": "on", "temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
LENGTH = 24


@pytest.fixture(scope="module")
def file(stored):
    """The stand-in's encoder with weights under which a token does not just follow itself."""

    def changed(name, weight):
        gain = 10 if name == "model.norm.weight" else 1 if ".post_" in name else 0
        return 0.02 * weight if "embed_tokens" in name else weight + gain

    return stored("text_encoder", "writer.safetensors", lambda t: {n: changed(n, w) for n, w in t.items()})


@pytest.fixture(scope="module")
def writer(node, file):
    return node("SanaSprintTextEncoderLoader", text_encoder=file)


@pytest.fixture
def write(node, writer):
    def run(prompt="a dog", sampling_mode=OFF, clip=writer, max_length=LENGTH, **inputs):
        return node(
            "TextGenerate", clip=clip, prompt=prompt, max_length=max_length, sampling_mode=sampling_mode, **inputs
        )

    return run


@pytest.fixture(scope="module")
def expected(host, file):
    """What the core writes, which equals transformers: expected(text, ...)."""
    weights = checkpoint.load(host.base / "models" / "checkpoints" / file, layouts.TEXT_ENCODER)
    tokenizer, gemma = find_tokenizer(weights), checkpoint.build(weights, dtype=torch.float32, device="cpu")

    def run(text, **settings):
        ids = tokenizer.encode(text)
        tokens = generate(gemma, ids, max_tokens=LENGTH, stop=stop_ids(tokenizer), device="cpu", **settings)
        return decode(tokenizer, list(tokens))

    return run


def test_the_answer_is_the_cores(write, expected):
    assert write("a dog") == expected(chat_text("a dog"))
    assert write("a dog") != write("a hat")
    brackets = "a (red:1.2) cat"  # text, and no weights
    assert write(brackets) == expected(chat_text(brackets))


def test_a_prompt_without_a_turn_is_continued(write, expected):
    assert write("a dog", use_default_template=False) == expected("a dog") != write("a dog")
    turns = chat_text("a dog")
    assert write(turns) == write("a dog")


def test_draws_are_seeded(write, expected):
    drawn = [write("a dog", {**ON, "seed": seed}) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    sampling = Sampling(1.5, 40, 0.95, 0.01, 1.1)
    assert drawn[0] == expected(chat_text("a dog"), sampling=sampling, seed=1)
    assert drawn[0] != write("a dog", {**ON, "seed": 1, "presence_penalty": 4.0})
    with pytest.raises(ValueError, match=r"repetition_penalty is 0\.0; it must be"):
        write("a dog", {**ON, "seed": 1, "repetition_penalty": 0.0})


def test_progress_and_cancel(writer, write, monkeypatch):
    import comfy.model_management as mm
    import comfy.utils

    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    write("a dog")
    values = [value for value, total in seen if total == LENGTH]  # ComfyUI leaves some out, for speed
    assert len(values) == len(seen) and values == sorted(set(values)) and (values[0], values[-1]) == (1, LENGTH)

    lengths = []
    network = writer.cond_stage_model.encoder.transformer
    handle = network.model.embed_tokens.register_forward_pre_hook(lambda _, ids: lengths.append(ids[0].shape[1]))
    cancel = lambda *_, **__: mm.interrupt_current_processing(True)  # noqa: E731
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", cancel)
    with pytest.raises(mm.InterruptProcessingException):
        write("a dog")
    handle.remove()
    assert len(lengths) == 1  # the prompt, and no token after


def test_each_token_is_computed_once_and_the_memory_goes_afterwards(writer, write, monkeypatch):
    import comfy.model_management as mm

    lengths, caches = [], []

    def watched(ids, **settings):
        lengths.append(ids.shape[1])
        text = real(ids, **settings)
        caches.append(weakref.ref(text))
        return text

    network = writer.cond_stage_model.encoder.transformer
    real = network.prefill
    monkeypatch.setattr(network, "prefill", watched)
    write("a dog")
    prompt = len(writer.tokenizer.tokenizer.encode(chat_text("a dog")))
    assert lengths == [prompt] + [1] * (LENGTH - 1)
    gc.collect()
    assert not any(cache() for cache in caches)

    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", lambda *_, **__: mm.interrupt_current_processing(True))
    with pytest.raises(mm.InterruptProcessingException):
        write("a dog")
    gc.collect()
    assert not any(cache() for cache in caches)


def test_what_was_encoded_stays_as_it_was(node, writer, write):
    encode = lambda: node("CLIPTextEncode", clip=writer, text="a red circle")[0][0]  # noqa: E731
    before = encode()
    write("a red circle")
    assert torch.equal(encode(), before)
    writer.cond_stage_model.cache.clear()
    assert torch.equal(encode(), before)


def test_a_lora_of_the_text_encoder_writes_as_well(node, model, writer, write, write_lora):
    write_lora("writer.safetensors", "lora_te_", {"layers.0.self_attn.q_proj": (64, 64)})
    lora = {"lora_name": "writer.safetensors", "strength_model": 0.0, "strength_clip": 2.0}
    patched = node("LoraLoader", model=model, clip=writer, **lora)[1]
    before = write("a dog")
    assert write("a dog", clip=patched) != before
    assert write("a dog") == before


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_other_types_write(node, file, write, dtype):
    half = node("SanaSprintTextEncoderLoader", text_encoder=file, dtype=dtype)
    assert write("a dog", clip=half)


def test_an_earlier_last_layer_does_not_change_what_is_written(node, writer, write):
    """Clip skip is of what the transformer reads; ComfyUI resets it to write."""
    assert write("a dog", clip=node("CLIPSetLastLayer", clip=writer, stop_at_clip_layer=-2)) == write("a dog")


# --- refusals ---------------------------------------------------------------------------------------


def test_the_bundled_encoder_cannot_write(node, write):
    bundled = node("SanaSprintLoader", model=presets.BUNDLED_NAME)[1]
    sentence = "this text encoder only reads, since its tokenizer has no <start_of_turn>; load gemma-2-2b-it to write"
    with pytest.raises(ValueError, match=sentence):
        write("a dog", clip=bundled)
    assert torch.isfinite(node("CLIPTextEncode", clip=bundled, text="a red circle")[0][0]).all()


@pytest.mark.parametrize("name", ["image", "video"])
def test_what_gemma_cannot_see_is_refused(write, pixels, name):
    with pytest.raises(ValueError, match=f"^{name}: Gemma-2 reads text alone; disconnect this input"):
        write("a dog", **{name: pixels})


def test_weights_with_nan_are_named(node, stored, write):
    name = "model.layers.1.mlp.up_proj.weight"
    file = stored("text_encoder", "nan-writer.safetensors", lambda t: t | {name: t[name] * float("nan")})
    broken = node("SanaSprintTextEncoderLoader", text_encoder=file)
    with pytest.raises(ValueError, match=r"nan-writer.safetensors: its tensor .*up_proj.* holds NaN"):
        write("a dog", clip=broken)


def test_tokens_of_a_prompt_are_not_answered(writer):
    with pytest.raises(ValueError, match="these tokens are of a prompt to paint"):
        writer.generate(writer.tokenize("a dog"))
