"""SIGMAS, samplings and latents of other model families: refused before anything is painted, or right."""

import pytest
import standin
import torch
from api_prompts import custom_size

OURS = "TrigFlow Schedule"


@pytest.fixture(scope="module", params=["sprint", "teacher"])
def either(host, node, request, pipeline_folder):
    folder = pipeline_folder
    if request.param == "teacher":
        folder = standin.make(host.base / "models" / "diffusers" / "sigmas-teacher", standin.TEACHER)
    return node("SanaSprintModelLoader", model=folder.name)


@pytest.fixture
def euler(node, custom, either, positive):
    """Sample with these SIGMAS and Euler steps."""

    def run(sigmas, model=either, **inputs):
        sigmas = torch.tensor(sigmas) if isinstance(sigmas, list) else sigmas
        sampler = node("KSamplerSelect", sampler_name="euler")
        return custom(sigmas=sigmas, model=model, sampler=sampler, **inputs)

    return run


# --- sigmas -----------------------------------------------------------------------------------------

SCHEDULERS = [
    ("KarrasScheduler", {"steps": 4}),
    ("ExponentialScheduler", {"steps": 4}),
    ("PolyexponentialScheduler", {"steps": 4}),
    ("LaplaceScheduler", {"steps": 4}),
    ("VPScheduler", {"steps": 4}),
    ("AlignYourStepsScheduler", {"model_type": "SDXL", "steps": 4}),
    ("GITSScheduler", {"steps": 4}),
]


@pytest.mark.parametrize("id, inputs", SCHEDULERS, ids=[id for id, _ in SCHEDULERS])
def test_sigmas_of_other_models_are_refused(node, euler, unchanged, id, inputs):
    with unchanged(), pytest.raises(ValueError, match=rf"SIGMAS \(1?\d*\.?\d+, .*another model's.*1 and 0.*{OURS}"):
        euler(node(id, **inputs))


@pytest.mark.parametrize(
    "sigmas, message",
    [
        ([0.8, -0.1], "another model's"),
        ([1.0, float("nan"), 0.0], "NaN or infinity"),
        ([float("inf"), 0.0], "NaN or infinity"),
        ([1.0, 0.4, 0.7, 0.0], rf"rise.*{OURS}"),
        ([0.5], "one value.*Split Sigmas"),
        ([1.0], "pure noise.*Split Sigmas"),
        ([1.0, 1.0], "pure noise"),
        ([0.1, 0.5, 1.0], "pure noise.*Flip Sigmas|rise"),
        ([0.0, 0.5, 0.2], rf"rise.*{OURS}"),
    ],
)
def test_sigmas_that_lead_nowhere_are_refused(euler, unchanged, sigmas, message):
    with unchanged(), pytest.raises(ValueError, match=message):
        euler(sigmas)


def test_an_empty_schedule_and_a_zero_leave_the_latent_as_it_is(euler, encoded):
    for sigmas in ([], [0.0]):
        result = euler(sigmas, latent_image=encoded)
        assert torch.allclose(result, encoded["samples"], atol=1e-5)


def test_a_sigma_of_a_rounded_angle_is_1(euler):
    """Published files write pi/2 as 1.5708: s is then 1.0000037, above where a ControlNet's range begins."""
    assert torch.equal(euler([1.0000037, 0.5, 0.0]), euler([1.0, 0.5, 0.0]))


def test_a_teacher_goes_back_to_noise_and_returns(node, either, euler, encoded, close):
    """Flip Sigmas: Euler steps of the same flow, and the way back ends where it began. A Sprint has no flow."""
    down = node("BasicScheduler", model=either, scheduler="simple", steps=120)[60:]
    up = node("FlipSigmas", sigmas=down)
    if either.model.sprint:
        with pytest.raises(ValueError, match=f"rise.*{OURS}"):
            euler(up, latent_image=encoded)
        return
    start = {"model": either, "cfg": 1.0, "sampler": node("KSamplerSelect", sampler_name="euler"), "add_noise": False}
    prompt = encoded["samples"].new_zeros(1, 3, 64)
    start |= {"noise_seed": 0, "positive": [[prompt, {}]], "negative": [[prompt, {}]]}
    noisy = node("SamplerCustom", **start, sigmas=up, latent_image=encoded)[0]
    back = node("SamplerCustom", **start, sigmas=down, latent_image=noisy)[0]["samples"]
    assert (noisy["samples"] - encoded["samples"]).abs().max() > 0.1
    close(back, encoded["samples"], 0.05)


# --- SDTurboScheduler: a thousand steps, counted from 0 -------------------------------------------------


@pytest.mark.parametrize("denoise, shares", [(1.0, [1.0, 0.9, 0.8]), (0.5, [0.5, 0.4, 0.3]), (0.2, [0.2, 0.1])])
def test_sd_turbo_honours_denoise(node, either, denoise, shares):
    sigmas = node("SDTurboScheduler", model=either, steps=3, denoise=denoise)
    expected = torch.tensor([*shares, 0.0], dtype=torch.float64)
    if either.model.sprint:
        angles = expected * torch.pi / 2
        expected = angles.sin() / (angles.sin() + angles.cos())
    else:
        expected = 3 * expected / (1 + 2 * expected)
    assert torch.allclose(sigmas.double(), expected, atol=1e-6)


def test_sd_turbo_after_another_shift(node, either, euler):
    """ModelSamplingSD3 counts in thousands itself; ModelSamplingAuraFlow does not, so that its sigmas are refused."""
    for id, fits in (("ModelSamplingSD3", True), ("ModelSamplingAuraFlow", False)):
        shifted = node(id, model=either)
        sigmas = node("SDTurboScheduler", model=shifted, steps=2, denoise=0.5)
        if fits:
            assert 0.0 < sigmas[1] < sigmas[0] < 0.8
        else:
            with pytest.raises(ValueError, match=OURS):
                euler(sigmas, model=shifted)


# --- samplings ----------------------------------------------------------------------------------------

SAMPLINGS = [
    *[("ModelSamplingDiscrete", {"sampling": kind}) for kind in ("eps", "v_prediction", "lcm", "x0")],
    *[("ModelSamplingContinuousEDM", {"sampling": kind}) for kind in ("v_prediction", "edm", "eps")],
    ("ModelSamplingContinuousV", {}),
    ("ModelSamplingStableCascade", {}),
]


@pytest.mark.parametrize("id, inputs", SAMPLINGS)
def test_samplings_of_other_models_are_refused(node, either, euler, ksample, unchanged, id, inputs):
    other = node(id, model=either, **inputs)
    for run in (lambda: euler([1.0, 0.5, 0.0], model=other), lambda: ksample(model=other, sampler_name="euler")):
        with unchanged(), pytest.raises(ValueError, match=f"samples with .*not SANA's flow.*{OURS}"):
            run()


def test_training_hands_over_the_numbers_of_its_images(node, either, encoded, positive):
    """TrainLoraNode's SIGMAS are 0, 1, ... and no times."""
    two = {"samples": encoded["samples"].repeat(2, 1, 1, 1)}
    declared = node.ids["TrainLoraNode"].INPUT_TYPES()["required"]
    inputs = {"steps": 2, "batch_size": 2, "training_dtype": "fp32", "lora_dtype": "fp32"}
    defaults = {name: spec[1]["default"] for name, spec in declared.items() if "default" in spec[1]}
    lists = {name: [value] for name, value in (defaults | inputs).items()}
    lora = node("TrainLoraNode", model=[either], latents=[two], positive=[positive, positive], **lists)[0]
    assert any("lora_up" in name and tensor.any() for name, tensor in lora.items())


# --- latents, masks and batches -----------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 16, 128])
def test_latents_of_other_models_are_refused(euler, unchanged, channels):
    with unchanged(), pytest.raises(ValueError, match=f"{channels} channels.*32.*Empty SANA Latent"):
        euler([1.0, 0.0], latent_image={"samples": torch.ones(1, channels, 4, 4)})


@pytest.mark.parametrize("fill", [torch.zeros, torch.ones])
def test_latents_of_videos_are_refused(euler, sample, unchanged, fill):
    video = {"samples": fill(1, 16, 2, 32, 32), "downscale_ratio_spacial": 8}
    for run in (lambda: euler([1.0, 0.0], latent_image=video), lambda: sample(latent_image=video)):
        with unchanged(), pytest.raises(ValueError, match=r"video.*Empty SANA Latent"):
            run()


@pytest.mark.parametrize("shape", [(7, 15), (1, 301, 7), (1, 1, 33, 65), (3, 96, 128)])
def test_masks_of_any_size_keep_what_they_leave_out(node, euler, encoded, shape):
    """The left half stays; of several masks the first is the image's."""
    mask = torch.ones(shape)
    mask[..., : shape[-1] // 2 - 1] = 0.0
    result = euler([1.0, 0.5, 0.0], latent_image=encoded | {"noise_mask": mask})
    assert torch.allclose(result[..., :1], encoded["samples"][..., :1], atol=1e-4)
    assert not torch.allclose(result[..., 3:], encoded["samples"][..., 3:], atol=0.05)


def test_noise_of_another_size_is_refused(node, either, positive, empty, unchanged):
    class OneImage:
        seed = 0

        def generate_noise(self, latent):
            return torch.ones(1, 32, 3, 4)

    two = node("SanaSprintEmptyLatent", **custom_size(128, 96), batch_size=2)
    guider = node("BasicGuider", model=either, conditioning=positive)
    run = {"guider": guider, "sampler": node("KSamplerSelect", sampler_name="euler"), "latent_image": two}
    with unchanged(), pytest.raises(ValueError, match=r"noise is \[1, 32, 3, 4\].*\[2, 32, 3, 4\]"):
        node("SamplerCustomAdvanced", noise=OneImage(), sigmas=torch.tensor([1.0, 0.0]), **run)


def test_prompts_and_latents_of_different_batches(euler, positive, other, node, close):
    """Two prompts of one length on three images: the first, the second, the first."""
    first, second = positive[0][0], torch.flip(positive[0][0], dims=(1,))
    three = node("SanaSprintEmptyLatent", **custom_size(128, 96), batch_size=3)
    both = euler([1.0, 0.0], latent_image=three, positive=[[torch.cat([first, second]), {}]])
    alone = [euler([1.0, 0.0], latent_image=three, positive=[[text, {}]])[i] for i, text in enumerate((first, second))]
    close(both[:2], torch.stack(alone), 1e-4)
    close(both[2:], euler([1.0, 0.0], latent_image=three, positive=[[first, {}]])[2:], 1e-4)
