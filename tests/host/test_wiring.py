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
