"""Training ControlNets: what learns and what stays, the trajectory, and both recipes through the command line."""

import copy
import dataclasses
import json

import pytest
import shapes_model
import standin
import torch
from picture_files import plain, write
from tiny_recipe import write_pictures

from sprint_core.distill import __main__ as command
from sprint_core.distill import recipes
from sprint_core.distill.dataset import scenes as data
from sprint_core.distill.dataset.batch import Batch
from sprint_core.distill.engine.randomness import SampleRandom, initialise
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.recipes import Objective, Recipe, Schedule
from sprint_core.distill.runs import control, estimate
from sprint_core.distill.stages.base import Captioned
from sprint_core.distill.stages.control import ControlStage, block_count
from sprint_core.distill.stages.sprint import Conditioning
from sprint_core.images import edges
from sprint_core.models import controlnet, hed
from sprint_core.models.gemma import Gemma
from sprint_core.models.transformer import SanaTransformer, TransformerConfig
from sprint_core.pipeline import Control, Pipeline
from sprint_core.shapes import examples, scenes
from sprint_core.text.formats import TextPreset
from sprint_core.text.loading import find_tokenizer
from sprint_core.text.prompts import PromptTokenizer
from sprint_core.text.tokenizers import HFTokenizer, tokenizer_state
from sprint_core.trigflow import SIGMA_DATA, add_noise, flow_predict_x0
from sprint_core.weights import checkpoint, layouts, part, presets

CONFIG = TransformerConfig(width=64, depth=4, cross_heads=2, caption_width=64)
LATENTS = torch.stack([torch.full((32, 2, 2), 1.0), torch.full((32, 2, 2), -1.0)])


class TwoHints:
    """Two flat images with one caption: only the hint tells which."""

    fingerprint = "two flat images"

    def batch(self, random: SampleRandom) -> Batch:
        chosen = random.integers(2)
        return Batch(LATENTS[chosen], ["flat"] * len(chosen), 0.5 * LATENTS[chosen])


@pytest.fixture
def trunk() -> Captioned:
    tokenizer = HFTokenizer(json.dumps(standin.byte_tokenizer()).encode())
    prompts = PromptTokenizer(tokenizer, TextPreset(instruction=None, max_tokens=16))
    model = Captioned(SanaTransformer(CONFIG), Gemma(standin.TEXT), prompts)
    initialise(model, 0)
    for name, p in model.named_parameters():
        if "scale_shift_table" in name:
            p.data.mul_(0.1)
    return model


@pytest.mark.parametrize(("depth", "blocks"), [(28, 7), (20, 7), (60, 7), (6, 3)])
def test_copied_blocks(depth, blocks):
    """Seven, as published; of a small trunk the first half."""
    assert block_count(depth) == blocks


@pytest.mark.parametrize(("step", "phase"), [(0, "student"), (1, "critic")])
def test_only_the_branch_learns(trunk, step, phase):
    stage = ControlStage(trunk, TwoHints(), Objective(tangent_warmup_steps=1))
    assert [one.module for one in stage.phases(step)] == [phase]
    before = copy.deepcopy(trunk.state_dict())
    shared = copy.deepcopy(stage.modules["student"].branch.state_dict())
    for _ in range(2):  # the projections are zero at first: what lies before them learns from the second step on
        loss, metrics = stage.loss(phase, 5, SampleRandom(0, step, phase, range(4)))
        loss.backward()
        assert loss.isfinite() and all(value.isfinite() for value in metrics.values())
        with torch.no_grad():
            for p in stage.modules[phase].parameters():
                if p.grad is not None:
                    p.sub_(0.01 * p.grad)
    assert all(p.grad is None for p in trunk.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())
    moved = {k for k, v in stage.modules["student"].branch.state_dict().items() if not torch.equal(v, shared[k])}
    if phase == "critic":
        assert not moved
    else:
        assert not any(name.startswith((*controlnet.SHARED, "base_block.")) for name in moved)
        assert {name.split(".")[0] for name in moved} == {"input_block", "transformer_blocks", "controlnet_blocks"}


def test_the_trajectory_is_the_images_own(trunk):
    """dx_t/dt by finite differences in float64."""
    stage = ControlStage(trunk, TwoHints(), Objective())
    generator = torch.Generator().manual_seed(0)
    x0, z = (SIGMA_DATA * torch.randn(3, 32, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    t, h = torch.tensor([0.1, 0.8, 1.5], dtype=torch.float64), 1e-6
    at = lambda t: add_noise(x0, z, t[:, None, None, None])  # noqa: E731
    slope = (at(t + h) - at(t - h)) / (2 * h)
    got = stage._trajectory(x0, z, at(t), t, Conditioning(t, {}))
    assert (got - slope).abs().max() < 1e-8


def test_a_short_training_follows_the_hint(trunk, tmp_path):
    """Two images, one caption: the hint alone decides, in one step from noise."""
    schedule = Schedule(steps=40, batch=8, lr=5e-3, warmup_steps=10, ema=0.9, clip=1.0)
    stage = ControlStage(trunk, TwoHints(), Objective(tangent_warmup_steps=10, ladd_from=30, ladd_weight=0.05))
    branch = Trainer(stage, schedule, tmp_path).train().branch
    z = torch.randn((4, 32, 2, 2), generator=torch.Generator().manual_seed(0))
    caption, mask = trunk.encode(["flat"] * 4)
    w, ones = torch.full((4,), 4.5), torch.ones(4)
    hints = 0.5 * LATENTS[[0, 1, 0, 1]]
    residuals = branch(z, ones, caption, hints, w, mask)
    x0 = flow_predict_x0(trunk.transformer(z, ones, caption, w, mask, residuals), z, 1.0)
    assert (x0.mean((1, 2, 3)) * torch.tensor([1.0, -1.0, 1.0, -1.0]) > 0.3).all()


def test_control_images_alternate():
    pictures = data.images(range(4))
    drawn = data.control_images(pictures)
    images = (pictures.movedim(1, -1) + 1) / 2
    for i, scribble in enumerate((False, True, False, True)):
        want = edges.detect(images[i : i + 1], scribble=scribble)
        assert torch.allclose((drawn[i].movedim(0, -1) + 1) / 2, want[0], atol=1e-6)
    assert data.control_images(pictures[:1]).shape == (1, 3, 256, 256)


def test_things_drawn_anywhere_stay_in_the_picture():
    drawn = [examples.scene_and_caption(seed, free=True)[0] for seed in range(40)]
    plain, moved = data.as_tensor(scenes.render(scene) for scene in drawn), data.moved_images(range(40))
    same = [torch.equal(a, b) for a, b in zip(plain, moved, strict=True)]
    assert same[0::4] == [True] * 10 and same[1::4] == [True] * 10
    assert sum(same) <= 22
    for seed, scene in enumerate(drawn):
        for thing, (right, down) in zip(scene.things, scenes.moves(scene, seed), strict=True):
            first, last = scenes.centre_px(thing.size, 0), scenes.centre_px(thing.size, 2)
            assert first <= scenes.centre_px(thing.size, thing.column) + right <= last
            assert first <= scenes.centre_px(thing.size, thing.row) + down <= last
            assert max(abs(right), abs(down)) <= 40
    assert len({len(set(scenes.moves(s, i))) for i, s in enumerate([examples.scene_and_caption(0)[0]] * 5)}) == 1


# --- the command line ---------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Both recipes in three steps of two images, without an estimate (test_estimate.py and `test_dry_run` have it)."""
    monkeypatch.setattr(estimate, "of_recipe", lambda *_: [])
    schedule = Schedule(3, 2, 1e-3, 1, ema=0.5)
    for name in ("shapes-control", "control"):
        recipe = Recipe({"control": schedule}, Objective(tangent_warmup_steps=1, ladd_from=1), "")
        monkeypatch.setitem(recipes.RECIPES, name, recipe)


def run(out, **options) -> int:
    parts = {} if options.get("recipe", "").endswith("control") else shapes_model.TRAINED_ON
    given = {"recipe": "shapes-control", "out": out, "device": "cpu"} | parts | options
    return command.main([f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None])


def test_shapes_control(short, tmp_path, capsys):
    """Resumes to the same bytes; the file holds all that the branch needs."""
    out = tmp_path / "out"
    assert run(out, pool=4) == 0
    path = out / "sana_controlnet.safetensors"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["files"] == [str(path)]
    first = path.read_bytes()
    assert run(out, pool=4) == 0 and path.read_bytes() == first
    weights = checkpoint.load(path, layouts.CONTROLNET)
    assert (weights.config.depth, weights.config.wiring, weights.config.guidance_embed) == (3, "authors", True)
    net = checkpoint.build(weights, dtype=torch.float32)
    pipeline = Pipeline.load(shapes_model.MODEL)
    own = pipeline.transformer.state_dict()["time_embed.linear.weight"]
    assert torch.equal(net.time_embed.linear.weight, own.float())
    picture = control_picture()
    images = pipeline.generate(["a red circle"], seeds=[0], controls=[Control(net, picture)])
    assert images.shape == (1, 256, 256, 3)


def control_picture() -> torch.Tensor:
    drawn = torch.from_numpy(scenes.render(examples.scene_and_caption(0)[0])).float()[None] / 255
    return edges.detect(drawn)


def test_control_of_images(short, tmp_path, capsys):
    """Full size in small: hints are encoded with the images; the file holds all that the branch needs, in bf16."""
    model, pictures = standin.make(tmp_path / "sprint"), write_pictures(tmp_path / "pictures")
    write(pictures, {"bad.png": b"no image", "bad.txt": "bad"})
    given = {"recipe": "control", "student": model, "vae": model, "text_encoder": model, "data": pictures}
    out = tmp_path / "out"
    assert run(out, **given) == 0
    shard = next((out / "encoded").glob("shard_*.safetensors"))
    tensors = checkpoint.tensorfile.read(shard).tensors
    names = [name for name in tensors if name.startswith("latents ")]  # of the one bin of these images
    (hints, latents) = (tensors[name.replace("latents", kind)] for name in names for kind in ("hints", "latents"))
    assert hints.shape == latents.shape and hints.shape[2] < hints.shape[3] and not torch.equal(hints, latents)
    weights = checkpoint.load(out / "sana_controlnet.safetensors", layouts.CONTROLNET)
    checkpoint.check_names(weights)
    assert part.majority_dtype(weights.tensors) == torch.bfloat16
    assert run(out, **given) == 0


def test_hed_makes_the_hints(short, tmp_path, monkeypatch):
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in hed.HED().state_dict().items()}
    torch.save(standin.random_tensors(shapes), tmp_path / "hed.pth")
    seen = []
    monkeypatch.setattr(data, "control_images", lambda images, network, scribbles: seen.append(network) or images)
    model = standin.make(tmp_path / "sprint")
    pictures = write_pictures(tmp_path / "pictures")
    given = {"recipe": "control", "student": model, "vae": model, "text_encoder": model, "data": pictures}
    assert run(tmp_path / "out", **given, hed=tmp_path / "hed.pth") == 0
    assert seen and all(isinstance(network, hed.HED) for network in seen)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "control"}, "--recipe control needs --student, --vae, --text-encoder, --data"),
        ({"student": None}, "--recipe shapes-control needs --student"),
        ({"data": "pictures"}, "shapes-control draws its own scenes; --recipe control takes images"),
        ({"teacher": "t"}, "--teacher: a ControlNet has no teacher; --student takes its SANA-Sprint"),
        ({"stage": "teacher"}, "--stage teacher: shapes-control has the stage control"),
        ({"recipe": "shapes", "hed": "h"}, "--hed is of the recipe control"),
        ({"hed": "gone.pth"}, "--hed: the edges of scenes are made without weights"),
        ({"recipe": "control", "pool": 5}, "--pool: of scenes; --recipe control learns from all images of --data"),
        ({"recipe": "control", "stage": "teacher"}, "--stage teacher: control has the stage control"),
        ({"set": "control.stepz=3"}, "no setting stepz"),
        ({"set": "distill.steps=3"}, "write it as STAGE.KEY=VALUE, with a stage of control"),
        ({"pool": 0}, "at least one scene is needed"),
    ],
)
def test_refused(short, tmp_path, caplog, options, words):
    assert run(tmp_path / "out", **options) == 1
    assert words in caplog.text


def test_a_teacher_is_no_trunk(short, tmp_path, caplog):
    folder = standin.make(tmp_path / "teacher", standin.TEACHER)
    given = {"recipe": "control", "student": folder, "vae": folder, "text_encoder": folder}
    write(tmp_path / "pictures", {"a.png": plain((1, 2, 3)), "a.txt": "a"})
    assert run(tmp_path / "out", **given, data=tmp_path / "pictures") == 1
    assert "a multi-step SANA; a ControlNet is trained on a SANA-Sprint" in caplog.text


def test_another_text_encoder(short, tmp_path, caplog):
    folder = standin.make(tmp_path / "sprint")
    assert run(tmp_path / "out", text_encoder=folder) == 1
    assert "choose the text encoder that it was trained with" in caplog.text


def test_the_latents_of_images_without_control_are_refused(short, tmp_path, caplog):
    """A folder belongs to one way to make hints."""
    model, pictures = standin.make(tmp_path / "sprint"), write_pictures(tmp_path / "pictures")
    given = {"recipe": "control", "student": model, "vae": model, "text_encoder": model, "data": pictures}
    assert run(tmp_path / "out", **given) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "EDGES_VERSION", 99)
        assert run(tmp_path / "out", **given) == 1
    assert "made by another auto-encoder, text encoder or kind of edges" in caplog.text


def test_training_on_from_a_control_net(short, tmp_path, caplog):
    assert run(tmp_path / "first", pool=4) == 0
    first = tmp_path / "first" / "sana_controlnet.safetensors"
    assert run(tmp_path / "second", pool=4, control=first) == 0
    second = checkpoint.load(tmp_path / "second" / first.name, layouts.CONTROLNET).tensors
    start = checkpoint.load(first, layouts.CONTROLNET).tensors
    name = "controlnet_blocks.0.weight"  # which begins at zero
    assert 0 < (second[name] - start[name]).float().norm() < 3 * start[name].float().norm()
    assert run(tmp_path / "second", pool=4) == 1 and "holds another run" in caplog.text
    folder = standin.make(tmp_path / "sprint")
    checkpoint.save(tmp_path / "other.safetensors", [standin.control("authors")], {})
    given = {"recipe": "control", "student": folder, "vae": folder, "text_encoder": folder}
    given["data"] = write_pictures(tmp_path / "pictures")
    assert run(tmp_path / "third", **given, control=tmp_path / "other.safetensors") == 1
    assert "other.safetensors: a ControlNet of another model" in caplog.text


def test_another_text_encoder_is_another_run(short, tmp_path, caplog):
    weights = checkpoint.load(shapes_model.MODEL, layouts.TEXT_ENCODER)
    weights.extras |= tokenizer_state(find_tokenizer(weights))
    weights.tensors = {k: v + 0.01 for k, v in weights.tensors.items()}
    checkpoint.save(tmp_path / "other.safetensors", [weights], {})
    assert run(tmp_path / "out", pool=4) == 0
    assert run(tmp_path / "out", pool=4, text_encoder=tmp_path / "other.safetensors") == 1
    assert "holds another run" in caplog.text


def test_the_bundled_pair_belongs_together():
    """Its ControlNet was trained on this very model: loading checks what they share."""
    weights = checkpoint.load(presets.BUNDLED_CONTROL, layouts.CONTROLNET)
    assert weights.settings["trunk"] == presets.BUNDLED.name
    assert presets.BUNDLED_CONTROL.stat().st_size <= 6e6
    checkpoint.check_names(weights)


@pytest.mark.parametrize(("recipe", "millions"), [("shapes-control", (1.8, 2.2)), ("control", (570, 600))])
def test_dry_run(recipe, millions, capsys, tmp_path, monkeypatch):
    """What is trained: three blocks of a trunk of shapes, seven of the 1.6B; and the critic.

    The operations of the 1.6B take half a minute to count, and test_estimate.py has them of a small one.
    """
    if recipe == "control":
        monkeypatch.setattr(estimate, "_update", lambda stage, name, *_: estimate.Phase(name, 1, 1))
    assert command.main(["--recipe", recipe, "--out", str(tmp_path), "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["dry_run"]["control"]
    assert millions[0] < said["parameters"] / 1e6 < millions[1]
    assert said["memory_bytes"] > 16 * said["parameters"]


def test_published_settings_stay():
    assert recipes.RECIPES["control"].stages["control"] == recipes.RECIPES["sprint-1.6B"].stages["distill"]
    changed = recipes.override(recipes.RECIPES["control"], ["control.ladd_weight=0.2", "control.steps=7"])
    assert (changed.objective.ladd_weight, changed.stages["control"].steps) == (0.2, 7)
    with pytest.raises(ValueError, match=r"control\.ladd_from is 9, control\.steps 3"):
        recipes.override(recipes.RECIPES["control"], ["control.ladd_from=9", "control.steps=3"])
    assert dataclasses.replace(recipes.RECIPES["control"]).is_control and not recipes.RECIPES["demo"].is_control
