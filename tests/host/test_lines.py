"""One prompt a line: image i of the batch is the image of line i alone, whatever the other lines are."""

from types import SimpleNamespace

import pytest
import torch
from api_prompts import custom_size

LIMIT = 1e-5
LINES = ("a red circle", "two (large:1.3) blue squares to the left of a green cross", "a cat")
SEED = 10


@pytest.fixture
def encode(node, clip):
    def run(text, lines=True, **inputs):
        return node("SanaSprintTextEncode", clip=clip, text=text, one_prompt_per_line=lines, **inputs)

    return run


def batch_of(node, images):
    return node("SanaSprintEmptyLatent", **custom_size(128, 96), batch_size=images)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_image_is_that_of_its_line_alone(node, encode, sample, close, steps):
    images = sample(positive=encode("\n".join(LINES)), latent_image=batch_of(node, 3), seed=SEED, steps=steps)
    for i, line in enumerate(LINES):
        alone = sample(positive=encode(line, lines=False), seed=SEED + i, steps=steps)
        close(images[i : i + 1], alone, LIMIT)
    assert not torch.allclose(images[0], images[1], atol=1e-2)


def test_a_line_does_not_see_the_others(node, encode, sample, close):
    """At the same place of a batch, with the same noise."""
    for i, line in enumerate(LINES):
        mixed = sample(positive=encode("\n".join(LINES)), latent_image=batch_of(node, 3), seed=SEED)
        same = sample(positive=encode(line, lines=False), latent_image=batch_of(node, 3), seed=SEED)
        close(mixed[i : i + 1], same[i : i + 1], LIMIT)


def test_lines_begin_again_for_more_images(node, encode, sample, close):
    images = sample(positive=encode("\n".join(LINES[:2])), latent_image=batch_of(node, 5), seed=SEED)
    for i in range(5):
        close(images[i : i + 1], sample(positive=encode(LINES[i % 2]), seed=SEED + i), LIMIT)


@pytest.mark.parametrize(("images", "have"), [(1, "1 image"), (2, "2 images")])
def test_more_lines_than_images_are_refused(node, encode, sample, ksample, unchanged, images, have):
    with unchanged(), pytest.raises(ValueError, match=f"holds 3 prompts and the latent {have}; set batch_size"):
        sample(positive=encode("\n".join(LINES)), latent_image=batch_of(node, images))
    with pytest.raises(ValueError, match=r"of Empty SANA Latent to 3, or write fewer lines$"):
        ksample(positive=encode("\n".join(LINES)), latent_image=batch_of(node, images))


def test_the_stock_sampler_follows_the_lines(node, encode, ksample, close):
    images = ksample(positive=encode("\n".join(LINES)), latent_image=batch_of(node, 3), steps=1)
    for i, line in enumerate(LINES):
        same = ksample(positive=encode(line, lines=False), latent_image=batch_of(node, 3), steps=1)
        close(images[i : i + 1], same[i : i + 1], LIMIT)


def test_guided_models_take_lines_on_both_sides(node, host, encode, clip, close):
    """A teacher with cfg, whose negative prompt is one for all."""
    import standin

    folder = standin.make(host.base / "models" / "diffusers" / "lines-teacher", standin.TEACHER)
    model = node("SanaSprintLoader", model=folder.name)[0]
    inputs = {"model": model, "negative": encode("grey", lines=False), "latent_image": batch_of(node, 3)}
    inputs |= {"steps": 2, "cfg": 4.5, "sampler_name": "euler", "scheduler": "simple", "seed": 1}
    images = node("KSampler", positive=encode("\n".join(LINES)), **inputs)["samples"]
    for i, line in enumerate(LINES):
        same = node("KSampler", positive=encode(line, lines=False), **inputs)["samples"]
        close(images[i : i + 1], same[i : i + 1], 1e-4)


def test_empty_lines_are_left_out_and_one_line_is_the_plain_prompt(encode):
    for text in ("a cat", "\n  \na cat\r\n\n"):
        ((rows, options),) = encode(text)
        ((plain, _),) = encode("a cat", lines=False)
        assert torch.equal(rows, plain) and "attention_mask" not in options
    assert torch.equal(encode(" \n")[0][0], encode("", lines=False)[0][0])
    ((rows, options),) = encode("\n".join(LINES))
    assert [int(n) for n in options["attention_mask"].sum(1)] == [encode(line)[0][0].shape[1] for line in LINES]
    assert encode("a\nb", lines=False)[0][0].shape == (1, 2 + len("a\nb"), rows.shape[2])  # off: one prompt


def test_lines_take_the_instruction_and_the_scheduled_lora(node, model, clip, encode, write_lora):
    own_instruction = {"instruction": "custom", "instruction.custom_instruction": "Paint this: "}
    own = encode("a cat\na dog", **own_instruction)[0][0]
    assert torch.equal(own[1:], encode("a dog", **own_instruction)[0][0])
    write_lora("lines.safetensors", "lora_te_", {"layers.0.self_attn.q_proj": (64, 64)})
    frames = node("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)
    frames = node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=frames)
    hooks = node("SetHookKeyframes", hooks=node("CreateHookLora", lora_name="lines.safetensors"), hook_kf=frames)
    hooked = node("SetClipHooks", clip=clip, apply_to_conds=True, schedule_clip=True, hooks=hooks)
    run = {"clip": hooked, "one_prompt_per_line": True}
    both = node("SanaSprintTextEncode", text="a cat\na dog", **run)
    for i, line in enumerate(("a cat", "a dog")):
        alone = node("SanaSprintTextEncode", text=line, **run)
        assert len(both) == len(alone) == 2
        for (rows, at), (row, alone_at) in zip(both, alone, strict=True):
            assert torch.equal(rows[i : i + 1], row)
            assert at["clip_start_percent"] == alone_at["clip_start_percent"]


def test_the_node_names_the_lines_that_are_not_read_to_their_ends(encode, monkeypatch):
    import server
    from comfy_execution.utils import CurrentNodeContext

    shown = []
    stand_in = SimpleNamespace(send_progress_text=lambda text, node_id: shown.append((node_id, text)))
    monkeypatch.setattr(server.PromptServer, "instance", stand_in, raising=False)
    with CurrentNodeContext("prompt", "7"):
        encode("\n".join(("x" * 310, "a cat", "y" * 300 + " and a dog")))
        sentence = "the prompt is longer than the 300 tokens that this model reads; not read:"
        assert shown[-1] == ("7", f'line 1: {sentence} "{"x" * 12}"; line 3: {sentence} "yy and a dog"')
        encode("a cat\na dog")
        assert shown[-1] == ("7", "")
