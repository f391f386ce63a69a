"""Pictures steered by a ControlNet, without ComfyUI: the pipeline, its command line, and how it is judged."""

import copy
import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
import shapes_model
import standin
import torch
from PIL import Image

from sprint_core import __main__, pipeline, sampler, trigflow
from sprint_core.evaluate import __main__ as evaluate
from sprint_core.evaluate import control as evaluate_control
from sprint_core.evaluate import scoring, sheet
from sprint_core.images import edges
from sprint_core.models.controlnet import AUTHORS, WIRINGS
from sprint_core.models.transformer import SanaTransformer
from sprint_core.pipeline import Control, Pipeline
from sprint_core.shapes import captions, examples, judge, scenes
from sprint_core.weights import checkpoint, layouts, presets

SIZE = (96, 64)  # width, height
PROMPT = "a red circle"
HINT = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return standin.make(tmp_path_factory.mktemp("models") / "sprint")


@pytest.fixture(scope="module")
def model(folder) -> Pipeline:
    return Pipeline.load(folder)


@pytest.fixture(scope="module")
def net():
    return checkpoint.build(standin.control(AUTHORS))


@pytest.fixture
def paint(model):
    """paint(controls, steps=2): one image."""
    return lambda *controls, steps=2: model.generate([PROMPT], seeds=[3], size=SIZE, steps=steps, controls=controls)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_control_by_hand(model, wiring):
    """One step written out: hint, residuals, strength, trunk, image."""
    net = checkpoint.build(standin.control(wiring))
    got = model.generate([PROMPT], seeds=[3], size=SIZE, steps=1, controls=[Control(net, HINT, 0.7)])
    caption, mask = model.encode_text([PROMPT])
    x = pipeline.sampler.initial_noise([3], (32, 2, 3))
    one, w = torch.ones(1), torch.full((1,), 4.5)
    residuals = net(x, one, caption, model.encode_image(HINT), w, mask)
    v = model.transformer(x, one, caption, w, mask, [r if r is None else 0.7 * r for r in residuals])
    assert torch.allclose(got, model.decode(x - v), atol=1e-5)


@pytest.mark.parametrize(
    "device",
    ["meta", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
@torch.inference_mode()
def test_nothing_in_the_loop_waits_for_the_device(model, net, device, request):
    """Nobody reads its numbers, nor copies to it but from pinned memory. On meta there are none to read."""
    config = dataclasses.replace(model.transformer.config, pos_embed_base=8)  # whose embedding is made on the CPU
    moved = Pipeline(SanaTransformer(config).to(device), copy.deepcopy(model.autoencoder).to(device), None)
    caption = torch.randn(2, 7, moved.transformer.config.caption_width).to(device)
    control = Control(copy.deepcopy(net).to(device), HINT, 0.7, end=0.5)
    denoise = moved.denoiser(caption, None, 4.5, [control])
    x_s = sampler.initial_noise([1, 2], (32, 2, 3)).to(device)
    sigmas, noise = torch.tensor(trigflow.sigmas("paper", 4)), sampler.StepNoise([1, 2], (32, 2, 3), device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    assert sampler.sample(denoise, x_s, sigmas, noise).device.type == device
    with pytest.raises((RuntimeError, NotImplementedError)):
        sampler.sample(lambda x, s: denoise(x, s) * x.sum().item(), x_s, sigmas, noise)


def test_strength_0_changes_nothing(paint, net):
    assert torch.equal(paint(Control(net, HINT, 0.0)), paint())
    assert not torch.allclose(paint(Control(net, HINT, 1.0)), paint(), atol=1e-2)


def test_two_at_half_strength_equal_one(paint, net):
    assert torch.allclose(
        paint(Control(net, HINT, 0.3), Control(net, HINT, 0.3)), paint(Control(net, HINT, 0.6)), atol=1e-5
    )


@pytest.mark.parametrize(
    ("steps", "start", "end", "acting"),
    [(1, 0, 1, 1), (1, 0, 0, 1), (1, 0.1, 1, 0), (2, 0, 0.1, 1), (2, 0.1, 1, 1), (4, 0, 0.5, 3), (4, 0.2, 1, 2)],
)
def test_range(paint, net, steps, start, end, acting, monkeypatch):
    """The same steps as in ComfyUI (tests/host/test_control.py)."""
    calls, forward = [], type(net).forward
    monkeypatch.setattr(type(net), "forward", lambda self, *args, **kw: calls.append(1) or forward(self, *args, **kw))
    paint(Control(net, HINT, 1.0, start, end), steps=steps)
    assert len(calls) == acting


@pytest.mark.parametrize(("start", "end", "acting"), [(0, 0.25, 2), (0.25, 1, 3), (0.75, 1, 1), (0, 0.75, 4)])
def test_a_range_includes_its_ends(model, net, start, end, acting, monkeypatch):
    """The steps of `app` lie at 0, 0.25, 0.5 and 0.75, rounded as they are."""
    calls, forward = [], type(net).forward
    monkeypatch.setattr(type(net), "forward", lambda self, *args, **kw: calls.append(1) or forward(self, *args, **kw))
    control = Control(net, HINT, 1.0, start, end)
    model.generate([PROMPT], seeds=[3], size=SIZE, steps=4, schedule="app", controls=[control])
    assert len(calls) == acting


def test_percent_counts_angles():
    assert [trigflow.percent_to_s(p) for p in (-1, 0, 1, 2)] == [1.0, 1.0, 0.0, 0.0]
    assert trigflow.percent_to_s(0.5) == pytest.approx(0.5)
    assert trigflow.percent_to_s(1 - 1.3 / (np.pi / 2)) == pytest.approx(trigflow.s_from_t(1.3))


def test_batches(model, net):
    hints = torch.cat([HINT, 1 - HINT])
    given = {"size": SIZE, "steps": 2}
    each = model.generate([PROMPT] * 2, seeds=[3, 4], controls=[Control(net, hints)], **given)
    shared = model.generate([PROMPT] * 2, seeds=[3, 4], controls=[Control(net, HINT)], **given)
    alone = model.generate([PROMPT], seeds=[4], controls=[Control(net, hints[1:])], **given)
    assert torch.allclose(each[1:], alone, atol=1e-5) and torch.allclose(each[:1], shared[:1], atol=1e-5)
    assert not torch.allclose(shared[1:], each[1:], atol=1e-2)


def test_prompts_of_different_lengths_steer_alone(model, net):
    """The ControlNet reads the padded prompts with their mask, as the trunk does."""
    controls, prompts = [Control(net, HINT)], [PROMPT, "a red circle to the left of a large blue square"]
    both = model.generate(prompts, seeds=[3, 4], size=SIZE, controls=controls)
    alone = model.generate(prompts[:1], seeds=[3], size=SIZE, controls=controls)
    assert torch.allclose(both[:1], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strength": 11.0}, "the control strength is 11; it must lie in 0 to 10"),
        ({"strength": float("nan")}, "the control strength is nan"),
        ({"start": 0.8, "end": 0.2}, r"control from 0\.8 to 0\.2: start must not exceed end"),
        ({"start": -0.1}, "start must not exceed end, and both lie in 0 to 1"),
    ],
)
def test_refused_settings(net, change, words):
    with pytest.raises(ValueError, match=words):
        Control(net, HINT, **change)


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (3, 64, 96, 3), (1, 64, 96, 4), (64, 96, 3)])
def test_refused_images(paint, net, shape):
    with pytest.raises(ValueError, match=r"the control image is .*; it must be \[1 or 1, 64, 96, 3\]"):
        paint(Control(net, torch.rand(shape)))


def test_a_control_image_that_is_none(paint, net):
    with pytest.raises(ValueError, match="the control image holds NaN"):
        paint(Control(net, torch.full((1, 64, 96, 3), float("nan"))))


def test_another_width(paint):
    wide = checkpoint.build(standin.control(AUTHORS, width=96, cross_heads=3))
    with pytest.raises(ValueError, match=r"a ControlNet of width 96.*take the ControlNet of this model's size"):
        paint(Control(wide, HINT))


# --- command line -----------------------------------------------------------------------------------


def command(capsys, *words) -> dict:
    assert __main__.main([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path))


@pytest.fixture
def drawing(tmp_path):
    """A scene's image in a file, larger than the model's own size."""
    scene = examples.scene_and_caption(1)[0]
    Image.fromarray(scenes.render(scene, 300)).save(tmp_path / "drawing.png")
    return tmp_path / "drawing.png"


@pytest.mark.parametrize("kind", ["soft", "scribble", "none"])
def test_command_line(drawing, tmp_path, capsys, kind):
    """The bundled model and its ControlNet, without a download."""
    options = (
        "--control",
        drawing,
        "--control-strength",
        0.9,
        "--edges",
        kind,
        "--steps",
        1,
        "--out",
        tmp_path / "x.png",
    )
    result = command(capsys, PROMPT, *options)
    resized = Image.open(drawing).resize((256, 256), Image.Resampling.LANCZOS)
    hint = torch.from_numpy(np.array(resized)).float()[None] / 255
    if kind != "none":
        hint = edges.detect(hint, scribble=kind == "scribble")
    net = checkpoint.build(checkpoint.load(presets.BUNDLED_CONTROL, layouts.CONTROLNET), dtype=torch.float32)
    want = Pipeline.load(presets.BUNDLED).generate([PROMPT], seeds=[0], steps=1, controls=[Control(net, hint, 0.9)])
    assert np.array_equal(pixels(result["images"][0]), want[0].mul(255).round().byte().numpy())


def test_command_line_with_another_model(folder, drawing, tmp_path, capsys, caplog):
    checkpoint.save(tmp_path / "control.safetensors", [standin.control(AUTHORS)], {})
    options = ["--model", folder, "--control", drawing, "--size", "96x64", "--out", tmp_path / "x.png"]
    plain = pixels(command(capsys, PROMPT, *options[:2], *options[4:])["images"][0])
    given = [*options, "--control-model", tmp_path / "control.safetensors"]
    assert not np.array_equal(pixels(command(capsys, PROMPT, *given)["images"][0]), plain)
    late = pixels(command(capsys, PROMPT, *given, "--control-range", "0.9,1")["images"][0])
    assert np.array_equal(late, plain)
    for words, message in (
        (options, "name the ControlNet of this --model with --control-model"),
        ([*given, "--control-range", "1"], "--control-range 1: write it as 0,1"),
        ([*given, "--control-range", "1,0"], "start must not exceed end"),
        ([*given, "--control-strength", "20"], "the control strength is 20"),
        ([*given, "--hed", "gone.pth"], "gone.pth: no such file"),
        ([*given, "--hed", "gone.pth", "--edges", "none"], "choose one"),
        (["--hed", "gone.pth", "--control-strength", "2"], "--control-strength, --hed: of no use without --control"),
        (["--control", ""], "--control : no such file"),
        ([*options, "--control-model", folder], "this pipeline folder has no 'controlnet' folder"),
        ([*options[:2], "--control", "gone.png", *given[-2:]], "--control gone.png: no such file"),
    ):
        assert __main__.main([PROMPT, *map(str, words)]) == 1
        assert message in caplog.records[-1].getMessage()


def test_drawings_are_seen_as_meant(tmp_path, capsys):
    """White lines on nothing are lines on black; a wide sheet is cropped, not squeezed; 16 bits are scaled."""
    line = np.zeros((256, 512, 4), np.uint8)
    line[100:110, 200:300] = 255
    Image.fromarray(line, "RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(line[:, 128:384, :3]).save(tmp_path / "plain.png")
    Image.fromarray(line[:, 128:384, 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    paint = lambda name: pixels(  # noqa: E731
        command(
            capsys, PROMPT, "--control", tmp_path / name, "--edges", "none", "--steps", 1, "--out", tmp_path / "x.png"
        )["images"][0]
    )
    want = paint("plain.png")
    assert np.array_equal(paint("alpha.png"), want) and np.array_equal(paint("deep.png"), want)


def test_broken_pictures_are_named(tmp_path, caplog, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    Image.new("RGB", (64, 64)).save(tmp_path / "bomb.png")
    for name, option in (
        ("text.png", "--control"),
        ("cut.png", "--control"),
        ("bomb.png", "--control"),
        ("cut.png", "--image"),
    ):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000 if name == "bomb.png" else 10**8)
        assert __main__.main([PROMPT, option, str(tmp_path / name)]) == 1
        assert f"{option} {tmp_path / name}: not an image that can be read" in caplog.records[-1].getMessage()


# --- the judge --------------------------------------------------------------------------------------


def test_true_images_keep_to_edges_and_colours():
    prompts = scoring.balanced_prompts(60, 5, free=True)
    true = sheet.true_images(prompts)
    verdicts = evaluate_control.summary({("soft", 1): true}, prompts)
    assert (verdicts["edges"], verdicts["colours"], verdicts["judge"]) == ({"soft 1": 1.0},) * 3
    others = evaluate_control.summary({("soft", 1): true.roll(1, 0)}, prompts)
    assert others["edges"]["soft 1"] < 0.1 and others["colours"]["soft 1"] < 0.2


def test_what_no_caption_says_is_not_judged():
    prompts = [
        p for p in scoring.balanced_prompts(60, 5, free=True) if not any(thing.colour for thing in p.requirement.things)
    ]
    result = evaluate_control.summary({("soft", 1): sheet.true_images(prompts)}, prompts)
    assert prompts and result["colours"] == {"soft 1": None} and "None" in evaluate_control.table(result)


@pytest.mark.parametrize("words", [["--teacher", "t"], ["--geneval", "g", "--out", "o"], ["--inception", "i"]])
def test_options_of_no_use(words, caplog):
    assert evaluate.main(["--control", "demo", *words]) == 1
    assert f"{words[0]} is of no use with --control" in caplog.text


def test_colours_are_judged_where_things_stand():
    prompt = examples.prompts("color_attr", 1)[0]
    picture = scenes.render(prompt.scene)
    first, second = prompt.scene.things
    swapped = scenes.Scene(
        (replace(first, colour=second.colour), replace(second, colour=first.colour)),
        prompt.scene.background,
    )
    assert judge.coloured(picture, prompt.requirement, prompt.scene) is True
    assert judge.coloured(scenes.render(swapped), prompt.requirement, prompt.scene) is False
    assert judge.outlined(scenes.render(swapped), prompt.scene)
    halved = picture.copy()
    halved[:, 128:] = scenes.render(swapped)[:, 128:]
    assert judge.outlined(halved, prompt.scene)
    unsaid = captions.Requirement(tuple(replace(thing, colour=None) for thing in prompt.requirement.things))
    assert judge.coloured(picture, unsaid, prompt.scene) is None
    moved = scenes.render(prompt.scene, moved=[(40, 0), (-40, 0)])
    assert not judge.outlined(moved, prompt.scene)
    assert not judge.outlined(scenes.render(replace(prompt.scene, things=(first,))), prompt.scene)


def test_a_control_net_of_shapes_steers(tmp_path, capsys):
    """It keeps to the edges far more often than chance would."""
    grid = tmp_path / "grid.png"
    argv = [*shapes_model.EVALUATED, "--control", str(shapes_model.CONTROL), "--prompts", "24", "--steps", "2"]
    assert evaluate.main([*argv, "--grid", str(grid)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["edges"]["soft 2"] >= result["edges"]["without 2"] + 0.3
    assert set(result["edges"]) == {"soft 2", "scribble 2", "without 2"} and result["prompts"] == 24
    assert Image.open(grid).width == 5 * 128
