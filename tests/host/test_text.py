"""The CLIP object: prompts, weights, layers, and a prefix cache that never outlives what it was computed with."""

from types import SimpleNamespace

import pytest
import torch

from sprint_core.pipeline import Pipeline
from sprint_core.text.encoder import encode_ids
from sprint_core.text.prompts import Tokens
from sprint_core.text.tokenizers import PAD
from sprint_core.weights import presets

LIMIT = 1e-5


def tokens_of(conditioning):
    return conditioning[0][0]


@pytest.fixture
def encode(node, clip):
    def run(prompt, clip=clip, **inputs):
        return tokens_of(node("SanaSprintTextEncode", clip=clip, text=prompt, **inputs))

    return run


@pytest.fixture(scope="module")
def core(pipeline_folder):
    return Pipeline.load(pipeline_folder).text_encoder


@pytest.fixture
def prefills(clip, monkeypatch):
    """How many tokens each run of the instruction had."""
    seen, gemma = [], clip.cond_stage_model.encoder.transformer
    real = gemma.prefill
    monkeypatch.setattr(gemma, "prefill", lambda ids, **kwargs: seen.append(ids.shape[1]) or real(ids, **kwargs))
    return seen


@pytest.fixture
def lora(write_lora):
    """A LoRA of the text encoder under kohya's names."""
    write_lora("text.safetensors", "lora_te_", {"layers.0.self_attn.q_proj": (64, 64)})
    return "text.safetensors"


# --- prompts --------------------------------------------------------------------------------------


def test_clip_text_encode_is_our_node_on_its_defaults(node, clip, encode, core, close):
    stock = tokens_of(node("CLIPTextEncode", clip=clip, text="a red circle"))
    assert torch.equal(stock, encode("a red circle"))
    close(stock[0], core.encode(["a red circle"])[0], LIMIT)


def test_prompt_formats_differ_as_published(encode):
    authors, diffusers = encode("A Cat"), encode("A Cat", prompt_format="diffusers")
    assert authors.shape == diffusers.shape and not torch.allclose(authors, diffusers, atol=1e-3)
    assert torch.equal(diffusers, encode("a cat", prompt_format="diffusers"))
    assert not torch.equal(authors, encode("a cat"))


def custom(instruction: str) -> dict[str, str]:
    return {"instruction": "custom", "instruction.custom_instruction": instruction}


def test_instruction_can_be_left_out_or_replaced(encode, core):
    plain = encode("a cat", instruction="off")
    assert plain.shape[1] == 1 + len("a cat")  # the stand-in's tokens are bytes
    assert torch.equal(plain, encode("a cat", **custom("")))
    own = encode("a cat", **custom("Paint this: "))
    assert own.shape == encode("a cat").shape and not torch.equal(own, encode("a cat"))


def test_long_prompts_are_cut_to_what_the_model_was_trained_for(encode):
    assert encode("x" * 1000).shape[1] == 300
    assert encode("").shape[1] == 2  # BOS and the instruction's last token


@pytest.fixture
def shown(monkeypatch):
    """What ComfyUI's server would show on the nodes: [(node, text)]."""
    import server

    lines = []
    stand_in = SimpleNamespace(send_progress_text=lambda text, node_id: lines.append((node_id, text)))
    monkeypatch.setattr(server.PromptServer, "instance", stand_in, raising=False)
    return lines


@pytest.mark.parametrize("id", ["CLIPTextEncode", "SanaSprintTextEncode"])
def test_the_part_of_a_prompt_that_is_not_read_is_named(node, clip, caplog, shown, id):
    """In the log and on the node that encodes it; two prompts that differ only there are the same to the model."""
    from comfy_execution.utils import CurrentNodeContext

    read = (
        "a (red:1.2) circle" + "." * 280
    )  # 298 tokens beside BOS and the instruction's last one: "(", ":1.2)" are none
    with caplog.at_level("WARNING"), CurrentNodeContext("prompt", "7"):
        one, two = (
            tokens_of(node(id, clip=clip, text=read + "." * 6 + end)) for end in (" on a table", " in the rain")
        )
        assert shown[-1][1].endswith('"in the rain"')  # it stays
        assert torch.equal(one, two)
        assert not torch.equal(one, tokens_of(node(id, clip=clip, text="b" + read[1:])))
    notices = [
        f'the prompt is longer than the 300 tokens that this model reads; not read: "{end}"'
        for end in ("on a table", "in the rain")
    ]
    assert [line for line in shown if line[1]] == [("7", notice) for notice in notices]
    assert [r.getMessage() for r in caplog.records] == notices
    assert shown[-1] == ("7", "")  # a shorter prompt takes it away


def test_the_bundled_model_reads_32_tokens(node, caplog):
    clip = node("SanaSprintLoader", model=presets.BUNDLED_NAME)[1]
    prompt = "a red apple to the left of a large blue car, " * 4 + "and a green leaf"
    with caplog.at_level("WARNING"):
        node("CLIPTextEncode", clip=clip, text=prompt)
    (notice,) = [r.getMessage() for r in caplog.records if "not read" in r.getMessage()]
    assert "32 tokens" in notice and notice.endswith(' green leaf"')


def test_our_text_node_refuses_another_encoder(node, clip):
    foreign = clip.clone()
    foreign.tokenizer = object()
    with pytest.raises(ValueError, match="CLIP Text Encode"):
        node("SanaSprintTextEncode", clip=foreign, text="a cat")


# --- weights --------------------------------------------------------------------------------------


def test_a_weight_moves_only_its_words_and_linearly(encode):
    plain, more, most = encode("a red circle"), encode("a (red:1.2) circle"), encode("a (red:1.4) circle")
    changed = (more - plain).abs().amax(-1)[0] > 1e-6
    word = range(2 + len("a "), 2 + len("a red"))  # after BOS and the instruction's last token
    assert changed.nonzero()[:, 0].tolist() == list(word)
    assert torch.allclose(most - plain, 2 * (more - plain), atol=1e-5)


def test_weight_zero_is_what_an_empty_prompt_says_there(encode, core, clip):
    prompts = core.prompts
    tokens = prompts.tokens("red")
    empty = list(prompts.instruction_ids) + [PAD] * (len(tokens.ids) - len(prompts.instruction_ids))
    expected = encode_ids(core.gemma, [Tokens(empty, tokens.keep)], device="cpu")[0]
    assert torch.allclose(encode("(red:0)")[0, 2:], expected[2:], atol=1e-5)


def test_brackets_weigh_as_in_comfyui_and_can_be_escaped(encode):
    assert torch.equal(encode("a (red) circle"), encode("a (red:1.1) circle"))
    assert torch.equal(encode("a (red:1.0) circle"), encode("a red circle"))
    assert torch.equal(encode(r"a \(red\)"), encode("a (red:1.0)")) is False
    assert encode(r"a \(red\)").shape[1] == 2 + len("a (red)")


# --- layers, LoRA, hooks ----------------------------------------------------------------------------


def test_clip_set_last_layer(node, clip, encode, core, close):
    earlier = node("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2)
    result = encode("a cat", clip=earlier)
    close(result[0], core.encode(["a cat"], layer=-2)[0], LIMIT)
    assert not torch.allclose(result, encode("a cat"), atol=1e-3)


def test_a_text_lora_changes_the_output_and_leaves_with_its_clip(node, model, clip, encode, lora, stored, write_lora):
    before = encode("a cat")
    patched = node("LoraLoader", model=model, clip=clip, lora_name=lora, strength_model=1.0, strength_clip=0.7)[1]
    changed = encode("a cat", clip=patched)
    assert torch.equal(encode("a cat"), before)

    change = write_lora(lora, "lora_te_", {"layers.0.self_attn.q_proj": (64, 64)})["layers.0.self_attn.q_proj"]
    name = "model.layers.0.self_attn.q_proj.weight"
    file = stored("text_encoder", "merged_te.safetensors", lambda t: t | {name: t[name] + 0.7 * change})
    merged = node("SanaSprintTextEncoderLoader", text_encoder=file)
    assert torch.allclose(changed, encode("a cat", clip=merged), atol=1e-4)
    assert (changed - before)[:, 1:].abs().max() > 1e-2


@pytest.mark.parametrize("scheduled", [False, True])
def test_clip_hooks_never_meet_a_cached_prefix(node, model, clip, encode, lora, scheduled):
    before = encode("a cat")
    expected = encode("a cat", clip=node("LoraLoader", model=model, clip=clip, lora_name=lora)[1])
    hooks = node("CreateHookLora", lora_name=lora)
    hooked = node("SetClipHooks", clip=clip, apply_to_conds=True, schedule_clip=scheduled, hooks=hooks)
    result = encode("a cat", clip=hooked)
    assert not torch.allclose(result, before, atol=1e-3)
    assert torch.allclose(result, expected, atol=1e-4)
    assert torch.equal(encode("a cat"), before)


def test_a_hook_that_changes_over_time_is_encoded_at_each_strength(node, model, clip, encode, lora):
    without, fully = (
        encode("a cat"),
        encode("a cat", clip=node("LoraLoader", model=model, clip=clip, lora_name=lora)[1]),
    )
    frames = node("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)
    frames = node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=frames)
    hooks = node("SetHookKeyframes", hooks=node("CreateHookLora", lora_name=lora), hook_kf=frames)
    hooked = node("SetClipHooks", clip=clip, apply_to_conds=True, schedule_clip=True, hooks=hooks)
    early, late = node("CLIPTextEncode", clip=hooked, text="a cat")
    assert torch.allclose(early[0], without, atol=1e-4) and torch.allclose(late[0], fully, atol=1e-4)


# --- the prefix cache -------------------------------------------------------------------------------


def test_the_instruction_is_encoded_once(clip, encode, core, prefills):
    clip.cond_stage_model.cache.clear()
    for prompt in ("a cat", "two dogs", "a (red:1.3) hat"):
        encode(prompt)
    assert prefills == [len(core.prompts.prefix_ids)]


def test_cached_states_are_dropped_when_comfyui_unloads(clip, encode, prefills):
    import comfy.model_management as mm

    encode("a cat")
    assert clip.cond_stage_model.cache.prefixes._entries
    before = encode("a cat")
    mm.unload_all_models()
    assert not clip.cond_stage_model.cache.prefixes._entries
    assert torch.equal(encode("a cat"), before)
    assert len(prefills) == 1


def test_cached_states_belong_to_patches_dtype_layer_and_device(node, model, clip, encode, lora):
    clip.cond_stage_model.cache.clear()
    keys = lambda: set(clip.cond_stage_model.cache.prefixes._entries)  # noqa: E731
    encode("a cat")
    first = keys()
    encode("a cat", clip=node("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2))
    assert len(keys()) == len(first) + 1
    (key,) = first
    assert torch.float32 in key and "cpu" in key
    encode("a cat", clip=node("LoraLoader", model=model, clip=clip, lora_name=lora)[1])
    assert not keys() & first


def test_bf16_text_is_close(node, pipeline_folder, encode, close):
    half = node("SanaSprintTextEncoderLoader", text_encoder=pipeline_folder.name, dtype="bf16")
    assert half.cond_stage_model.compute_dtype == torch.bfloat16
    result = encode("a cat", clip=half)
    assert result.dtype == torch.float32
    close(result, encode("a cat"), 0.05)
    assert not torch.equal(result, encode("a cat"))


def test_injections_never_meet_a_cached_prefix(clip, encode):
    """Bypass LoRA and the like change the network's forward, not its patches."""
    from comfy.model_patcher import PatcherInjection

    plain = encode("a cat")
    changed = clip.clone()
    projection = changed.cond_stage_model.gemma2_2b.transformer.model.layers[0].self_attn.q_proj
    forward = projection.forward

    def inject(patcher):
        projection.forward = lambda x: forward(x) * 0.5

    def eject(patcher):
        projection.forward = forward

    changed.patcher.set_injections("test", [PatcherInjection(inject=inject, eject=eject)])
    with_prefix = encode("a cat", clip=changed)
    clip.cond_stage_model.cache.clear()
    changed.cond_stage_model.cache.clear()
    assert torch.equal(with_prefix, encode("a cat", clip=changed)) and not torch.equal(with_prefix, plain)
    changed.patcher.eject_model()
    assert torch.equal(encode("a cat"), plain)
