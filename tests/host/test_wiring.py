"""What one part hands to another inside ComfyUI, where no picture of the other tests would show that it is lost."""

import sys

import pytest
import torch

LIMIT = 1e-5


@pytest.fixture
def padded(positive):
    """The prompt with five tokens of noise behind it, and the mask that leaves them out."""
    tokens = positive[0][0]
    rows = torch.cat([tokens, torch.randn(1, 5, tokens.shape[2], generator=torch.Generator().manual_seed(0))], dim=1)
    mask = (torch.arange(rows.shape[1]) < tokens.shape[1])[None].long()
    return [[rows, {**positive[0][1], "attention_mask": mask}]]


def test_a_control_net_reads_the_prompts_mask(host, node, vae, pixels, positive, padded, sample, close):
    import standin

    from sprint_core.weights import checkpoint

    checkpoint.save(host.base / "models" / "controlnet" / "wired.safetensors", [standin.control("authors")], {})
    net = node("SanaSprintControlNetLoader", control_net="wired.safetensors")
    steered = [
        node("SanaSprintControlNetApply", positive=prompt, control_net=net, image=pixels, vae=vae)[0]
        for prompt in (padded, positive)
    ]
    close(sample(positive=steered[0]), sample(positive=steered[1]), LIMIT)


def test_step_noise_of_a_custom_run_differs_from_image_to_image(node, model, positive, encoded, close):
    """Image i re-noises as the run with seed + i; none is added at the start, so nothing else tells them apart."""
    two = {"samples": encoded["samples"].repeat(2, 1, 1, 1)}
    sigmas = node("SanaSprintSchedule", steps=2, denoise=0.8)

    def run(latent, seed):
        given = {"positive": positive, "negative": positive, "sampler": node("SanaSprintTrigFlowSampler")}
        given |= {"add_noise": False, "noise_seed": seed, "cfg": 1.0, "sigmas": sigmas, "latent_image": latent}
        return node("SamplerCustom", model=model, **given)[0]["samples"]

    both = run(two, 5)
    close(both[:1], run(encoded, 5), LIMIT)
    close(both[1:], run(encoded, 6), LIMIT)
    assert not torch.allclose(both[:1], both[1:], atol=1e-2)


def test_a_message_outside_a_server_loads_none(host, monkeypatch):
    """ComfyUI's server module takes seconds, and other programs have modules of that name."""
    screen = host.pack("nodes.adapters.screen")
    monkeypatch.delitem(sys.modules, "server", raising=False)
    screen.say("7", "a line")
    assert "server" not in sys.modules


def test_images_in_a_prompt_that_a_sana_does_not_read_are_said(node, positive, encoded, sample, model, caplog):
    """Once in the log, and the image is that of the prompt without them."""
    from comfy_extras.nodes_edit_model import ReferenceLatent

    referring = ReferenceLatent.execute(positive, encoded).result[0]
    plain = sample(positive=positive)
    model.model.told.clear()
    with caplog.at_level("WARNING"):
        assert torch.equal(sample(positive=referring), plain) and torch.equal(sample(positive=referring), plain)
    says = "of this prompt, SANA does not read reference_latents; it paints without"
    assert [record.getMessage() for record in caplog.records] == [says]


VIDEO = {  # as the conditioning nodes of Wan, LTX, Hunyuan, ACE-Step and Stable Audio set them
    "audio_embed": torch.ones(1, 2, 4),
    "camera_conditions": torch.ones(1, 2, 4),
    "clip_vision_output": object(),
    "context_latents": [torch.ones(1, 2)],
    "control_video": torch.ones(1, 3, 2, 8, 8),
    "face_video_pixels": torch.ones(1, 3, 2, 8, 8),
    "frame_rate": 25,
    "keyframe_idxs": torch.ones(1, 3),
    "reference_motion": torch.ones(1, 2),
    "seconds_total": 3.0,
    "time_dim_concat": torch.ones(1, 2),
    "vace_frames": [torch.ones(1, 2)],
}


def test_what_video_nodes_put_on_a_prompt_is_said(positive, sample, ksample, model, caplog):
    """Each name in one line; the image is that of the prompt without them, which is quiet."""
    import node_helpers

    for run in (sample, ksample):
        model.model.told.clear()
        caplog.clear()
        with caplog.at_level("WARNING"):
            plain = run(positive=positive)
            assert not caplog.records
            assert torch.equal(run(positive=node_helpers.conditioning_set_values(positive, VIDEO)), plain)
        says = f"of this prompt, SANA does not read {', '.join(sorted(VIDEO))}; it paints without"
        assert [record.getMessage() for record in caplog.records] == [says]


@pytest.mark.parametrize("noise_mask", [True, False])
def test_inpaint_model_conditioning(node, vae, positive, pixels, ksample, model, caplog, noise_mask):
    """Of its outputs the noise mask is used, and the image on the prompt is not: the warning says which."""
    mask = torch.zeros(1, 96, 128)
    mask[:, 32:64, 32:96] = 1
    inputs = {"positive": positive, "negative": positive, "vae": vae, "pixels": pixels, "mask": mask}
    inpainted, negative, latent = node("InpaintModelConditioning", **inputs, noise_mask=noise_mask)
    model.model.told.clear()
    with caplog.at_level("WARNING"):
        painted = ksample(positive=inpainted, negative=negative, latent_image=latent)
    assert torch.equal(painted, ksample(latent_image=latent))
    kept = torch.allclose(painted[:, :, 0], latent["samples"][:, :, 0], atol=LIMIT)
    effect = "the latent's noise mask is used, and only what it covers is painted"
    if not noise_mask:
        effect = "and the latent has no noise mask, so that all is painted; add Set Latent Noise Mask"
    assert kept == noise_mask
    names = "concat_latent_image, concat_mask"
    says = f"of this prompt, SANA does not read {names}, for inpainting models; {effect}"
    assert [record.getMessage() for record in caplog.records] == [says]
