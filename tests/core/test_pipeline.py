"""Prompt to image against diffusers' SanaSprintPipeline on the same files and noise, and what a pipeline promises."""

import dataclasses
import math
from pathlib import Path

import pytest
import standin
import tokenizers
import torch
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from oracles import randn, relative_error
from transformers import Gemma2Model, PreTrainedTokenizerFast

from sprint_core import pipeline, trigflow
from sprint_core.pipeline import Pipeline
from sprint_core.text.encoder import TextEncoder
from sprint_core.text.formats import TextPreset, text_preset
from sprint_core.text.loading import find_tokenizer
from sprint_core.text.tokenizers import tokenizer_state
from sprint_core.weights import checkpoint, layouts

PROMPT = "A red Circle to the left of a blue square"
PROMPTS = [PROMPT, "a cat", "", "words " * 80]  # the last one is cut
SEEDS = [3, 11, 2**40, 0]
SIZE = (96, 64)  # width, height


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return standin.make(tmp_path_factory.mktemp("models") / "sprint")


@pytest.fixture(scope="module")
def ours(folder) -> Pipeline:
    """With diffusers' prompt format, so that both read the same text."""
    loaded = Pipeline.load(folder)
    encoder = loaded.text_encoder
    loaded.text_encoder = TextEncoder(encoder.gemma, encoder.prompts.tokenizer, text_preset("diffusers"))
    return loaded


@pytest.fixture(scope="module")
def parts(folder) -> dict:
    """diffusers' and transformers' models from the same folder."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    special = {"bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return {
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        "text_encoder": Gemma2Model.from_pretrained(folder / "text_encoder", attn_implementation="eager"),
        "vae": AutoencoderDC.from_pretrained(folder / "vae"),
        "transformer": SanaTransformer2DModel.from_pretrained(folder / "transformer"),
    }


def scheduler_with(angles: list[float]) -> SCMScheduler:
    """diffusers' scheduler with the angles set by hand, since `set_timesteps` refuses most of them."""
    scheduler = SCMScheduler()

    def set_timesteps(steps, device=None, **_):
        assert steps == len(angles) - 1
        scheduler.num_inference_steps = steps
        scheduler.timesteps = torch.tensor(angles)
        scheduler._step_index = scheduler._begin_index = None

    scheduler.set_timesteps = set_timesteps
    return scheduler


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class ImageToImage(SanaSprintImg2ImgPipeline):
    """Draws the first noise from the seeds themselves, as we do; steps draw from seed + 1."""

    seeds: list[int]

    def prepare_latents(self, *args, **kwargs):
        *args, _, latents = args
        return super().prepare_latents(*args, generators(self.seeds), latents, **kwargs)


def run_diffusers(parts: dict, angles: list[float], prompts, seeds, image=None, output="pt") -> torch.Tensor:
    options = {"intermediate_timesteps": None, "use_resolution_binning": False, "output_type": output}
    options |= {"width": SIZE[0], "height": SIZE[1], "generator": generators([seed + 1 for seed in seeds])}
    options |= {"num_inference_steps": len(angles) - 1, "guidance_scale": 4.5}
    kind = SanaSprintPipeline if image is None else ImageToImage
    pipe = kind(**parts, scheduler=scheduler_with(angles))
    pipe.set_progress_bar_config(disable=True)
    if image is None:
        noise = [torch.randn((1, 32, SIZE[1] // 32, SIZE[0] // 32), generator=g) for g in generators(seeds)]
        options["latents"] = torch.cat(noise)
    else:
        pipe.seeds = seeds
        options |= {"image": image.movedim(-1, 1), "strength": 1.0}  # the angles have it already
    result = pipe(list(prompts), **options).images
    return result if output == "latent" else result.movedim(1, -1)


def latents_and_images(ours: Pipeline, prompts, seeds, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The last prediction and the images."""
    seen = []
    images = ours.generate(prompts, seeds=seeds, size=SIZE, on_step=lambda i, x_s, x0: seen.append(x0), **options)
    return seen[-1], images


# --- against diffusers ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_text_to_image_equals_diffusers(ours, parts, steps):
    latents, images = latents_and_images(ours, PROMPTS[:2], SEEDS[:2], steps=steps)
    angles = trigflow.schedule("paper", steps)
    assert relative_error(latents, run_diffusers(parts, angles, PROMPTS[:2], SEEDS[:2], output="latent")) <= 1e-4
    assert relative_error(images, run_diffusers(parts, angles, PROMPTS[:2], SEEDS[:2])) <= 1e-4
    assert images.shape == (2, SIZE[1], SIZE[0], 3) and images.std() > 0.1


@pytest.mark.parametrize("strength", [0.4, 0.75])
def test_image_to_image_equals_diffusers(ours, parts, strength):
    image = randn(2, SIZE[1], SIZE[0], 3).sigmoid()
    latents, images = latents_and_images(ours, PROMPTS[:2], SEEDS[:2], image=image, strength=strength)
    angles = trigflow.schedule("paper", 2, strength)
    theirs = run_diffusers(parts, angles, PROMPTS[:2], SEEDS[:2], image, "latent")
    assert relative_error(latents, theirs) <= 1e-4
    assert relative_error(images, run_diffusers(parts, angles, PROMPTS[:2], SEEDS[:2], image)) <= 1e-4


# --- properties -----------------------------------------------------------------------------------


def test_a_batch_of_mixed_lengths_equals_single_images(ours):
    latents, images = latents_and_images(ours, PROMPTS, SEEDS, steps=2)
    _, mask = ours.encode_text(PROMPTS)
    assert len(set(mask.sum(1).tolist())) == 4
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        latent, image = latents_and_images(ours, [prompt], [seed], steps=2)
        assert relative_error(latents[i : i + 1], latent) <= 1e-5
        assert relative_error(images[i : i + 1], image) <= 1e-5


def test_same_seed_same_bytes(ours, folder):
    first = ours.generate([PROMPT], seeds=[5], size=SIZE)
    again = Pipeline.load(folder)
    again.text_encoder = ours.text_encoder
    assert first.numpy().tobytes() == again.generate([PROMPT], seeds=[5], size=SIZE).numpy().tobytes()
    assert relative_error(ours.generate([PROMPT], seeds=[6], size=SIZE), first) > 0.01
    assert relative_error(ours.generate(["a cat"], seeds=[5], size=SIZE), first) > 1e-3
    assert relative_error(ours.generate([PROMPT], seeds=[5], size=SIZE, guidance=1.0), first) > 1e-3


def test_little_strength_keeps_the_image(ours):
    """With a tiny angle the result is the auto-encoder's round trip; one image serves a whole batch."""
    image = randn(1, SIZE[1], SIZE[0], 3).sigmoid()
    options = {"seeds": [1, 2], "image": image, "schedule": (1e-4,)}
    out = ours.generate([PROMPT, "a cat"], **options)
    assert relative_error(out, ours.decode(ours.encode_image(image)).expand(2, -1, -1, -1)) < 1e-3
    shared = ours.generate([PROMPT, "a cat"], **{**options, "image": image.expand(2, -1, -1, -1)}, strength=0.5)
    assert relative_error(shared, ours.generate([PROMPT, "a cat"], **options, strength=0.5)) < 1e-5


def test_steps_are_reported_in_order(ours):
    seen = []
    ours.generate([PROMPT], seeds=[1], size=SIZE, schedule="app", steps=3, on_step=lambda i, *_: seen.append(i))
    assert seen == [0, 1, 2]


def test_bf16(folder, ours, tmp_path):
    """A whole pipeline in bf16 is finite and near fp32; fp16 files run in fp32 or bf16, since fp16 overflows."""
    low = Pipeline.load(folder, dtype=torch.bfloat16)
    low.text_encoder.prompts = ours.text_encoder.prompts
    images = low.generate([PROMPT], seeds=[5], size=SIZE, steps=1)
    assert images.dtype == torch.float32
    assert relative_error(images, ours.generate([PROMPT], seeds=[5], size=SIZE, steps=1)) < 0.1
    vae = checkpoint.load(folder, layouts.AUTOENCODER)
    vae.tensors = {name: tensor.half() for name, tensor in vae.tensors.items()}
    checkpoint.save(tmp_path / "half.safetensors", [vae], {})
    half = Pipeline.load(folder, autoencoder=tmp_path / "half.safetensors")
    assert next(half.autoencoder.parameters()).dtype == torch.float32
    assert pipeline._running_dtype(torch.float16, "cuda") == torch.bfloat16
    assert pipeline._running_dtype(torch.float32, "cuda") == torch.float32


def test_bad_arguments_are_refused(ours):
    good = {"seeds": [1], "size": SIZE}
    for change, message in (
        ({"seeds": [1, 2]}, "1 prompts but 2 seeds"),
        ({"guidance": 0.0}, "guidance is 0"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"guidance": math.nan}, "guidance is nan"),
        ({"schedule": "paper", "steps": 5}, "1 to 4 steps"),
        ({"schedule": "1.0, 2.0"}, "2 lies outside"),
        ({"strength": 0.0}, "strength"),
        ({"size": (100, 64)}, "multiples of 32"),
        ({"image": torch.zeros(1, 32, 64, 3)}, "it must be"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.generate([PROMPT], **good | change)


def test_nan_is_an_error_not_a_black_image(folder):
    broken = Pipeline.load(folder)
    broken.transformer.proj_out.bias[0] = math.nan
    with pytest.raises(
        ValueError, match=r"sampler returned NaN: proj_out\.bias of the transformer holds NaN or infinity; download"
    ):
        broken.generate([PROMPT], seeds=[1], size=SIZE)
    broken = Pipeline.load(folder)
    broken.autoencoder.decoder.conv_out.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"decoded NaN: decoder\.conv_out\.bias of the auto-encoder holds NaN"):
        broken.generate([PROMPT], seeds=[1], size=SIZE)


# --- loading --------------------------------------------------------------------------------------


def test_parts_from_several_places(folder, tmp_path, ours):
    """One native file with everything, and each part from its own file, give the folder's image."""
    kinds = ("transformer", "autoencoder", "text_encoder")
    weights = {kind: checkpoint.load(folder, layouts.PARTS[kind]) for kind in kinds}
    encoder = weights["text_encoder"]
    encoder.extras |= tokenizer_state(find_tokenizer(encoder))
    encoder.settings["text"] = {"instruction": None}
    checkpoint.save(tmp_path / "all.safetensors", weights.values(), {})
    for kind in ("transformer", "autoencoder", "text_encoder"):
        checkpoint.save(tmp_path / f"{kind}.safetensors", [weights[kind]], {})
    separate = {kind: tmp_path / f"{kind}.safetensors" for kind in ("autoencoder", "text_encoder")}
    images = [
        Pipeline.load(tmp_path / "all.safetensors").generate([PROMPT], seeds=[1], size=SIZE),
        Pipeline.load(tmp_path / "transformer.safetensors", **separate).generate([PROMPT], seeds=[1], size=SIZE),
    ]
    plain = Pipeline.load(folder)
    plain.text_encoder = TextEncoder(plain.text_encoder.gemma, plain.text_encoder.prompts.tokenizer, TextPreset(None))
    want = plain.generate([PROMPT], seeds=[1], size=SIZE)
    assert all(relative_error(image, want) < 1e-5 for image in images)


def test_the_stand_in_is_the_same_everywhere(folder, tmp_path):
    """Every file of it, byte for byte; one that is there stays as it is."""
    again = standin.make(tmp_path / "sprint")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((folder / file).read_bytes() == (again / file).read_bytes() for file in files)
    (again / "model_index.json").write_text("{}")
    (again / "vae" / "config.json").unlink()
    standin.make(again)
    assert not (again / "vae" / "config.json").exists()


def test_multi_step_models_are_refused(tmp_path, ours):
    teacher = standin.make(tmp_path / "teacher", standin.TEACHER)
    with pytest.raises(checkpoint.CheckpointError, match=r"teacher: a multi-step model; sample it in ComfyUI"):
        Pipeline.load(teacher)
    with pytest.raises(ValueError, match=r"a multi-step model, which generate_multistep samples"):
        Pipeline.load(teacher, multistep=True).generate(["a cat"], seeds=[0])
    with pytest.raises(ValueError, match=r"a SANA-Sprint, which generate samples"):
        ours.generate_multistep(ours.encode_text(["a cat"]), seeds=[0])


def test_a_multi_step_models_images_equal_diffusers(tmp_path):
    """Guided Euler steps by SanaPipeline and its flow-matching scheduler, from the same noise and embeddings."""
    config = dataclasses.replace(standin.TEACHER, time_scale=1000.0)
    folder = standin.make(tmp_path / "teacher", config)
    teacher = Pipeline.load(folder, multistep=True)
    prompts, negatives = (teacher.encode_text(texts) for texts in (PROMPTS[:2], ["a dog", "two, dogs"]))
    longest = max(len(caption.embeddings[0]) for caption in (prompts, negatives))
    alike = [  # which diffusers wants, though masked
        [torch.nn.functional.pad(x, (0,) * (2 * x.ndim - 4) + (0, longest - x.shape[1])) for x in caption]
        for caption in (prompts, negatives)
    ]
    pipe = SanaPipeline(
        None,
        None,
        AutoencoderDC.from_pretrained(folder / "vae"),
        SanaTransformer2DModel.from_pretrained(folder / "transformer"),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    noise = [torch.randn((1, 32, SIZE[1] // 32, SIZE[0] // 32), generator=g) for g in generators([7, 8])]
    theirs = pipe(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=alike[0][0],
        prompt_attention_mask=alike[0][1].long(),
        negative_prompt_embeds=alike[1][0],
        negative_prompt_attention_mask=alike[1][1].long(),
        sigmas=[1.0, 0.8, 0.6, 0.4, 0.2],
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=torch.cat(noise),
        width=SIZE[0],
        height=SIZE[1],
        use_resolution_binning=False,
        output_type="pt",
    ).images.movedim(1, -1)
    made = teacher.generate_multistep(prompts, seeds=[7, 8], size=SIZE, steps=5, cfg=3.0, negative=negatives)
    assert (made - theirs).abs().max() < 1e-3 and theirs.std() > 0.05
    empty = teacher.encode_text(["", ""])
    options = {"seeds": [7, 8], "size": SIZE, "steps": 2}
    usual = teacher.generate_multistep(prompts, **options)
    assert torch.equal(usual, teacher.generate_multistep(prompts, **options, negative=empty))
