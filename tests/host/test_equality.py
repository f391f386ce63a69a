"""The node path is the published model: equal to the core, to stock samplers, and to itself."""

import machines
import pytest
import torch
from api_prompts import custom_size

from sprint_core import trigflow

LIMIT = 1e-5  # relative, where ComfyUI's own choices differ from the core's


@pytest.fixture
def paint(node, loaded, empty):
    """Prompt to image through the nodes."""

    def run(prompts=("a red circle",), image=None, **inputs):
        model, clip, vae = loaded
        latent = empty if image is None else node("VAEEncode", vae=vae, pixels=image)
        positive = node("SanaSprintTextEncode", clip=clip, text=prompts[0])
        latent = node("SanaSprintSampler", model=model, positive=positive, latent_image=latent, **inputs)
        return node("VAEDecode", vae=vae, samples=latent)

    return run


@pytest.fixture(params=["sdpa", "ComfyUI's sub-quadratic", "ComfyUI's split"])
def limit(request, host, monkeypatch):
    """Attention functions that a user's ComfyUI may run, with the error each may have."""
    import comfy.ldm.modules.attention as attention

    if request.param == "sdpa":
        return 0.0
    function = attention.attention_sub_quad if "sub" in request.param else attention.attention_split
    monkeypatch.setattr(host.pack("nodes.adapters.model"), "attention_function", lambda: function)
    return LIMIT


def check(image, expected, limit):
    assert (image - expected).abs().max() <= machines.limit(limit)
    assert image.std() > 0.01


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_text_to_image_equals_the_core(paint, pipeline, steps, limit):
    expected = pipeline.generate(["a red circle"], seeds=[7], size=(128, 96), steps=steps, guidance=4.0)
    check(paint(seed=7, steps=steps, guidance=4.0), expected, limit)


@pytest.mark.parametrize("steps, strength", [(1, 0.6), (2, 0.6), (4, 0.3)])
def test_image_to_image_equals_the_core(paint, pipeline, pixels, steps, strength, limit):
    expected = pipeline.generate(["a red circle"], seeds=[7], steps=steps, image=pixels, strength=strength)
    check(paint(image=pixels, seed=7, steps=steps, denoise=strength), expected, limit)


def test_custom_angles_equal_the_core(paint, pipeline):
    expected = pipeline.generate(["a red circle"], seeds=[7], size=(128, 96), schedule="1.5, 1, 0.4")
    check(paint(seed=7, **{"schedule": "custom", "schedule.angles": "1.5, 1, 0.4"}), expected, 0.0)


def test_ksampler_lcm_equals_our_samplers(sample, ksample, custom, close):
    ours = sample(seed=1, steps=4, schedule="app")
    print("KSampler", close(ksample(), ours, LIMIT))
    assert torch.equal(custom(), ours)


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 10])
def test_stock_scheduler_simple_is_the_app_schedule(node, model, steps):
    stock = node("BasicScheduler", model=model, scheduler="simple", steps=steps)
    assert torch.allclose(stock, torch.tensor(trigflow.sigmas("app", steps)), atol=1e-6)


def test_ksampler_image_to_image_is_ours_at_equal_sigmas(node, model, ksample, sample, custom, encoded, close):
    """KSampler's denoise cuts a longer schedule; given those SIGMAS our sampler does the same."""
    sigmas = node("BasicScheduler", model=model, scheduler="simple", steps=4, denoise=0.6)
    expected = ksample(latent_image=encoded, denoise=0.6)
    close(custom(sigmas=sigmas, latent_image=encoded), expected, LIMIT)
    assert (expected - sample(latent_image=encoded, seed=1, steps=4, schedule="app")).abs().max() > 0.01


def test_the_same_seed_gives_the_same_bytes(paint, sample, ksample, custom):
    assert torch.equal(paint(seed=5), paint(seed=5))
    assert torch.equal(sample(seed=5, steps=4), sample(seed=5, steps=4))
    assert torch.equal(ksample(), ksample())
    assert torch.equal(custom(), custom())
    assert not torch.equal(sample(seed=5), sample(seed=6))


def test_step_noise_differs_from_step_to_step(sample):
    """Seed i + 1 of the step noise is not the next image's start: two steps and a batch must not share noise."""
    batch = torch.cat([sample(seed=i, steps=4, schedule="app") for i in range(3)])
    assert torch.pdist(batch.flatten(1)).min() > 0.1


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_image_i_of_a_batch_is_the_single_image_of_seed_plus_i(node, sample, steps, close):
    latent = node("SanaSprintEmptyLatent", **custom_size(128, 96), batch_size=3)
    batch = sample(latent_image=latent, seed=10, steps=steps)
    for i in range(3):
        close(batch[i : i + 1], sample(seed=10 + i, steps=steps), LIMIT)


def test_a_seed_at_the_end_of_its_range_works_in_a_batch(node, sample):
    latent = node("SanaSprintEmptyLatent", **custom_size(128, 96), batch_size=2)
    batch = sample(latent_image=latent, seed=2**64 - 1, steps=2)
    assert torch.equal(batch[1:], sample(seed=0, steps=2)) or torch.allclose(batch[1:], sample(seed=0), atol=1e-5)


def test_latent_from_batch_keeps_the_seed_of_its_image(node, sample, close):
    latent = node("SanaSprintEmptyLatent", **custom_size(128, 96), batch_size=4)
    second = node("LatentFromBatch", samples=latent, batch_index=2, length=1)
    batch = sample(latent_image=latent, seed=10, steps=4)
    close(sample(latent_image=second, seed=10, steps=4), batch[2:3], LIMIT)


def test_repeated_latents_get_seeds_of_their_own(node, sample, empty, close):
    repeated = node("RepeatLatentBatch", samples=empty, amount=2)
    batch = sample(latent_image=repeated, seed=10, steps=2)
    close(batch[1:], sample(seed=11, steps=2), LIMIT)


def test_a_padded_batch_of_prompts_equals_single_runs(pipeline, node, model, host, clip, close):
    """Four prompts of different length, padded with a mask, through ComfyUI's MODEL."""
    from sprint_core.text.encoder import pad_embeddings

    prompts = ["a", "a red circle", "two birds", "a large blue square to the left of it"]
    rows = [node("CLIPTextEncode", clip=clip, text=prompt)[0][0] for prompt in prompts]
    padded, mask = pad_embeddings([row[0] for row in rows])
    assert not mask.all()
    x, s = torch.randn(4, 32, 3, 4, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.7)
    net = model.model.diffusion_model
    batch = net(x, s, context=padded, guidance=4.5, attention_mask=mask)
    single = torch.cat([net(x[i : i + 1], s[:1], context=rows[i], guidance=4.5) for i in range(4)])
    close(batch, single, LIMIT)


def test_guidance_changes_the_image_and_is_not_rounded(node, sample, custom, positive, close):
    guided = node("FluxGuidance", conditioning=positive, guidance=2.3)
    ours = sample(seed=1, steps=4, schedule="app", guidance=2.3)
    assert torch.equal(custom(positive=guided), ours)
    assert (ours - sample(seed=1, steps=4, schedule="app")).abs().max() > 1e-3


def test_without_guidance_the_default_is_used(node, custom, positive):
    disabled = node("FluxDisableGuidance", conditioning=positive)
    assert torch.equal(custom(positive=disabled), custom(positive=positive))
