"""ControlNet in a real ComfyUI: the core's images, stock apply nodes, ranges, chains, masks; and refused input."""

import re

import machines
import pytest
import standin
import torch
from api_prompts import custom_size

from sprint_core import trigflow
from sprint_core.images import edges
from sprint_core.models import controlnet, hed
from sprint_core.models.controlnet import AUTHORS, DIFFUSERS, WIRINGS
from sprint_core.pipeline import Control
from sprint_core.weights import checkpoint

APPLY = "SanaSprintControlNetApply"
STOCK = "ControlNetApplyAdvanced"


@pytest.fixture(scope="module")
def stored_control(host):
    """stored_control(name, weights): a file in models/controlnet. Returns the name."""

    def write(name, weights):
        checkpoint.save(host.base / "models" / "controlnet" / name, [weights], {})
        return name

    return write


@pytest.fixture(scope="module")
def nets(node, stored_control):
    """A CONTROL_NET of each wiring."""
    return {
        wiring: node(
            "SanaSprintControlNetLoader", control_net=stored_control(f"{wiring}.safetensors", standin.control(wiring))
        )
        for wiring in WIRINGS
    }


@pytest.fixture
def net(nets):
    return nets[AUTHORS]


@pytest.fixture(scope="module")
def core_net():
    def build(wiring):
        net = controlnet.SanaControlNet(standin.control(wiring).config)
        net.load_state_dict(standin.control(wiring).tensors)
        return net.requires_grad_(False).eval()

    return build


@pytest.fixture
def applied(node, positive, net, vae, pixels):
    """applied(strength=0.5, ...): the positive conditioning with control."""

    def run(id=APPLY, **inputs):
        inputs = {"positive": positive, "control_net": net, "image": pixels, "vae": vae} | inputs
        if id == STOCK:
            inputs.setdefault("negative", inputs["positive"])
        return node(id, **inputs)[0]

    return run


@pytest.fixture
def calls(net, monkeypatch):
    """The flow times at which the network ran."""
    seen = []
    forward = type(net.control_model).forward

    def counted(self, *args, **kwargs):
        seen.append(kwargs["flow_times"].latest[0].item())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(net.control_model), "forward", counted)
    return seen


# --- exact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_equals_the_core(node, applied, nets, core_net, pipeline, sample, vae, pixels, wiring, steps):
    control = Control(core_net(wiring), pixels, 0.7)
    settings = {"seeds": [7], "size": (128, 96), "steps": steps, "guidance": 4.0}
    expected = pipeline.generate(["a red circle"], controls=[control], **settings)
    conditioning = applied(control_net=nets[wiring], strength=0.7)
    latent = sample(positive=conditioning, seed=7, steps=steps, guidance=4.0)
    image = node("VAEDecode", vae=vae, samples={"samples": latent})
    assert (image - expected).abs().max() <= machines.limit(1e-6)
    assert (image - pipeline.generate(["a red circle"], **settings)).abs().max() > 0.05


@pytest.mark.parametrize("id", [APPLY, STOCK])
def test_strength_0_and_an_untrained_one_change_nothing(node, applied, stored_control, sample, id):
    plain = sample()
    assert torch.equal(sample(positive=applied(id, strength=0.0)), plain)
    weights = standin.control(AUTHORS)
    own = {k: torch.zeros_like(v) if k.startswith(controlnet.OWN) else v for k, v in weights.tensors.items()}
    weights.tensors = own
    untrained = node("SanaSprintControlNetLoader", control_net=stored_control("untrained.safetensors", weights))
    assert torch.equal(sample(positive=applied(id, control_net=untrained)), plain)


@pytest.mark.parametrize("first, second", [(APPLY, APPLY), (APPLY, STOCK), (STOCK, STOCK)])
def test_two_at_half_strength_equal_one(applied, sample, close, first, second):
    full = sample(positive=applied(strength=0.6))
    halves = applied(second, positive=applied(first, strength=0.3), strength=0.3)
    close(sample(positive=halves), full, 1e-5)


def test_stock_node_does_the_same(applied, sample):
    assert torch.equal(sample(positive=applied(STOCK, strength=0.8)), sample(positive=applied(strength=0.8)))


@pytest.mark.parametrize("order", [(AUTHORS, DIFFUSERS), (DIFFUSERS, AUTHORS)])
def test_chains_of_both_wirings(node, applied, nets, core_net, pipeline, sample, pixels, vae, order, close):
    conditioning = applied(control_net=nets[order[0]], strength=0.5)
    conditioning = applied(positive=conditioning, control_net=nets[order[1]], strength=0.4)
    controls = [Control(core_net(w), pixels, strength) for w, strength in zip(order, (0.5, 0.4), strict=True)]
    expected = pipeline.generate(["a red circle"], seeds=[1], size=(128, 96), steps=2, controls=controls)
    latent = sample(positive=conditioning, seed=1, steps=2)
    close(node("VAEDecode", vae=vae, samples={"samples": latent}), expected, 1e-5)


def test_batches(node, applied, empty, model, positive, pixels, close):
    """One hint for all, or one for each; image i is what seed + i gives alone."""
    two = {"samples": empty["samples"].repeat(2, 1, 1, 1)}
    other = pixels.flip(2)
    run = lambda hint, latent, seed: node(  # noqa: E731
        "SanaSprintSampler", model=model, positive=applied(image=hint), latent_image=latent, seed=seed
    )["samples"]
    shared, each = run(pixels, two, 5), run(torch.cat([pixels, other]), two, 5)
    close(shared[1:], run(pixels, empty, 6), 1e-5)
    close(each[:1], run(pixels, empty, 5), 1e-5)
    close(each[1:], run(other, empty, 6), 1e-5)


def test_other_sizes_and_hints_that_are_resized(node, applied, model):
    latent = node("SanaSprintEmptyLatent", **custom_size(160, 64))
    large = torch.rand(1, 200, 300, 3, generator=torch.Generator().manual_seed(1))
    out = node("SanaSprintSampler", model=model, positive=applied(image=large), latent_image=latent)["samples"]
    assert out.shape[-2:] == (2, 5) and out.isfinite().all()


# --- with the rest of ComfyUI -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, start, end, acting",
    [(1, 0, 1, 1), (1, 0, 0, 1), (1, 0.1, 1, 0), (2, 0, 0.1, 1), (2, 0.1, 1, 1), (4, 0, 0.5, 3), (4, 0.2, 1, 2)],
)
def test_range(applied, sample, calls, steps, start, end, acting):
    """By the angle: 2 steps lie at 0 and 0.17, 4 at 0, 0.17, 0.3 and 0.62."""
    sample(positive=applied(start_percent=start, end_percent=end), steps=steps)
    assert len(calls) == acting


@pytest.mark.parametrize("id", ["ModelSamplingSD3", "ModelSamplingAuraFlow"])
def test_the_time_is_the_flow_time_whatever_multiplies_it(node, model, applied, sample, calls, id):
    patched = node(id, model=model, shift=1.0)
    got = sample(model=patched, positive=applied(), steps=2)
    assert calls == pytest.approx(trigflow.sigmas("paper", 2)[:-1], abs=1e-6)
    assert got.isfinite().all()


def test_bf16_keeps_the_time_exact(node, applied, sample, calls):
    half = node("SanaSprintControlNetLoader", control_net="authors.safetensors", dtype="bf16")
    sample(positive=applied(control_net=half), steps=2)
    assert calls[1] == pytest.approx(trigflow.sigmas("paper", 2)[1], abs=1e-6)


def test_union_type_is_ignored(node, applied, net, sample):
    typed = node("SetUnionControlNetType", control_net=net, type="hed/pidi/scribble/ted")
    assert torch.equal(sample(positive=applied(control_net=typed)), sample(positive=applied()))


def test_noise_mask(node, applied, sample, encoded):
    mask = torch.zeros(1, 96, 128)
    mask[:, :, 64:] = 1
    latent = node("SetLatentNoiseMask", samples=encoded, mask=mask)
    out = sample(positive=applied(), latent_image=latent)
    assert torch.allclose(out[..., :2], encoded["samples"][..., :2], atol=1e-4)
    assert not torch.allclose(out[..., 2:], sample(latent_image=latent)[..., 2:], atol=1e-2)


def test_conditioning_mask(node, applied, positive, sample):
    mask = torch.zeros(1, 96, 128)
    mask[:, :, 64:] = 1
    masked = node("ConditioningSetMask", conditioning=applied(), mask=mask, strength=1.0, set_cond_area="default")
    rest = node("ConditioningSetMask", conditioning=positive, mask=1 - mask, strength=1.0, set_cond_area="default")
    both = node("ConditioningCombine", conditioning_1=masked, conditioning_2=rest)
    assert not torch.allclose(sample(positive=both), sample(), atol=1e-2)


def test_ksampler_and_other_samplers(applied, ksample):
    for name in ("lcm", "euler"):
        plain = ksample(sampler_name=name)
        controlled = ksample(positive=applied(), sampler_name=name)
        assert controlled.isfinite().all() and not torch.allclose(controlled, plain, atol=1e-2)


def test_a_teacher_with_a_negative_prompt(host, node, applied, other, empty, stored_control, close):
    """A multi-step model reads no guidance; both of its prompts are controlled."""
    folder = standin.make(host.base / "models" / "diffusers" / "teacher", standin.TEACHER)
    teacher = node("SanaSprintModelLoader", model=folder.name)
    weights = standin.control(AUTHORS, guidance_embed=False, time_scale=1000.0)
    net = node("SanaSprintControlNetLoader", control_net=stored_control("teacher.safetensors", weights))
    inputs = {"control_net": net, "negative": other}
    run = lambda id: node(  # noqa: E731
        "KSampler", model=teacher, steps=3, cfg=4.5, sampler_name="euler", scheduler="simple", seed=1,
        latent_image=empty, positive=applied(id, **inputs), negative=applied(id, positive=other, **inputs),
    )["samples"]  # fmt: skip
    close(run(APPLY), run(STOCK), 1e-5)


def test_offloading(applied, sample, net):
    import comfy.model_management as mm

    before = sample(positive=applied())
    mm.unload_all_models()
    assert torch.equal(sample(positive=applied()), before)
    assert [p for p in net.get_models() if p.model is net.control_model]


def test_cancel(applied, sample, net, monkeypatch):
    """Cancelled while the ControlNet runs; the next run is as ever."""
    import comfy.model_management as mm

    conditioning = applied()
    before = sample(positive=conditioning)
    forward = type(net.control_model).forward

    def cancelled(self, *args, **kwargs):
        mm.interrupt_current_processing(True)
        mm.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(type(net.control_model), "forward", cancelled)
    with pytest.raises(mm.InterruptProcessingException):
        sample(positive=conditioning)
    monkeypatch.setattr(type(net.control_model), "forward", forward)
    assert torch.equal(sample(positive=conditioning), before)


def test_the_negative_output(node, positive, other, net, vae, pixels):
    inputs = {"positive": positive, "control_net": net, "image": pixels, "vae": vae}
    alone, both = node(APPLY, **inputs), node(APPLY, **inputs, negative=other)
    assert torch.equal(alone[1][0][0], positive[0][0]) and torch.equal(both[1][0][0], other[0][0])
    assert both[0][0][1]["control"] is both[1][0][1]["control"]
    assert "control" not in positive[0][1]


# --- the hint is kept -------------------------------------------------------------------------------


@pytest.fixture
def encodings(net, vae, monkeypatch):
    """Sizes of the images that the VAE encoded."""
    seen = []
    encode = type(vae).encode
    monkeypatch.setattr(
        type(vae), "encode", lambda self, pixels: seen.append(tuple(pixels.shape)) or encode(self, pixels)
    )
    net.hints.kept.clear()
    return seen


def test_the_hint_is_encoded_once(node, applied, sample, encodings, model, pixels):
    conditioning = applied()
    for seed in range(3):
        sample(positive=conditioning, steps=4, seed=seed)
    sample(positive=applied(strength=0.3, image=pixels.clone()))  # a new apply node, the same image
    assert encodings == [(1, 96, 128, 3)]
    sample(positive=applied(image=1 - pixels))
    latent = node("SanaSprintEmptyLatent", **custom_size(96, 96))
    sample(positive=conditioning, latent_image=latent)
    sample(positive=conditioning)
    assert encodings == [(1, 96, 128, 3), (1, 96, 128, 3), (1, 96, 96, 3)]


def test_few_hints_are_kept(applied, sample, net, pixels, encodings):
    for i in range(8):
        sample(positive=applied(image=pixels * i / 8), steps=1)
    assert len(net.hints.kept) == 4


# --- refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", [APPLY, STOCK])
@pytest.mark.parametrize(
    "change, words",
    [
        ({"image": torch.rand(1, 64, 64, 4)}, "4 channels.*without alpha"),
        ({"image": torch.rand(1, 0, 64, 3)}, r"the control image is empty, of shape \[1, 3, 0, 64\]"),
        ({"image": torch.rand(0, 64, 64, 3)}, "the control image is empty"),
        ({"start_percent": 0.8, "end_percent": 0.2}, r"control from 0\.8 to 0\.2: start must not exceed end"),
        ({"image": torch.full((1, 64, 64, 3), float("nan"))}, "the control image holds NaN"),
        ({"image": torch.rand(64, 64, 3)}, "the control image has 3 dimensions, not 4"),
        ({"strength": 11.0}, "strength is 11; it must lie in 0 to 10"),
        ({"strength": -1.0}, "strength is -1; it must lie in 0 to 10"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"vae": None}, "connect the VAE to the apply node"),
    ],
)
def test_refused_when_applied(applied, unchanged, id, change, words):
    with unchanged(), pytest.raises(ValueError, match=words):
        applied(id, **change)


def test_a_hint_is_resized_within_its_range(node, applied, sample, encodings, monkeypatch, vae):
    """Enlarging overshoots, shrinking drops lines: neither reaches the VAE."""
    seen = []
    encode = type(vae).encode
    monkeypatch.setattr(type(vae), "encode", lambda self, pixels: seen.append(pixels) or encode(self, pixels))
    small = torch.zeros(1, 24, 32, 3)
    small[:, 8:16, 8:16] = 1
    tall = torch.zeros(1, 1000, 100, 3)
    tall[:, ::100] = 1
    for image in (small, tall):
        sample(positive=applied(image=image), steps=1)
    assert len(seen) == 2 and all(pixels.min() >= 0 and pixels.max() <= 1 for pixels in seen)


def test_a_hint_that_fits_is_not_resized(applied, sample, monkeypatch):
    """Nearest pixels are its own; others are computed."""
    import comfy.utils

    ways = []
    resize = comfy.utils.common_upscale
    monkeypatch.setattr(comfy.utils, "common_upscale", lambda *args: ways.append(args[3]) or resize(*args))
    for height, width in ((96, 128), (96, 64), (48, 128), (192, 256)):
        sample(positive=applied(image=torch.rand(1, height, width, 3)), steps=1)
    assert ways == ["nearest-exact", "bicubic", "bicubic", "area"]


def test_a_vae_is_not_kept_for_its_hints(node, host, applied, sample, net, pipeline_folder):
    import gc
    import weakref

    import comfy.model_management as mm

    other = node("SanaSprintVAELoader", vae=pipeline_folder.name)
    sample(positive=applied(vae=other), steps=1)
    seen = weakref.ref(other.first_stage_model)
    assert any(entry[0]() is seen() for entry in net.hints.kept)
    del other
    mm.unload_all_models()
    mm.cleanup_models_gc()
    gc.collect()
    assert seen() is None


def test_a_foreign_control_in_the_chain(applied, sample, positive, net, unchanged):
    import comfy.controlnet

    class Foreign(comfy.controlnet.ControlBase):
        def get_models(self):
            return []

    for control in (Foreign(), applied()[0][1]["control"].copy().set_previous_controlnet(Foreign())):
        with unchanged(), pytest.raises(ValueError, match="a ControlNet of another family is applied to this prompt"):
            sample(positive=[[positive[0][0], {**positive[0][1], "control": control}]])


def test_the_old_apply_node_has_no_vae(node, positive, net, pixels, unchanged):
    with unchanged(), pytest.raises(ValueError, match="connect the VAE to the apply node"):
        node("ControlNetApply", conditioning=positive, control_net=net, image=pixels, strength=1.0)


def test_another_vae(applied, unchanged):
    class Foreign:
        latent_channels = 4

        def spacial_compression_encode(self):
            return 8

    with unchanged(), pytest.raises(ValueError, match="this VAE is not SANA's"):
        applied(vae=Foreign())


def test_batches_that_do_not_fit(applied, sample, pixels, empty, unchanged):
    two = {"samples": empty["samples"].repeat(2, 1, 1, 1)}
    with unchanged(), pytest.raises(ValueError, match="3 control images for 2 images"):
        sample(positive=applied(image=pixels.expand(3, -1, -1, -1)), latent_image=two)


def test_an_image_too_thin_for_the_proportions(applied, sample, unchanged):
    """ComfyUI crops it to nothing: a RuntimeError of torch's interpolation."""
    with unchanged(), pytest.raises(ValueError, match="1 x 4000, of which nothing is left in the prop"):
        sample(positive=applied(image=torch.rand(1, 4000, 1, 3)))


def test_another_width(node, applied, sample, stored_control, unchanged):
    weights = standin.control(AUTHORS, width=96, cross_heads=3)
    wide = node("SanaSprintControlNetLoader", control_net=stored_control("wide.safetensors", weights))
    with unchanged(), pytest.raises(ValueError, match="SANA of width 96, the MODEL has 64; load the ControlNet of"):
        sample(positive=applied(control_net=wide))


def test_nan_in_a_controlnet_is_named(node, stored_control, applied, sample, unchanged):
    weights = standin.control(AUTHORS)
    name = next(name for name in weights.tensors if name.endswith("attn1.to_q.weight"))
    weights.tensors = weights.tensors | {name: weights.tensors[name] * torch.nan}
    broken = node("SanaSprintControlNetLoader", control_net=stored_control("nan.safetensors", weights))
    says = rf"nan\.safetensors: its tensor {re.escape(name)} holds NaN or infinity; download"
    with unchanged(), pytest.raises(ValueError, match=says):
        sample(positive=applied(control_net=broken))


def test_another_family(net):
    with pytest.raises(ValueError, match="steers SANA models only"):
        net.copy().pre_run(torch.nn.Identity(), lambda percent: percent)


def test_a_control_net_of_another_family(applied, unchanged):
    with unchanged(), pytest.raises(ValueError, match="this CONTROL_NET is not of SANA; connect Load SANA ControlNet"):
        applied(control_net=object())


def test_files_that_are_none(node, host, stored, unchanged):
    folder = host.base / "models" / "controlnet"
    (host.base / "models" / "checkpoints" / stored("transformer", "t.safetensors")).rename(folder / "t.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "t.safetensors").read_bytes()[:-100])
    for name, words in (
        ("t.safetensors", r"t\.safetensors: this is a SANA transformer, not a SANA ControlNet"),
        ("cut.safetensors", r"cut\.safetensors.*truncated"),
        ("gone.safetensors", r"gone\.safetensors is in none of the model folders controlnet"),
    ):
        with unchanged(), pytest.raises(ValueError, match=words):
            node("SanaSprintControlNetLoader", control_net=name)


# --- edges ------------------------------------------------------------------------------------------


@pytest.fixture
def hed_file(host):
    folder = host.base / "models" / "annotators"
    folder.mkdir()
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in hed.HED().state_dict().items()}
    tensors = standin.random_tensors(shapes)
    path = folder / "ControlNetHED.pth"
    torch.save(tensors, path)
    yield path
    path.unlink()
    folder.rmdir()


@pytest.mark.parametrize("scribble", [False, True])
def test_soft_edges_are_the_cores(node, pixels, scribble):
    two = torch.cat([pixels, 1 - pixels])
    assert torch.equal(node("SanaSprintSoftEdges", image=two, scribble=scribble), edges.detect(two, scribble=scribble))


def test_hed_where_its_weights_are(node, pixels, hed_file, unchanged):
    hed = edges.load_hed(hed_file)
    got = node("SanaSprintSoftEdges", image=pixels)
    assert torch.allclose(got, edges.detect(pixels, hed), atol=1e-6)
    assert torch.equal(node("SanaSprintSoftEdges", image=pixels, method="soft"), edges.detect(pixels))
    tensors = torch.load(hed_file)
    del tensors["block3.projection.weight"]
    torch.save(tensors, hed_file)
    with unchanged(), pytest.raises(ValueError, match=r"ControlNetHED\.pth: not the HED network.*block3\.projection"):
        node("SanaSprintSoftEdges", image=pixels)


def test_hed_computes_where_its_image_is(host, pixels, hed_file):
    """With weights that stay where they are, as under --novram; here they stay in another precision."""
    network = host.pack("nodes.adapters.annotators")._patcher(hed_file, 0).model
    exact = edges.load_hed(hed_file).double()(pixels.double().movedim(-1, 1))
    torch.testing.assert_close(network(pixels.double().movedim(-1, 1)), exact)


def test_hed_without_weights(node, pixels, unchanged):
    with unchanged(), pytest.raises(ValueError, match=r"no ControlNetHED\.pth in models/annotators; put it there"):
        node("SanaSprintSoftEdges", image=pixels, method="HED")


def test_edges_of_what_is_no_image(node, unchanged):
    with unchanged(), pytest.raises(ValueError, match="Soft Edges holds NaN or infinity"):
        node("SanaSprintSoftEdges", image=torch.full((1, 32, 32, 3), float("nan")))
    for image in (torch.rand(1, 32, 32, 4), torch.rand(1, 0, 32, 3), torch.rand(32, 32, 3)):
        with unchanged(), pytest.raises(ValueError, match="needs the 3 channels of an image without alpha"):
            node("SanaSprintSoftEdges", image=image)
