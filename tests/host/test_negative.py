"""SANA-Sprint Negative (NAG) in a real ComfyUI: the core's images, other nodes beside it, and refused input."""

import machines
import pytest
import standin
import torch

from sprint_core.models.nag import NAG

NODE = "SanaSprintNegative"
LIMIT = 1e-5  # relative, where batches and regions are summed in another order


@pytest.fixture
def avoid(node, model, other):
    """A MODEL that avoids "a large blue square to the left of it"."""
    return lambda **inputs: node(NODE, **({"model": model, "negative": other} | inputs))


# --- the images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, end", [(1, 1.0), (2, 1.0), (2, 0.1), (4, 0.2)])
def test_it_paints_what_the_core_paints(avoid, sample, node, vae, pipeline, steps, end):
    latent = sample(model=avoid(scale=4.0, alpha=0.7, tau=1.5, end_percent=end), seed=7, steps=steps)
    nag = NAG(4.0, 0.7, 1.5, end=end)
    negative = "a large blue square to the left of it"
    expected = pipeline.generate(["a red circle"], seeds=[7], size=(128, 96), steps=steps, negative=negative, nag=nag)
    image = node("VAEDecode", vae=vae, samples={"samples": latent})
    assert image.shape == expected.shape and (image - expected).abs().max() <= machines.limit(0.0)


def test_the_widgets_start_at_the_papers_values(node):
    inputs = node.ids[NODE].INPUT_TYPES()["required"]
    shown = {name: options["default"] for name, (_, options) in inputs.items() if "default" in options}
    assert shown == {"scale": 3.0, "alpha": 0.5, "tau": 2.5, "start_percent": 0.0, "end_percent": 1.0}


@pytest.mark.parametrize("inputs", [{"scale": 1.0}, {"alpha": 0.0}, {"start_percent": 0.9}])
def test_no_guidance_is_the_plain_image(avoid, sample, inputs):
    assert torch.equal(sample(model=avoid(**inputs), seed=3), sample(seed=3))


def test_it_works_with_stock_samplers(avoid, sample, ksample):
    avoiding = avoid()
    assert not torch.equal(ksample(model=avoiding), ksample())
    assert torch.equal(ksample(model=avoiding), sample(model=avoiding, seed=1, steps=4, schedule="app"))


def test_the_model_before_it_is_as_it_was(avoid, sample, model):
    before = sample(seed=3)
    sample(model=avoid(), seed=3)
    assert "sana_sprint_negative" not in model.model_options["transformer_options"]
    assert torch.equal(sample(seed=3), before)


def test_a_second_one_replaces_the_first(avoid, sample, positive, node, clip):
    yellow = node("CLIPTextEncode", clip=clip, text="a yellow ring")
    both = avoid(model=avoid(), negative=yellow)
    assert torch.equal(sample(model=both, seed=3), sample(model=avoid(negative=yellow), seed=3))
    assert torch.equal(sample(model=avoid(model=avoid(), scale=1.0), seed=3), sample(seed=3))


# --- batches ----------------------------------------------------------------------------------------


def rows_of(conditionings):
    """Prompts of different lengths as one CONDITIONING, one a row, padded and masked."""
    length = max(text.shape[1] for ((text, _),) in conditionings)
    pad = torch.nn.functional.pad
    texts = [pad(text, (0, 0, 0, length - text.shape[1]), value=7.0) for ((text, _),) in conditionings]
    masks = [pad(torch.ones(1, text.shape[1]), (0, length - text.shape[1])) for ((text, _),) in conditionings]
    return [[torch.cat(texts), {"attention_mask": torch.cat(masks)}]]


def test_a_batch_is_its_images_alone(avoid, sample, node, close, positive, other):
    """Another prompt and another negative prompt for each image, of different lengths, with masks."""
    empty = node("SanaSprintEmptyLatent", size="custom", width=128, height=96, batch_size=2)
    model = avoid(negative=rows_of([other, positive]))
    batch = sample(model=model, positive=rows_of([positive, other]), latent_image=empty, seed=5)
    first = sample(model=avoid(negative=other), positive=positive, seed=5)
    second = sample(model=avoid(negative=positive), positive=other, seed=6)
    close(batch, torch.cat([first, second]), LIMIT)


def test_one_negative_prompt_serves_every_image(avoid, sample, node, close):
    empty = node("SanaSprintEmptyLatent", size="custom", width=128, height=96, batch_size=3)
    model = avoid()
    close(
        sample(model=model, latent_image=empty, seed=5),
        torch.cat([sample(model=model, seed=seed) for seed in (5, 6, 7)]),
        LIMIT,
    )


def test_several_prompts_are_one_negative(avoid, sample, node, close, positive, other):
    """Conditioning (Combine) reads as Conditioning (Concat), the tokens of both."""
    combined = node("ConditioningCombine", conditioning_1=other, conditioning_2=positive)
    concat = node("ConditioningConcat", conditioning_to=other, conditioning_from=positive)
    close(sample(model=avoid(negative=combined), seed=3), sample(model=avoid(negative=concat), seed=3), LIMIT)
    assert not torch.equal(sample(model=avoid(negative=combined), seed=3), sample(model=avoid(), seed=3))


def test_regions_avoid_it_too(avoid, node, positive, other, custom, close):
    """Prompts in halves of the image: ComfyUI runs them as one batch, or one by one where only one has a mask."""
    text = other[0][0].flip(1) * 0.7
    masked = [[torch.nn.functional.pad(text, (0, 0, 0, 1)), {"attention_mask": torch.ones(1, text.shape[1] + 1)}]]
    masked[0][1]["attention_mask"][:, -1] = 0

    def halves(*prompts):
        sides = [
            node("ConditioningSetAreaPercentage", conditioning=c, width=0.5, height=1.0, x=x, y=0.0, strength=1.0)
            for c, x in zip(prompts, (0.0, 0.5), strict=True)
        ]
        return node("ConditioningCombine", conditioning_1=sides[0], conditioning_2=sides[1])

    avoiding = avoid(negative=rows_of([positive, other]))  # another negative prompt for each of two images
    two = node("SanaSprintEmptyLatent", size="custom", width=128, height=96, batch_size=2)
    together = custom(model=avoiding, positive=halves(other, [[text, {}]]), latent_image=two)
    assert not torch.equal(together, custom(positive=halves(other, [[text, {}]]), latent_image=two))
    close(custom(model=avoiding, positive=halves(other, masked), latent_image=two), together, LIMIT)


# --- with other nodes -------------------------------------------------------------------------------


def test_loras_change_the_negative_prompt_too(avoid, sample, node, model, write_lora):
    """Of a layer that makes the keys of both prompts: before or after this node, it is the same."""
    write_lora("avoided.safetensors", "lora_unet_", {"transformer_blocks.0.attn2.to_k": (64, 64)})

    def lora(model):
        return node("LoraLoaderModelOnly", model=model, lora_name="avoided.safetensors", strength_model=0.3)

    after, before = sample(model=lora(avoid()), seed=3), sample(model=avoid(model=lora(model)), seed=3)
    assert torch.equal(after, before) and not torch.equal(after, sample(model=avoid(), seed=3))


def test_a_controlnet_reads_the_prompt_alone(host, avoid, node, vae, positive, pixels, sample, pipeline):
    """The core's image of the same: residuals from the prompt, guidance in the trunk."""
    from sprint_core.models.controlnet import AUTHORS
    from sprint_core.pipeline import Control
    from sprint_core.weights import checkpoint

    weights = standin.control(AUTHORS)
    checkpoint.save(host.base / "models" / "controlnet" / "avoided.safetensors", [weights], {})
    net = node("SanaSprintControlNetLoader", control_net="avoided.safetensors")
    steered, _ = node(
        "SanaSprintControlNetApply", positive=positive, control_net=net, image=pixels, vae=vae, strength=0.7
    )
    latent = sample(model=avoid(), positive=steered, seed=7)
    control = Control(checkpoint.build(weights), pixels, 0.7)
    negative = "a large blue square to the left of it"
    expected = pipeline.generate(["a red circle"], seeds=[7], size=(128, 96), negative=negative, controls=[control])
    image = node("VAEDecode", vae=vae, samples={"samples": latent})
    assert (image - expected).abs().max() <= LIMIT
    assert not torch.equal(latent, sample(positive=steered, seed=7))


def test_a_compiled_network_avoids_it(avoid, sample, node, close):
    model = avoid()
    compiled = node("TorchCompileModel", model=model, backend="eager")
    close(sample(model=compiled, seed=3), sample(model=model, seed=3), LIMIT)


def test_blocks_may_still_be_skipped(avoid, sample, node):
    skip = {"double_layers": "0", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0}
    model = node("SkipLayerGuidanceDiT", model=avoid(), **skip)
    assert sample(model=model, seed=3).isfinite().all()


def test_comfyuis_own_node_names_ours(avoid, ksample, model, other, node, every_nag, caplog):
    model.model.told.clear()
    stock = node("NAGuidance", model=model, nag_scale=5.0)
    assert torch.equal(ksample(model=stock, negative=other), ksample(negative=other))
    assert (
        "NAGuidance: of no effect, since SANA has nothing that this patch changes; take SANA-Sprint Negative (NAG)"
        in (caplog.text)
    )


@pytest.fixture(scope="module")
def every_nag(comfyui_path, node):
    import asyncio

    import nodes

    file = comfyui_path / "comfy_extras" / "nodes_nag.py"
    if not file.is_file():
        pytest.skip("this ComfyUI has no NAGuidance yet")
    assert asyncio.run(nodes.load_custom_node(str(file), module_parent="comfy_extras"))


def test_a_cfg_above_1_names_it(avoid, ksample, model, other, caplog):
    model.model.told.clear()
    ksample(cfg=4.0, negative=other)
    assert "and avoid things with SANA-Sprint Negative (NAG)" in caplog.text


# --- refused ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(node, host):
    folder = standin.make(host.base / "models" / "diffusers" / "avoiding-teacher", standin.TEACHER)
    return node("SanaSprintModelLoader", model=folder.name)


def test_a_teacher_has_cfg(node, teacher, other):
    with pytest.raises(ValueError, match=r"acts by cfg; connect it to KSampler's negative and set cfg above 1"):
        node(NODE, model=teacher, negative=other)


@pytest.mark.parametrize(
    "negative, message",
    [
        ([], "the negative holds no tokens of a prompt; connect CLIP Text Encode"),
        ([[None, {"pooled_output": torch.ones(1, 8)}]], "the negative holds no tokens of a prompt"),
        ([[torch.zeros(1, 0, 64), {}]], "the negative holds no tokens of a prompt"),
        ([[torch.zeros(1, 3, 768), {}]], "is 768 wide, the model reads 64; encode the prompt with the CLIP of"),
        ([[torch.zeros(1, 3, 64), {}], [torch.zeros(1, 3, 768), {}]], "are of several text encoders"),
        ([[torch.full((1, 3, 64), float("nan")), {}]], "the negative holds NaN or infinity"),
        (None, "negative: nothing came in"),
    ],
)
def test_what_is_no_negative_prompt(node, model, negative, message, unchanged):
    with unchanged(), pytest.raises(ValueError, match=message):
        node(NODE, model=model, negative=negative)


def test_a_model_of_another_family(node, other, host):
    import comfy.model_patcher

    cpu = torch.device("cpu")
    foreign = comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), load_device=cpu, offload_device=cpu)
    with pytest.raises(ValueError, match="this MODEL is not a SANA"):
        node(NODE, model=foreign, negative=other)


def test_where_it_cannot_act_is_said(node, avoid, sample, other, caplog):
    """An area and a range of steps, which a CONDITIONING may carry: it acts everywhere."""
    placed = node("ConditioningSetArea", conditioning=other, width=64, height=64, x=0, y=0, strength=1.0)
    placed = node("ConditioningSetTimestepRange", conditioning=placed, start=0.0, end=0.1)
    model = avoid(negative=placed)
    assert "the negative's area, end_percent, start_percent is not read" in caplog.text
    assert torch.equal(sample(model=model, seed=3), sample(model=avoid(), seed=3))


def test_bad_values_are_refused_before_a_run(host):
    check = host.pack("nodes.negative").Negative.validate_inputs
    assert check(3.0, 0.5, 2.5, 0.0, 1.0) is True and check(3.0, 0.5, None, 0.0, 1.0) is True
    assert "start must not exceed end" in check(3.0, 0.5, 2.5, 0.8, 0.2)
