"""Full-size distillation from end to end at a tiny size, through its command line."""

import dataclasses
import json
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import standin
import torch
import torch._dynamo
import torch._functorch.config
from picture_files import plain, write
from PIL import Image
from tiny_recipe import COLOURS, SANA, SIZE_PX, tiny, write_pictures  # noqa: F401

from sprint_core.batch import __main__ as batch
from sprint_core.distill import __main__ as command
from sprint_core.distill import recipes
from sprint_core.distill.engine.compiling import compile_blocks
from sprint_core.distill.engine.processes import SINGLE_PROCESS
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.runs import estimate, published
from sprint_core.distill.runs import run as published_run
from sprint_core.distill.runs.encoders import DataOptions, load_encoders
from sprint_core.distill.runs.published import stabilised
from sprint_core.distill.stages.teacher import is_stable
from sprint_core.models.autoencoder import Autoencoder
from sprint_core.models.transformer import SanaTransformer, TransformerConfig
from sprint_core.pipeline import Pipeline
from sprint_core.weights import checkpoint, keymaps, layouts

pytestmark = pytest.mark.usefixtures("tiny")
ESTIMATES: dict[str, list[estimate.Estimate]] = {}  # by recipe: they take longer than a run, and are always the same
FP32 = ["teacher.precision=fp32", "distill.precision=fp32", "distill.teacher_precision=fp32"]
BF16 = ["distill.precision=bf16", "distill.teacher_precision=bf16"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A teacher's pipeline folder."""
    return standin.make(tmp_path_factory.mktemp("models") / "teacher", standin.TEACHER)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def known_estimates(
    recipe, processes=SINGLE_PROCESS, trunk=None, of_recipe=estimate.of_recipe
) -> list[estimate.Estimate]:
    if repr(recipe) not in ESTIMATES:
        ESTIMATES[repr(recipe)] = of_recipe(recipe, processes, trunk)
    return ESTIMATES[repr(recipe)]


@pytest.fixture
def run(models, pictures, tmp_path, monkeypatch):
    """run(**options) -> exit code. Options replace those of a run into tmp_path/out, where None leaves one out.

    Without an estimate of its memory, with few captions to watch, and in fp32, as bf16 is slow on some CPUs.
    """
    monkeypatch.setattr(estimate, "of_recipe", lambda *_: [])
    monkeypatch.setattr(published, "WATCHED", 4)
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipes.override(recipes.RECIPES["tiny"], FP32))

    def run(**options) -> int:
        given = {"recipe": "tiny", "teacher": models, "vae": models, "text_encoder": models, "data": pictures}
        given |= {"out": tmp_path / "out", "device": "cpu"} | options
        options = {f"--{name.replace('_', '-')}": value for name, value in given.items() if value is not None}
        return command.main([name if value is True else f"{name}={value}" for name, value in options.items()])

    return run


@pytest.fixture
def estimated(run, monkeypatch):
    """With an estimate after all, for what needs memory."""
    monkeypatch.setattr(estimate, "of_recipe", known_estimates)


def forbid(monkeypatch, owner: type, name: str) -> None:
    monkeypatch.setattr(owner, name, lambda *args: pytest.fail(f"{name} was called"))


@pytest.fixture
def no_step(monkeypatch):
    """For what must be said before a step."""
    forbid(monkeypatch, Trainer, "_one_step")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def transformer(config: TransformerConfig) -> SanaTransformer:
    model = SanaTransformer(config)
    model.load_state_dict(standin.random_model(model))
    return model


@torch.no_grad()
def velocity(model: SanaTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, caption = torch.randn(2, 32, 2, 2, generator=generator), torch.randn(2, 5, 64, generator=generator)
    return model(x, torch.tensor([0.2, 0.9]), caption)


# --- what a run makes -------------------------------------------------------------------------------


def test_from_pictures_to_an_image(run, models, tmp_path, capsys, monkeypatch):
    """In bf16, as the published recipes."""
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipes.override(recipes.RECIPES["tiny"], BF16))
    assert run() == 0
    files = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
    assert files == [str(tmp_path / "out" / "sana_tiny.safetensors")]
    weights = checkpoint.load(files[0], layouts.TRANSFORMER)
    assert weights.config == standin.TRANSFORMER and weights.settings["size_px"] == 64
    assert {tensor.dtype for tensor in weights.tensors.values()} == {torch.bfloat16}
    pipeline = Pipeline.load(files[0], autoencoder=models, text_encoder=models, dtype=torch.float32)
    image = pipeline.generate(["red"], seeds=[0], steps=1)
    assert image.shape == (1, 64, 64, 3) and image.isfinite().all()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"distill", "encoded", "sana_tiny.safetensors"}


def test_a_run_shows_its_average_in_1_2_and_4_steps(run, models, tmp_path):
    """At checks and at the end, of the first captions that the guard watches: what the exported model paints."""
    assert run(no_buckets=True) == 0
    out = tmp_path / "out"
    (grid,) = (out / "distill" / "samples").iterdir()
    sheet = numpy.asarray(Image.open(grid), dtype=numpy.float32) / 255
    assert grid.name == "000002.png" and sheet.shape == (3 * SIZE_PX, 4 * SIZE_PX, 3)
    pipeline = Pipeline.load(
        out / "sana_tiny.safetensors", autoencoder=models, text_encoder=models, dtype=torch.float32
    )
    drawn = SampleRandom(42, 0, "watch", range(32)).of_data().integers(len(COLOURS))[:4]
    prompts = [sorted(COLOURS)[i] for i in drawn]
    for row, steps in zip(sheet.reshape(3, SIZE_PX, 4 * SIZE_PX, 3), (1, 2, 4), strict=True):
        images = pipeline.generate(prompts, seeds=range(4), steps=steps, guidance=5.0)
        expected = torch.cat(list(images), dim=1)
        assert (torch.from_numpy(row.copy()) - expected).abs().mean() < 0.01, steps


def test_a_teachers_own_images_train_its_student(run, models, tmp_path, capsys):
    """The two commands of the docs: images by `batch`, then distillation from them."""
    (tmp_path / "prompts.txt").write_text("red\na dark blue\ngrey\n")
    words = ["--model", models, "--size", "64x64", "--steps", 2, "--out", tmp_path / "made"]
    assert batch.main([str(tmp_path / "prompts.txt"), *map(str, words)]) == 0
    assert run(data=tmp_path / "made") == 0
    files = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
    assert checkpoint.load(files[0], layouts.TRANSFORMER).config == standin.TRANSFORMER
    caches = [tensors(file) for file in (tmp_path / "out" / "encoded").glob("*.safetensors")]
    assert sum(len(cache["lengths"]) for cache in caches if "lengths" in cache) == 3


def test_prompts_alone_train_a_student(run, models, tmp_path, capsys):
    """No image is asked for, nor an auto-encoder; every prompt is encoded, and the student moves."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "red"}\n\n{"prompt": "a dark blue", "seed": 3}\n')
    alone = {"data": tmp_path / "prompts.jsonl", "vae": None}
    assert run(**alone, set="distill.method=dmd") == 0
    (path,) = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
    student, teacher = (checkpoint.load(one, layouts.TRANSFORMER).tensors for one in (path, models))
    assert any(not torch.equal(student[name].float(), teacher[name].bfloat16().float()) for name in teacher)
    (shard,) = (tmp_path / "out" / "encoded").glob("shard_*.safetensors")
    assert set(tensors(shard)) == {"captions", "lengths"} and len(tensors(shard)["lengths"]) == 2


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("prompts.txt", "red", {}, "prompts alone, and sCM and LADD would learn from images"),
        ("prompts.txt", "", {"set": "distill.method=dmd"}, "no prompts in it"),
        ("prompts.csv", "words\nred", {"set": "distill.method=dmd"}, "words"),
    ],
)
def test_prompts_that_cannot_be_used(run, tmp_path, caplog, no_step, name, text, options, message):
    (tmp_path / name).write_text(text)
    assert run(data=tmp_path / name, vae=None, **options) == 1
    assert message in caplog.text


def test_images_need_their_encoder(run, caplog, no_step):
    assert run(vae=None) == 1
    assert "needs --vae" in caplog.text


def test_a_run_goes_on_from_its_best_average(run, models, tmp_path, capsys):
    """With another rate than before, from the step that best.safetensors says: here the untrained student."""
    out = tmp_path / "out"
    assert run() == 0
    best = checkpoint.tensorfile.read(out / "distill" / "best.safetensors")
    assert run(set="distill.lr=1e-9", resume_best=True) == 0
    state = torch.load(out / "distill" / "state.pt", weights_only=True)
    assert state["step"] == 2 and "1e-09" in state["run"]["schedule"]["lr"]
    assert int(best.metadata["step"]) < 2
    for name, tensor in best.tensors.items():
        torch.testing.assert_close(state["average"][name], tensor, rtol=1e-5, atol=1e-6)


def wide_and_tall(folder: Path) -> Path:
    """Captioned pictures of three bins, and of ratios beyond them; captions of several lengths."""
    shapes = {"red": (96, 64), "a dark blue": (64, 96), "grey": (64, 64), "a very dark blue or grey": (300, 4)}
    for number, (caption, shape) in enumerate(shapes.items()):
        write(folder, {f"{number}.png": plain((90 * number, 0, 9), shape), f"{number}.txt": caption})
    return folder


def latents(out: Path) -> dict[str, int]:
    """How many there are by the name of their tensor."""
    (shard,) = (out / "encoded").glob("shard_*.safetensors")
    return {name: len(tensor) for name, tensor in tensors(shard).items() if name.startswith("latents")}


def test_images_train_in_their_bins(run, tmp_path, caplog):
    data, settings = wide_and_tall(tmp_path / "data"), "distill.steps=3"
    assert run(data=data, set=settings) == 0
    out = tmp_path / "out"
    assert latents(out) == {"latents 2x2": 1, "latents 2x3": 2, "latents 3x2": 1}
    assert run(data=data, set=settings, out=tmp_path / "squares", no_buckets=True) == 0
    assert latents(tmp_path / "squares") == {"latents": 4}
    assert run(data=data, set=settings, no_buckets=True) == 1
    assert "with other options of images and captions" in caplog.text


def test_captions_encoded_batch_by_batch_train_the_same(run, tmp_path):
    """Bit for bit, whatever else is in the batch, and without an embedding on the disk; the file holds no encoder."""
    data = wide_and_tall(tmp_path / "data")
    for name, options in {"cached": {}, "live": {"no_text_cache": True}}.items():
        assert run(data=data, out=tmp_path / name, **options) == 0
    (shard,) = (tmp_path / "live" / "encoded").glob("shard_*.safetensors")
    assert set(tensors(shard)) == {"latents 2x2", "latents 2x3", "latents 3x2", "texts", "lengths"}
    assert shard.stat().st_size < 8000
    states = [tmp_path / name / "distill" / "state.pt" for name in ("cached", "live")]
    cached, live = (torch.load(state, weights_only=True) for state in states)
    for module, weights in cached["modules"].items():
        assert weights.keys() == live["modules"][module].keys()
        assert all(torch.equal(tensor, live["modules"][module][name]) for name, tensor in weights.items()), module
    files = [(tmp_path / name / "sana_tiny.safetensors") for name in ("cached", "live")]
    assert all(torch.equal(tensor, tensors(files[1])[name]) for name, tensor in tensors(files[0]).items())


def test_captions_are_encoded_as_a_cache_keeps_them(models):
    """In bf16, of states in the encoder's own precision, though training computes in another; none is remembered."""
    texts, cpu = ["red", "a dark blue", "red"], torch.device("cpu")
    encoders = load_encoders(models, models, 64, DataOptions(text_cache=False), cpu)
    with torch.autocast("cpu", torch.bfloat16):
        rows = encoders.embed(texts)
    assert not encoders.text_encoder.cache.embeddings._entries
    for row, state in zip(rows, encoders.text_encoder.encode(texts), strict=True):
        assert row.dtype == torch.bfloat16 and torch.equal(row, state.bfloat16()) and state.dtype == torch.float32
    assert load_encoders(models, models, 64, DataOptions(), cpu).embed is None


def test_a_teacher_fine_tuned_by_texts_saves_no_text_encoder(run, tmp_path):
    assert run(stage="teacher", no_text_cache=True) == 0
    state = torch.load(tmp_path / "out" / "teacher" / "state.pt", weights_only=True)
    assert {name.partition(".")[0] for name in state["modules"]["teacher"]} == {"transformer"}


@pytest.mark.parametrize("option", ["--buckets", "--no-buckets", "--text-cache", "--no-text-cache"])
def test_options_of_images_and_captions_are_of_those_recipes(option, tmp_path, caplog):
    for recipe in ("demo", "shapes", "demo-control"):
        assert command.main(["--recipe", recipe, "--out", str(tmp_path / "out"), option]) == 1
        assert f"--no-{option.replace('--no-', '--')[2:]}: of recipes that learn from your" in caplog.text
        caplog.clear()


def test_prompts_have_no_bins(run, tmp_path, caplog, no_step):
    (tmp_path / "prompts.txt").write_text("red")
    assert run(data=tmp_path / "prompts.txt", vae=None, set="distill.method=dmd", no_buckets=True) == 1
    assert "of recipes that learn from your images" in caplog.text


@pytest.mark.parametrize(("tangent", "stands_aside"), [("difference", False), ("jvp", True)])
def test_a_run_compiles_what_can_be_compiled(run, monkeypatch, caplog, tangent, stands_aside):
    """With PyTorch's compiler told to leave everything as it is, which is quicker."""
    networks_of, settings = [], torch._functorch.config.patch(donated_buffer=True)
    seen = lambda networks: networks_of.append(networks) or compile_blocks(networks)  # noqa: E731
    monkeypatch.setattr(published_run, "compile_blocks", seen)
    with settings, torch._dynamo.config.patch(disable=True, recompile_limit=8):
        assert run(compile=True, set=f"distill.tangent={tangent}") == 0
    assert all(block._compiled_call_impl for one in networks_of[0] for block in one.transformer_blocks)
    assert [len(networks) for networks in networks_of] == [1 if stands_aside else 2]
    assert ("--set distill.tangent=difference needs none" in caplog.text) == stands_aside


def test_the_same_again_trains_nothing_and_writes_the_same(run, tmp_path, monkeypatch):
    assert run() == 0
    path = tmp_path / "out" / "sana_tiny.safetensors"
    before = path.read_bytes()
    path.unlink()
    forbid(monkeypatch, Trainer, "_one_step")
    forbid(monkeypatch, Autoencoder, "encode")
    assert run() == 0
    assert path.read_bytes() == before


def test_the_teacher_stage_alone(run, tmp_path):
    assert run(stage="teacher") == 0
    weights = checkpoint.load(tmp_path / "out" / "sana_tiny_teacher.safetensors", layouts.TRANSFORMER)
    assert weights.config == standin.TEACHER
    start = standin.random_model(SanaTransformer(standin.TEACHER, device="meta"))
    moved = [name for name, tensor in weights.tensors.items() if not torch.equal(tensor, start[name].bfloat16())]
    assert len(moved) > len(start) / 2
    assert not (tmp_path / "out" / "distill").exists()


def test_every_layout_of_a_teacher_gives_the_same(run, models, tmp_path):
    """Its file says what it is, or, as with the authors' own, --time-scale does."""
    weights = checkpoint.load(models, layouts.TRANSFORMER)
    checkpoint.save(tmp_path / "native.safetensors", [weights], {})
    torch.save(keymaps.from_native(weights.tensors, layouts.transformer.NVLABS), tmp_path / "authors.pth")
    sources = {
        "folder": {"teacher": models},
        "native": {"teacher": tmp_path / "native.safetensors"},
        "authors": {"teacher": tmp_path / "authors.pth", "time_scale": 1},
    }
    results = []
    for name, options in sources.items():
        assert run(out=tmp_path / name, **options) == 0
        results.append(tensors(tmp_path / name / "sana_tiny.safetensors"))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(tensor, results[0][name]) for name, tensor in other.items())


@pytest.mark.parametrize("change", [{"time_scale": 1000.0}, {"qk_norm": False}])
def test_a_teacher_without_stabilisers_gets_them_first(run, change, tmp_path):
    config = dataclasses.replace(standin.TEACHER, **change)
    given = standin.make(tmp_path / "given", config)
    assert run(teacher=given) == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"teacher", "distill", "encoded", "sana_tiny.safetensors"}
    assert checkpoint.load(out / "sana_tiny.safetensors", layouts.TRANSFORMER).config == standin.TRANSFORMER
    before = (out / "sana_tiny.safetensors").read_bytes()
    assert run(teacher=given) == 0 and (out / "sana_tiny.safetensors").read_bytes() == before


def test_damaged_pictures_are_left_out_and_named(run, tmp_path, caplog):
    data = write_pictures(tmp_path / "data")
    write(data, {"half.png": plain()[:40], "half.txt": "half", "blank.png": plain(), "blank.txt": ""})
    assert run(data=data) == 0
    assert "1 of 4 images are damaged and left out: half.png" in caplog.text
    assert "1 of 5 images have no caption: blank.png" in caplog.text


# --- stabilisers ------------------------------------------------------------------------------------


def test_stabilising_a_stable_teacher_changes_nothing():
    teacher = transformer(standin.TEACHER)
    assert torch.equal(velocity(stabilised(teacher)), velocity(teacher))


def test_stabilisers_keep_the_weights_and_start_fresh():
    """What was there stays; norms without effect of their own are added, and the time is embedded as s."""
    teacher = transformer(SANA)
    stable = stabilised(teacher)
    assert is_stable(stable.config) and not is_stable(teacher.config)
    found, given = stable.state_dict(), teacher.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    fresh = found.keys() - given.keys()
    assert len(fresh) == 4 * SANA.depth and all(name.endswith(("norm_q.weight", "norm_k.weight")) for name in fresh)
    assert all((found[name] == 1).all() for name in fresh)
    same = SanaTransformer(dataclasses.replace(SANA, time_scale=1.0, qk_norm=True))
    same.load_state_dict(found)
    assert torch.equal(velocity(same), velocity(stable)) and not torch.equal(velocity(teacher), velocity(stable))


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"recipe": "sprint-7B"},
            "no recipe sprint-7B; there are demo, shapes, sprint-0.6B, sprint-1.6B, demo-control, shapes-control",
        ),
        ({"teacher": None, "text_encoder": None, "data": None}, "tiny needs --teacher, --text-encoder, --data"),
        ({"vae": None}, "tiny needs --vae"),
        ({"stage": "decoder"}, "--stage decoder: tiny has the stages teacher, distill"),
        ({"set": "distill.steps=0"}, "must be 1 or more"),
        ({"tracker": "wanda"}, "--tracker wanda: there are aim, clearml, comet_ml"),
        ({"gpu": "h100"}, "--gpu is of --dry-run"),
        ({"gpu": "9800gtx", "dry_run": True}, "--gpu 9800gtx: write it as h100 or 8xh100; known are a100, h100"),
        ({"gpu": "0xh100", "dry_run": True}, "--gpu 0xh100: write it as h100"),
        (
            {"compile": True, "recipe": "demo", "compare": True, "teacher": None},
            "--compile, --shard and --tracker are of one model",
        ),
        ({"device": "gpu"}, "--device gpu: "),
        ({"teacher": "missing.safetensors"}, "missing.safetensors: no such file"),
        ({"data": "missing"}, "missing: no such file or folder"),
    ],
)
def test_bad_options_are_refused(run, options, message, no_step, caplog, tmp_path):
    assert run(**options) == 1
    assert message in caplog.text and not (tmp_path / "out").exists()


def test_other_models_are_refused(run, models, no_step, caplog, tmp_path):
    """Each is named, with what to do."""
    large = standin.make(tmp_path / "large", dataclasses.replace(standin.TEACHER, depth=3))
    sprint = standin.make(tmp_path / "sprint")
    wide = standin.make(tmp_path / "wide", dataclasses.replace(standin.TEACHER, caption_width=96))
    config = dataclasses.replace(standin.AUTOENCODER, latent_channels=16)
    tensors = standin.random_model(Autoencoder(config, device="meta"))
    vae = checkpoint.Weights(layouts.AUTOENCODER, config, tensors, tmp_path)
    checkpoint.save(tmp_path / "vae.safetensors", [vae], {})
    refused = {
        f"{large}: width 64 and 3 blocks; tiny has 64 and 2: choose the recipe of that size": {"teacher": large},
        f"{sprint}: a SANA-Sprint is no teacher; give the multi-step model": {"teacher": sprint},
        f"{models}: embeddings of width 64; this teacher reads 96: choose the text encoder": {"teacher": wide},
        f"{tmp_path / 'vae.safetensors'}: a DC-AE f32c16; SANA's is f32c32": {"vae": tmp_path / "vae.safetensors"},
        "this is a DC-AE, not a SANA transformer": {"teacher": tmp_path / "vae.safetensors"},
    }
    for message, options in refused.items():
        caplog.clear()
        assert run(**options) == 1 and message in caplog.text, message
    assert not (tmp_path / "out").exists()


def test_pictures_that_cannot_be_used_are_refused(run, no_step, caplog, tmp_path):
    empty, bare = tmp_path / "empty", write(tmp_path / "bare", {"a.png": plain(), "b.png": plain()})
    empty.mkdir()
    nonsense = write(tmp_path / "nonsense", {"a.png": b"nonsense", "a.txt": "a"})
    refused = {
        f"{empty}: no images": empty,
        f"{bare}: 2 images, but not one has a caption: a caption belongs in NAME.txt": bare,
        "none of 1 images can be used: a.png (not an image)": nonsense,
    }
    for message, data in refused.items():
        assert run(data=data) == 1 and message in caplog.text, message


def test_a_folder_of_another_run_is_refused(run, tmp_path, caplog, monkeypatch):
    """Other settings, another teacher, other encoders; the folder stays as it was."""
    assert run() == 0
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    forbid(monkeypatch, Trainer, "_one_step")
    other = standin.make(tmp_path / "other", standin.TEACHER, seed=1)
    refused = {
        f"{out / 'distill'} holds another run": {"set": "distill.lr=1"},
        "choose another --out, or delete it": {"teacher": other},
        "made by another auto-encoder, text encoder or kind of edges": {"vae": other},
        f"choose another --out or delete {out / 'encoded'}": {"text_encoder": other},
    }
    for message, options in refused.items():
        caplog.clear()
        assert run(**options) == 1 and message in caplog.text, message
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("tiny", "estimated")
def test_too_little_memory_is_refused(run, no_step, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 1000)
    assert run() == 1
    assert "cpu has 0.0 GiB free; it needs" in caplog.text and "choose a device with more" in caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny", "estimated")
def test_only_the_stages_that_run_need_memory(run, monkeypatch):
    """Distilling takes a teacher and a critic more."""
    taken = {one.stage: one.state_bytes for one in known_estimates(recipes.RECIPES["tiny"])}
    assert taken["distill"] > taken["teacher"]
    monkeypatch.setattr(estimate, "free_bytes", lambda device: taken["teacher"])
    assert run(stage="teacher") == 0 and run() == 1
