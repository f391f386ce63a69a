"""Stock nodes on our objects: each does to a SANA what it does to ComfyUI's own models."""

import logging

import pytest
import torch
from api_prompts import custom_size

LIMIT = 1e-5


def one_step(node):
    return node("SanaSprintSchedule", steps=1)


@pytest.fixture
def euler(node):
    return node("KSamplerSelect", sampler_name="euler")


@pytest.fixture
def half(pixels):
    """Mask [1, 96, 128]: repaint the right half."""
    mask = torch.zeros(1, 96, 128)
    mask[:, :, 64:] = 1.0
    return mask


# --- samplers -------------------------------------------------------------------------------------


def test_ksampler_advanced_in_two_halves_is_one_run(node, model, positive, empty, ksample, close):
    def run(latent, **inputs):
        prompts = {"model": model, "positive": positive, "negative": positive, "latent_image": latent}
        inputs |= {"noise_seed": 1, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
        return node("KSamplerAdvanced", **prompts, **inputs)

    first = run(empty, start_at_step=0, end_at_step=2, add_noise="enable", return_with_leftover_noise="enable")
    second = run(first, start_at_step=2, end_at_step=4, add_noise="disable", return_with_leftover_noise="disable")
    close(second["samples"], ksample(sampler_name="euler"), LIMIT)


def test_sampler_custom_is_sampler_custom_advanced(node, model, positive, empty, custom):
    output, denoised = node(
        "SamplerCustom",
        model=model,
        noise_seed=1,
        cfg=1.0,
        positive=positive,
        negative=positive,
        sampler=node("SanaSprintTrigFlowSampler"),
        sigmas=node("SanaSprintSchedule", steps=4, schedule="app"),
        latent_image=empty,
    )
    assert torch.equal(output["samples"], custom())
    assert torch.equal(denoised["samples"], custom())


def test_cfg_guider_is_basic_guider(node, model, positive, other, custom):
    """At cfg 1, and at any other: this model's guidance is built in."""
    for cfg in (1.0, 5.0):
        guider = node("CFGGuider", model=model, positive=positive, negative=other, cfg=cfg)
        assert torch.equal(custom(guider=guider), custom())
        assert guider.cfg == cfg


def test_split_sigmas_in_two_runs_is_one_run(node, model, positive, custom, euler, close):
    sigmas = node("SanaSprintSchedule", steps=4)
    high, low = node("SplitSigmas", sigmas=sigmas, step=2)
    assert len(high) == len(low) == 3
    latent = {"samples": custom(sigmas=high, sampler=euler)}
    resumed = node(
        "SamplerCustomAdvanced",
        noise=node("DisableNoise"),
        guider=node("BasicGuider", model=model, conditioning=positive),
        sampler=euler,
        sigmas=low,
        latent_image=latent,
    )[0]["samples"]
    close(resumed, custom(sigmas=sigmas, sampler=euler), LIMIT)


def test_our_sampler_stops_at_a_schedule_that_does_not_end_in_zero(node, custom):
    """Half a schedule leaves noise of its last sigma in the latent, for the next sampler."""
    high, _ = node("SplitSigmas", sigmas=node("SanaSprintSchedule", steps=2), step=1)
    noisy = custom(sigmas=high) * 0.41407 * (1 - high[-1])
    clean = custom(sigmas=one_step(node)) * 0.41407
    noise = (noisy - (1 - high[-1]) * clean) / high[-1]
    assert 0.8 < noise.std() < 1.2


@pytest.mark.parametrize(
    "id, inputs",
    [
        ("ModelSamplingSD3", {}),
        ("ModelSamplingAuraFlow", {}),
        ("ModelSamplingFlux", {}),
        ("ModelNoiseScale", {"noise_scale": 1.0}),
    ],
)
def test_the_network_sees_s_whatever_the_model_sampling(node, model, custom, close, id, inputs):
    if id not in node.ids:
        assert id == "ModelNoiseScale"  # newer than the oldest ComfyUI this pack supports
        return
    sigmas = node("SanaSprintSchedule", steps=4)
    patched = node(id, model=model, **inputs)
    assert patched.get_model_object("model_sampling") is not model.get_model_object("model_sampling")
    close(custom(model=patched, sigmas=sigmas), custom(sigmas=sigmas), LIMIT)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "euler_ancestral", "ddim", "uni_pc"])
def test_other_samplers_run(ksample, name):
    assert ksample(sampler_name=name).isfinite().all()


def test_ksampler_on_its_defaults_gives_the_cfg_1_image_and_one_warning(
    node, model, positive, other, empty, caplog, ksample
):
    model.model.told.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            latent = node("KSampler", model=model, positive=positive, negative=other, latent_image=empty, seed=1)
    scheduler = node.ids["KSampler"].INPUT_TYPES()["required"]["scheduler"][0][0]
    expected = ksample(steps=20, sampler_name="euler", scheduler=scheduler)
    assert torch.equal(latent["samples"], expected)
    assert expected.isfinite().all()
    assert [r.getMessage() for r in caplog.records if "cfg" in r.getMessage()] == [
        "SANA-Sprint has its guidance built in: cfg 8 is treated as 1 and the negative prompt is unused. "
        "Set cfg to 1, steer with FluxGuidance or the guidance input, and avoid things with SANA-Sprint Negative (NAG)."
    ]


# --- latents --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(512, 768), (256, 256)])
def test_an_empty_latent_of_other_models_is_converted(node, ksample, sample, size):
    stock = node("EmptyLatentImage", width=size[0], height=size[1], batch_size=2)
    assert stock["samples"].shape[1] == 4
    by_ksampler, ours = ksample(latent_image=stock, steps=1), sample(latent_image=stock, seed=1, steps=1)
    assert by_ksampler.shape == ours.shape == (2, 32, size[1] // 32, size[0] // 32)
    assert torch.allclose(by_ksampler[:1], ours[:1], atol=1e-4)


def test_samplers_drop_the_tag_of_an_empty_latent(node, model, positive, empty):
    assert "downscale_ratio_spacial" in empty
    latent = node("SanaSprintSampler", model=model, positive=positive, latent_image=empty)
    assert set(latent) == {"samples"}


def test_the_input_latent_is_left_as_it_was(empty, encoded, sample):
    before = encoded["samples"].clone()
    sample(latent_image=empty)
    sample(latent_image=encoded, denoise=0.5)
    assert not empty["samples"].any() and torch.equal(encoded["samples"], before)


def test_latent_upscale_by_feeds_a_second_pass(node, sample):
    larger = node("LatentUpscaleBy", samples={"samples": sample()}, upscale_method="bilinear", scale_by=2.0)
    assert sample(latent_image=larger, denoise=0.5).shape == (1, 32, 6, 8)


# --- masks ----------------------------------------------------------------------------------------


def kept_left(latent, start):
    return torch.allclose(latent[..., :2], start[..., :2], atol=1e-4)


@pytest.mark.parametrize("by", ["ours", "KSampler"])
def test_noise_mask_keeps_what_is_not_masked(node, sample, ksample, encoded, half, by):
    masked = node("SetLatentNoiseMask", samples=encoded, mask=half)
    result = sample(latent_image=masked) if by == "ours" else ksample(latent_image=masked)
    assert kept_left(result, encoded["samples"])
    assert not torch.allclose(result[..., 2:], encoded["samples"][..., 2:], atol=0.1)


def test_vae_encode_for_inpaint(node, vae, sample, pixels, half):
    latent = node("VAEEncodeForInpaint", pixels=pixels, vae=vae, mask=half, grow_mask_by=0)
    assert latent["samples"].shape == (1, 32, 3, 4)
    result = sample(latent_image=latent)
    assert kept_left(result, latent["samples"])


def test_differential_diffusion_follows_a_grey_mask(node, model, sample, encoded, half):
    differential = node("DifferentialDiffusion", model=model)
    masked = node("SetLatentNoiseMask", samples=encoded, mask=half * 0.5)
    result = sample(model=differential, latent_image=masked, steps=4)
    change = (result - encoded["samples"]).abs()
    assert change[..., :2].max() < 1e-4  # black: kept
    assert change[..., 2:].max() > 0.1  # grey: repainted from some step on
    assert (result - sample(latent_image=masked, steps=4)).abs().max() > 1e-3


# --- conditioning ---------------------------------------------------------------------------------


def image_of(custom, node, conditioning):
    return custom(positive=conditioning, sigmas=one_step(node))


def test_conditioning_concat_joins_tokens(node, positive, other, custom):
    joined = node("ConditioningConcat", conditioning_to=positive, conditioning_from=other)
    assert joined[0][0].shape[1] == positive[0][0].shape[1] + other[0][0].shape[1]
    assert not torch.equal(image_of(custom, node, joined), image_of(custom, node, positive))


def test_conditioning_combine_averages_predictions(node, positive, other, custom, close):
    combined = node("ConditioningCombine", conditioning_1=positive, conditioning_2=other)
    expected = (image_of(custom, node, positive) + image_of(custom, node, other)) / 2
    close(image_of(custom, node, combined), expected, LIMIT)


def test_conditioning_average_blends(node, positive, other, custom, close):
    for strength, expected in ((1.0, positive), (0.5, None)):
        blend = node(
            "ConditioningAverage",
            conditioning_to=positive,
            conditioning_from=other,
            conditioning_to_strength=strength,
        )
        image = image_of(custom, node, blend)
        same = torch.allclose(image, image_of(custom, node, positive), atol=1e-4)
        assert same == (expected is positive) and image.isfinite().all()


def test_conditioning_zero_out(node, positive, custom):
    zero = node("ConditioningZeroOut", conditioning=positive)
    image = image_of(custom, node, zero)
    assert image.isfinite().all() and not torch.equal(image, image_of(custom, node, positive))


def test_set_area_percentage_confines_a_prompt(node, positive, other, custom):
    def area(conditioning, x):
        return node("ConditioningSetAreaPercentage", conditioning=conditioning, width=0.5, height=1.0, x=x, y=0.0)

    both = [area(positive, 0.0) + area(prompt, 0.5) for prompt in (positive, other)]
    same, changed = (image_of(custom, node, conditioning) for conditioning in both)
    assert torch.allclose(same[..., :2], changed[..., :2], atol=1e-5)
    assert (same - changed)[..., 2:].abs().max() > 1e-3


def test_set_timestep_range_confines_a_prompt(node, positive, other, custom):
    def span(conditioning, start, end):
        return node("ConditioningSetTimestepRange", conditioning=conditioning, start=start, end=end)

    halves = span(positive, 0.0, 0.5) + span(other, 0.5, 1.0)
    assert torch.equal(image_of(custom, node, halves), image_of(custom, node, positive))
    four = node("SanaSprintSchedule", steps=4, schedule="app")
    assert not torch.equal(custom(positive=halves, sigmas=four), custom(positive=positive, sigmas=four))


def test_conditioning_with_a_mask_equals_the_trimmed(node, positive, other, custom, close):
    """ComfyUI's CLIPLoader of type pixeldit pads to 300 tokens and adds a mask [1, 300]."""
    tokens = positive[0][0]
    count = tokens.shape[1]
    padded = torch.cat([tokens, torch.randn(1, 300 - count, tokens.shape[2])], dim=1)
    mask = (torch.arange(300) < count)[None].long()
    stock = [[padded, {"pooled_output": None, "attention_mask": mask}]]
    close(image_of(custom, node, stock), image_of(custom, node, positive), LIMIT)
    joined = node("ConditioningConcat", conditioning_to=stock, conditioning_from=other)
    expected = node("ConditioningConcat", conditioning_to=positive, conditioning_from=other)
    close(image_of(custom, node, joined), image_of(custom, node, expected), LIMIT)


def test_a_mask_serves_every_image_of_a_batch(node, positive, sample, close):
    tokens = positive[0][0]
    padded = torch.cat([tokens, torch.randn(1, 5, tokens.shape[2])], dim=1)
    mask = (torch.arange(padded.shape[1]) < tokens.shape[1])[None].long()
    latent = node("SanaSprintEmptyLatent", **custom_size(128, 96), batch_size=2)
    masked = sample(positive=[[padded, {"attention_mask": mask}]], latent_image=latent)
    close(masked, sample(latent_image=latent), LIMIT)


# --- the VAE --------------------------------------------------------------------------------------


@pytest.fixture
def calls(vae):
    """Shapes of the inputs of the VAE's networks."""
    seen, net = [], vae.first_stage_model
    hooks = [
        part.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape)) for part in (net.encoder, net.decoder)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def similarity(a, b):
    """Correlation: random weights attend to all of an image, so tiles see something else."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_vae_decode_tiled_is_close_and_works_in_tiles(node, vae, calls):
    latent = {"samples": torch.randn(2, 32, 8, 6, generator=torch.Generator().manual_seed(0))}
    untiled = node("VAEDecode", vae=vae, samples=latent)
    calls.clear()
    tiled = node("VAEDecodeTiled", vae=vae, samples=latent, tile_size=128, overlap=64)
    assert len(calls) > 2 and all(shape[0] == 1 and max(shape[2:]) <= 4 for shape in calls)
    assert tiled.shape == untiled.shape == (2, 256, 192, 3)
    assert similarity(tiled, untiled) > 0.6
    single = node("VAEDecodeTiled", vae=vae, samples=latent, tile_size=256, overlap=64)
    assert torch.allclose(single, untiled, atol=1e-5)  # one tile is no tiling


def test_tiled_nodes_show_their_progress(node, vae, monkeypatch):
    import comfy.utils

    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append(value / total))
    node("VAEDecodeTiled", vae=vae, samples={"samples": torch.zeros(2, 32, 8, 6)}, tile_size=128, overlap=64)
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == 1.0  # ComfyUI passes on a few a second


def test_vae_encode_tiled_is_close_and_works_in_tiles(node, vae, pixels, calls):
    image = torch.nn.functional.interpolate(pixels.movedim(-1, 1), (256, 192)).movedim(1, -1)
    untiled = node("VAEEncode", vae=vae, pixels=image)["samples"]
    calls.clear()
    tiled = node("VAEEncodeTiled", vae=vae, pixels=image, tile_size=128, overlap=64)["samples"]
    assert len(calls) > 2 and all(max(shape[2:]) <= 128 for shape in calls)
    assert tiled.shape == untiled.shape == (1, 32, 8, 6)
    assert similarity(tiled, untiled) > 0.9


def test_vae_encode_crops_to_whole_cells(node, vae, pixels):
    assert node("VAEEncode", vae=vae, pixels=pixels[:, :70, :100])["samples"].shape == (1, 32, 2, 3)


def test_vae_decodes_in_tiles_when_memory_runs_out(node, vae, monkeypatch, calls):
    import comfy.model_management as mm

    latent = {"samples": torch.randn(1, 32, 4, 20, generator=torch.Generator().manual_seed(0))}
    real, failed = vae.first_stage_model.decoder.forward, []

    def forward(x, *args, **kwargs):
        if x.shape[-1] > 16:
            failed.append(x.shape)
            raise mm.OOM_EXCEPTION("no memory left")
        return real(x, *args, **kwargs)

    monkeypatch.setattr(vae.first_stage_model.decoder, "forward", forward)
    assert node("VAEDecode", vae=vae, samples=latent).shape == (1, 128, 640, 3)
    assert failed and max(shape[-1] for shape in calls[1:]) <= 16


# --- previews, Cancel, compilation ------------------------------------------------------------------


@pytest.fixture
def colours(host, monkeypatch):
    """The pack's Colours, before any VAE was used."""
    kind = host.pack("nodes.adapters.preview").Colours
    monkeypatch.setattr(kind, "latest", None)
    return kind


@pytest.mark.parametrize("by", ["ours", "KSampler"])
def test_previews_show_the_clean_image(node, model, vae, sample, ksample, monkeypatch, colours, by):
    """Callbacks get x0 in model space: that of the last step is the result. After one decode previews have colours."""
    import comfy.utils
    import latent_preview

    seen, images = [], []
    real = latent_preview.prepare_callback

    def prepare(patcher, steps, *args):
        callback = real(patcher, steps, *args)

        def record(step, x0, x, total):
            seen.append((step, x0.clone(), total))
            callback(step, x0, x, total)

        return record

    monkeypatch.setattr(latent_preview, "prepare_callback", prepare)
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    assert latent_preview.get_previewer(model.load_device, model.model.latent_format) is None
    node("VAEDecode", samples={"samples": torch.randn(1, 32, 8, 8)}, vae=vae)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: images.append(preview))
    result = sample(seed=1, steps=4, schedule="app") if by == "ours" else ksample()
    assert [(step, total) for step, _, total in seen] == [(i, 4) for i in range(4)]
    assert torch.allclose(seen[-1][1] / 0.41407, result, atol=1e-5)
    assert [image[1].size for image in images] == [(4, 3)] * 4


@pytest.mark.parametrize("by", ["ours", "KSampler"])
def test_cancel_stops_between_steps_and_the_next_run_works(sample, ksample, unchanged, monkeypatch, by):
    import comfy.model_management as mm
    import comfy.utils

    steps = []

    def progress(value, total, preview, **_):
        steps.append(value)
        mm.interrupt_current_processing()
        mm.throw_exception_if_processing_interrupted()

    run = (lambda: sample(steps=4)) if by == "ours" else ksample
    with unchanged(), monkeypatch.context() as patch:
        patch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", progress)
        with pytest.raises(mm.InterruptProcessingException):
            run()
    assert steps == [1]


def test_cancel_stops_inside_a_step(model, sample, unchanged):
    """ComfyUI's operations look for it, so a long forward pass ends early."""
    import comfy.model_management as mm

    with unchanged():
        mm.interrupt_current_processing()
        with pytest.raises(mm.InterruptProcessingException):
            sample()


def test_torch_compile_gives_the_same_image(node, model, sample, close):
    compiled = node("TorchCompileModel", model=model, backend="aot_eager")
    close(sample(model=compiled, steps=1), sample(steps=1), LIMIT)
    larger = node("SanaSprintEmptyLatent", **custom_size(160, 96))
    close(sample(model=compiled, steps=1, latent_image=larger), sample(steps=1, latent_image=larger), LIMIT)


def test_stock_block_patches_reach_our_blocks(node, model, custom):
    """As skip-layer guidance sets them."""
    seen = []

    def skip(args, extra):
        seen.append((args["img"].shape, args["transformer_options"]["block_index"]))
        return {"img": args["img"], "txt": args["txt"]}

    patched = model.clone()
    patched.set_model_patch_replace(skip, "dit", "double_block", 1)
    image = custom(model=patched, sigmas=one_step(node))
    assert seen == [((1, 12, 64), 1)]
    assert not torch.equal(image, custom(sigmas=one_step(node)))


def test_diffusion_model_wrappers_run(node, model, custom):
    import comfy.patcher_extension

    def double(executor, x, *args, **kwargs):
        return executor(x, *args, **kwargs) * 0.0

    patched = model.clone()
    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", double)
    image = custom(model=patched, sigmas=one_step(node))  # no velocity: x0 is the noise itself
    assert 0.8 < (image * 0.41407).std() < 1.2


def test_dual_cfg_guider_is_basic_guider(node, model, positive, other, custom):
    inputs = {
        "cond1": positive,
        "cond2": other,
        "negative": other,
        "cfg_conds": 8.0,
        "cfg_cond2_negative": 8.0,
        "style": "regular",
    }
    guider = node("DualCFGGuider", model=model, **inputs)
    assert torch.equal(custom(guider=guider), custom(guider=node("BasicGuider", model=model, conditioning=positive)))
    assert (guider.cfg1, guider.cfg2) == (8.0, 8.0)
