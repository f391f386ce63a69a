"""The recipe of plain shapes from nothing to a loaded model, a few steps long."""

import json
from pathlib import Path

import pytest
import torch

from sprint_core.distill import __main__ as command
from sprint_core.distill import recipes
from sprint_core.distill.dataset import scene_latents
from sprint_core.distill.dataset import scenes as data
from sprint_core.distill.engine.randomness import SampleRandom, initialise
from sprint_core.distill.runs import shapes
from sprint_core.pipeline import Pipeline
from sprint_core.shapes import captions, examples, judge, scenes
from sprint_core.weights import checkpoint, layouts

SETTINGS = [f"{stage}.{key}=2" for stage in recipes.SHAPES for key in ("steps", "batch")]
SETTINGS += ["distill.ladd_from=1", "teacher.precision=fp32", "distill.precision=fp32"]  # bf16 is slow on some CPUs
SHORT = recipes.override(recipes.RECIPES["shapes"], SETTINGS)


def whole(run: shapes.ShapesRun, folder: Path) -> list[Path]:
    """Every verb in turn: the files of the model."""
    autoencoder = run.train_autoencoder()
    latents = run.encode_dataset(autoencoder)
    teacher = run.train_teacher(run.train_text_encoder(), autoencoder, latents)
    student = run.train_student(teacher, autoencoder, latents)
    return run.export(student, teacher, autoencoder, folder, "the command")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(scene_latents, "SHARD", 4)


def test_from_nothing_to_an_image(tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr(captions, "CATEGORIES", captions.CATEGORIES[:1])  # of what is shown and watched meanwhile
    monkeypatch.setattr(shapes, "JUDGED", 2)
    run = shapes.ShapesRun(tmp_path, SHORT, pool=6)
    student, teacher = whole(run, tmp_path)
    assert student.stat().st_size < 12e6
    pipeline = Pipeline.load(student, dtype=torch.float32)
    assert pipeline.size_px == 256
    assert pipeline.text_encoder.prompts.preset == run.prompts.preset
    image = pipeline.generate(["a red circle"], seeds=[0], steps=1)
    assert image.shape == (1, 256, 256, 3)
    assert checkpoint.load(teacher, layouts.TRANSFORMER).config.guidance_embed is False
    again = whole(shapes.ShapesRun(tmp_path, SHORT, pool=6), tmp_path / "again")  # resumes: nothing is left to do
    assert again[0].read_bytes() == student.read_bytes()


def test_every_caption_has_its_own_tokens():
    words = shapes.tokenizer()
    ids = words.encode(" ".join(captions.VOCABULARY))
    assert len(set(ids)) == len(captions.VOCABULARY) + 1 and 3 not in ids  # BOS; 3 is unknown
    assert words.encode("A red, CIRCLE!") == words.encode("a red circle")
    longest = max((examples.scene_and_caption(seed)[1] for seed in range(500)), key=lambda text: len(text.split()))
    assert len(words.encode(longest)) <= shapes.MAX_TOKENS


def test_latents_resume_and_follow_the_autoencoder(tmp_path, small_shards, monkeypatch):
    model = shapes.Autoencoder(shapes.recipes.SHAPES_AUTOENCODER).eval()
    initialise(model, 0)
    first = scene_latents.encode_scenes(model, tmp_path, 6)
    assert first.latents.shape == (6, 32, 8, 8)
    encoded = []
    encode = scene_latents.latents_of
    counted = lambda model, seeds, draw: encoded.append(seeds) or encode(model, seeds, draw)  # noqa: E731
    monkeypatch.setattr(scene_latents, "latents_of", counted)
    (tmp_path / "latents_00001.safetensors").write_bytes(b"damaged")
    second = scene_latents.encode_scenes(model, tmp_path, 6)
    assert encoded == [range(4, 6)] and torch.equal(first.latents, second.latents)
    model.encoder.conv_out.bias.data.add_(1.0)
    scene_latents.encode_scenes(model, tmp_path, 6)
    assert encoded[1:] == [range(0, 4), range(4, 6)]
    batch = second.batch(SampleRandom(0, 0, "", range(3)))
    chosen = SampleRandom(0, 0, "", range(3)).integers(6).tolist()
    assert torch.equal(batch.latents, second.latents[chosen].float())
    for seed, caption in zip(chosen, batch.captions, strict=True):
        assert judge.judge(scenes.render(examples.scene_and_caption(seed)[0]), caption)
    again, others = (second.batch(SampleRandom(0, step, "", range(3))).captions for step in (0, 1))
    assert again == batch.captions != others


def test_the_text_encoder_starts_with_word_order():
    """Gemma multiplies its embeddings by sqrt(width): large ones would drown what the layers add."""
    model = shapes.fresh_gemma(0)
    words = {word: i for i, word in enumerate(captions.VOCABULARY, len(shapes.SPECIAL))}
    near, far = (
        torch.tensor([[words[w] for w in text.split()]]) for text in ("red and blue circle", "blue and red circle")
    )
    with torch.inference_mode():
        one, other = model(near)[0, -1], model(far)[0, -1]
    assert torch.cosine_similarity(one, other, dim=0) < 0.97


def test_images_are_the_scenes():
    drawn = data.images([3, 4])
    scene, _ = examples.scene_and_caption(4)
    expected = torch.from_numpy(scenes.render(scene)).movedim(-1, 0) / 127.5 - 1
    torch.testing.assert_close(drawn[1], expected.float())


def test_command_line(tmp_path, small_shards, capsys, caplog):
    short = [f"--set={setting}" for setting in SETTINGS]
    assert (
        command.main(["--recipe", "shapes", "--out", str(tmp_path), "--stage", "autoencoder", "--pool", "6", *short])
        == 0
    )
    files = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
    assert files == [str(tmp_path / "autoencoder.safetensors")]
    given = shapes.ShapesRun(tmp_path / "other", SHORT, pool=6, autoencoder=files[0]).train_autoencoder()
    own = shapes.ShapesRun(tmp_path, SHORT, pool=6).train_autoencoder()
    assert all(
        torch.equal(a, b.half().float())
        for a, b in zip(given.state_dict().values(), own.state_dict().values(), strict=True)
    )
    assert command.main(["--recipe", "shapes", "--out", str(tmp_path), "--set", "teacher.stepz=3"]) == 1
    assert "no setting stepz" in caplog.text
    assert command.main(["--recipe", "shapes", "--out", str(tmp_path), "--set", "steps=3"]) == 1
    assert "STAGE.KEY=VALUE" in caplog.text
    assert command.main(["--recipe", "shapes", "--out", str(tmp_path), "--stage", "autoencoder", "--pool", "6"]) == 1
    assert "another run" in caplog.text


def test_another_seed_is_another_run(tmp_path, caplog):
    """Of other first weights, and other images in each batch."""
    short = [
        *(f"--set={setting}" for setting in SETTINGS),
        "--recipe",
        "shapes",
        "--stage",
        "captioning",
        "--pool",
        "6",
    ]
    weights = []
    for folder, seed in (("default", []), ("0", ["--seed", "0"]), ("1", ["--seed", "1"])):
        assert command.main([*short, "--out", str(tmp_path / folder), *seed]) == 0
        state = torch.load(tmp_path / folder / "captioning" / "state.pt", weights_only=True)
        weights.append(next(value for value in state["average"].values() if value.ndim == 2))
    assert torch.equal(weights[0], weights[1])
    assert float((weights[0] - weights[2]).norm() / weights[0].norm()) > 0.5
    assert command.main([*short, "--out", str(tmp_path / "1")]) == 1
    assert "another run" in caplog.text
