"""SANA-Sprint Live Canvas in a real ComfyUI, not live: the images of a graph of stock nodes."""

import json
import os

import pytest
import standin
import torch
from PIL import Image

from sprint_core.images import drawing
from sprint_core.weights import presets

NODE = "SanaSprintLiveCanvas"
SIDE = 256  # the bundled model's own
STROKES = [
    {"layer": "lines", "tool": "brush", "color": "#ffffff", "width": 9, "points": [40, 40, 1, 200, 160, 1]},
    {"layer": "paint", "tool": "brush", "color": "#d02020", "width": 60, "points": [80, 160, 1, 200, 80, 0.5]},
]


def text(strokes=STROKES, **entries) -> str:
    return json.dumps({"version": 1, "size": [SIDE, SIDE], "ground": "#ffffff", "strokes": strokes} | entries)


DRAWING = text()


@pytest.fixture(scope="module")
def loaded(node):
    """(MODEL, CLIP, VAE) of the bundled model."""
    return node("SanaSprintLoader", model=presets.BUNDLED_NAME)


@pytest.fixture(scope="module")
def net(node):
    return node("SanaSprintControlNetLoader", control_net=presets.BUNDLED_CONTROL_NAME)


@pytest.fixture(scope="module")
def canvas(node, loaded, net):
    """canvas(mode="paint", ...): the node's three outputs."""
    model, clip, vae = loaded

    def run(**inputs):
        start = {"model": model, "clip": clip, "vae": vae, "control_net": net, "text": "a red apple", "seed": 7}
        return node(NODE, **(start | {"drawing": DRAWING, "live": False} | inputs))

    return run


@pytest.fixture
def stock(node, loaded, net):
    """The same from separate nodes: stock(lines, paint, steps=2, denoise=0.6)."""
    model, clip, vae = loaded

    def run(lines=None, paint=None, text="a red apple", steps=2, denoise=0.6, strength=1.0):
        positive = node("CLIPTextEncode", clip=clip, text=text)
        if lines is not None:
            apply = {"positive": positive, "control_net": net, "image": lines, "vae": vae, "strength": strength}
            positive = node("SanaSprintControlNetApply", **apply)[0]
        latent = node("SanaSprintEmptyLatent", model=model)
        if paint is not None:
            latent = node("VAEEncode", vae=vae, pixels=paint)
        inputs = {"seed": 7, "steps": steps, "denoise": 1.0 if paint is None else denoise}
        sampled = node("SanaSprintSampler", model=model, positive=positive, latent_image=latent, **inputs)
        return node("VAEDecode", vae=vae, samples=sampled), sampled["samples"]

    return run


def pixels(layer: str) -> torch.Tensor:
    sheet = drawing.parse(DRAWING)
    levels = torch.from_numpy(getattr(drawing, layer)(sheet, SIDE, SIDE).astype("float32") / 255)
    return (levels[..., None].expand(-1, -1, 3) if layer == "lines" else levels)[None]


@pytest.mark.parametrize("mode", ["lines", "paint", "both"])
@pytest.mark.parametrize("steps", [1, 2])
def test_it_paints_what_separate_nodes_paint(canvas, stock, mode, steps):
    picture, drawn, latent = canvas(mode=mode, final_steps=steps, denoise=0.7, strength=0.8)
    sheets = [
        pixels(layer) for layer in ("lines", "sheet") if mode == "both" or (layer == "sheet") == (mode == "paint")
    ]
    lines, paint = (pixels("lines") if mode != "paint" else None), (pixels("sheet") if mode != "lines" else None)
    expected, samples = stock(lines, paint, steps=steps, denoise=0.7, strength=0.8)
    assert torch.equal(picture, expected) and torch.equal(latent["samples"], samples)
    assert torch.equal(drawn, torch.cat(sheets))


def test_live_without_a_server_is_not_live(canvas):
    assert torch.equal(canvas(live=True)[0], canvas(live=False)[0])


def test_a_lora_on_the_model_acts(canvas, node, loaded, write_lora):
    layer = "transformer_blocks.0.attn1.to_q"
    width = loaded[0].model.model_config.unet_config["config"].width
    write_lora("live.safetensors", "lora_unet_", {layer: (width, width)})
    patched = node("LoraLoaderModelOnly", model=loaded[0], lora_name="live.safetensors", strength_model=1.0)
    assert patched.patches and not torch.equal(canvas(model=patched)[0], canvas()[0])


@pytest.mark.parametrize("size, shape", [("1:1, 1024 x 1024", (256, 256)), ("16:9, 1344 x 768", (192, 320))])
def test_sizes_are_the_models(canvas, size, shape):
    assert canvas(size=size)[0].shape[1:3] == shape


def test_a_size_that_is_none_is_refused(canvas):
    with pytest.raises(ValueError, match="size is '960 x 1024', which it does not offer"):
        canvas(size="960 x 1024")


# --- the image below the paint --------------------------------------------------------------------


def test_an_image_lies_below_the_paint(canvas, pixels):
    _, sheet, _ = canvas(mode="paint", drawing=text([]), image=pixels)
    fitted = drawing.fitted(Image.fromarray((pixels[0] * 255).round().byte().numpy()), SIDE, SIDE)
    assert torch.equal(sheet[0] * 255, torch.from_numpy(fitted.copy()).float())
    half = canvas(mode="paint", drawing=text([], underlay={"name": "", "opacity": 0.5}), image=pixels)[1]
    assert torch.allclose(half, (sheet + 1) / 2, atol=0.003)


def test_an_underlay_is_read_from_its_folder(canvas, host):
    (host.base / "input" / "below").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (80, 60), "#204060").save(host.base / "input" / "below" / "a.png")
    under = {"name": "a.png", "subfolder": "below", "type": "input", "opacity": 1.0}
    _, sheet, _ = canvas(mode="paint", drawing=text([], underlay=under))
    assert (sheet * 255).round().unique(dim=2).flatten().tolist()[:3] == [0x20, 0x40, 0x60]


@pytest.mark.parametrize(
    "under, words",
    [
        ({"name": "none.png"}, r"underlay .*none\.png: no such file"),
        ({"name": "../../secret.png"}, "lies outside of ComfyUI's folders"),
        ({"name": "a.png", "type": "models"}, "its underlay is of type 'models'"),
    ],
)
def test_an_underlay_that_cannot_be_read_is_named(canvas, under, words):
    with pytest.raises(ValueError, match=words):
        canvas(mode="paint", drawing=text([], underlay=under))


# --- what it says -----------------------------------------------------------------------------------


@pytest.fixture
def shown(host, monkeypatch):
    lines = []
    monkeypatch.setattr(host.pack("nodes.adapters.screen"), "say", lambda node, line: lines.append(line))
    return lines


def test_without_a_controlnet_it_says_so_and_paints(canvas, stock, shown):
    picture = canvas(control_net=None)[0]
    assert shown == ["no CONTROL_NET is connected: the lines steer nothing; connect Load SANA ControlNet"]
    canvas(control_net=None, mode="paint")
    assert len(shown) == 1
    assert torch.equal(picture, stock()[0])


def test_an_empty_drawing_is_strength_0_and_it_says_so(canvas, stock, shown):
    picture = canvas(drawing="")[0]
    assert shown == ["no lines are drawn: painted without the ControlNet, as at strength 0"]
    assert torch.equal(picture, stock()[0])


def test_other_families_are_refused(canvas):
    import comfy.model_patcher

    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="this CONTROL_NET is not of SANA"):
        canvas(control_net=object())
    with pytest.raises(ValueError, match="this MODEL is not a SANA"):
        canvas(model=comfy.model_patcher.ModelPatcher(torch.nn.Linear(2, 2), cpu, cpu))


def test_a_teacher_is_refused(canvas, node, host):
    folder = standin.make(host.base / "models" / "diffusers" / "multistep-live", standin.TEACHER)
    teacher = node("SanaSprintModelLoader", model=folder.name)
    with pytest.raises(ValueError, match="this MODEL is not a SANA-Sprint; sample multi-step models"):
        canvas(model=teacher)


@pytest.mark.parametrize("bad", ["{", '{"version": 7}'])
def test_what_is_no_drawing_is_refused_before_the_run(host, bad):
    check = host.pack("nodes.live").LiveCanvas.validate_inputs
    assert check(drawing=bad).startswith("drawing: ") and check(drawing=DRAWING) is True and check(drawing="") is True


def test_a_changed_underlay_is_a_changed_node(host):
    of = host.pack("nodes.live").LiveCanvas.fingerprint_inputs
    path = host.base / "input" / "b.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    under = text([], underlay={"name": "b.png"})
    before = of(drawing=under, live=False)
    os.utime(path, ns=(1, 1))
    assert of(drawing=under, live=False) != before


def test_frames_in_flight_may_have_a_vae_in_bf16(host, loaded, net, monkeypatch):
    """A copy: what the graph goes on with is as it was."""
    painters, vaes = host.pack("nodes.adapters.live_painter"), host.pack("nodes.adapters.vae")
    frame = host.pack("sprint_core.images.frames").Frame(64, 64, "a red apple", seed=3, lines=bytes(range(256)) * 16)
    model, clip, vae = loaded
    monkeypatch.setattr(vaes, "cpu_multiplies_bf16", lambda: True)
    painter = painters.ComfyPainter(model, clip, vae, net)
    painter.on_cpu = True
    other = painter.in_bf16()
    assert (vae.vae_dtype, other.vae.vae_dtype) == (torch.float32, torch.bfloat16)
    assert other.vae.patcher.model is other.vae.first_stage_model is other.networks[1] is not painter.networks[1]
    session = host.pack("sprint_core.live").LiveSession
    whole, less, again = (session(one).paint(frame).image for one in (painter, other, painter))
    assert torch.equal(whole, again) and 0 < (whole - less).abs().mean() < 0.01
    assert other.in_bf16() is None
    monkeypatch.setattr(vaes, "cpu_multiplies_bf16", lambda: False)
    assert painter.in_bf16() is None
