"""The evaluation: Frechet distances against closed forms, judging on true pictures, files for the official scorers."""

import dataclasses
import json

import pytest
import standin
import torch
from PIL import Image
from shapes_model import EVALUATED, MODEL

from sprint_core.distill.stages import features as training
from sprint_core.evaluate import __main__ as evaluate
from sprint_core.evaluate import frechet, official, scoring, sheet
from sprint_core.models.transformer import SanaTransformer
from sprint_core.pipeline import Pipeline
from sprint_core.shapes import captions
from sprint_core.weights import checkpoint, layouts, presets
from sprint_core.weights.tensorfile import CheckpointError


def gaussian(n: int, mean: list[float], std: list[float], seed: int) -> torch.Tensor:
    noise = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = (noise - noise.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(noise.T.cov())).T  # exactly white
    return noise * torch.tensor(std).double() + torch.tensor(mean).double()


def test_frechet_is_the_closed_form_of_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances, in any rotation."""
    a, b = gaussian(100, [1.0, 0.0, 2.0], [1.0, 2.0, 0.5], 0), gaussian(80, [0.0, 0.0, 4.0], [3.0, 2.0, 1.0], 1)
    expected = 1 + 4 + (1 - 3) ** 2 + (0.5 - 1) ** 2
    assert frechet.frechet(a, b) == pytest.approx(expected, rel=1e-9)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).double())[0]
    assert frechet.frechet(a @ rotation, b @ rotation) == pytest.approx(expected, rel=1e-9)
    assert abs(frechet.frechet(a, a)) < 1e-9


def test_frechet_is_the_general_formula():
    """tr (A B)^(1/2) by the eigenvalues of the product, for covariances that do not commute."""
    generator = torch.Generator().manual_seed(3)
    a, b = (
        torch.randn(60, 4, generator=generator).double() @ torch.randn(4, 4, generator=generator).double() for _ in "ab"
    )
    root = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).sqrt().real.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * root
    assert frechet.frechet(a, b) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_refuses_too_few_pictures():
    with pytest.raises(ValueError, match="in 4 features needs 40 images or more; these are 39"):
        frechet.frechet(torch.zeros(39, 4), torch.zeros(100, 4))


def test_bundled_features_tell_scenes_apart():
    """The network answers held-out scenes, other pictures lie far, and it takes any size."""
    images, answers = training.examples(range(60), "test")
    network = frechet.FeatureNetwork(training.QUESTIONS)
    tensors = frechet.tensorfile.read(frechet.FILE).tensors
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    with torch.inference_mode():
        right = ((network(images) > 0) == (answers > 0.5)).float().mean()
    assert right >= 0.95
    extractor = frechet.bundled()
    # In batches of another size, which some CPUs' kernels add up in another order.
    torch.testing.assert_close(
        frechet.extract(extractor, images), network.features(images).double(), rtol=1e-4, atol=1e-4
    )
    assert extractor(images[:2, ::2, ::2]).shape == (2, frechet.WIDTH)
    assert frechet.FILE.stat().st_size <= 1e6


@pytest.fixture
def few(monkeypatch):
    """Let a Frechet distance be estimated from few pictures."""
    monkeypatch.setattr(frechet, "SAMPLES_PER_FEATURE", 1)


def test_true_pictures_score_full_and_near(few):
    """Pictures of other scenes with the same kinds of prompts: judged right, and a small distance away."""
    prompts, others = scoring.balanced_prompts(60, 0), scoring.balanced_prompts(60, 1)
    truth = {prompt.text: image for prompt, image in zip(others, sheet.true_images(others), strict=True)}
    paint = lambda texts, seeds: torch.stack([truth[text] for text in texts])  # noqa: E731
    good = scoring.score(paint, others, 0, "true")
    noise = lambda texts, seeds: torch.rand(len(texts), 256, 256, 3)  # noqa: E731
    bad = scoring.score(noise, others, 0, "noise")
    extractor = frechet.bundled()
    true = frechet.extract(extractor, sheet.true_images(prompts))
    result = scoring.summary({"true": good, "noise": bad}, prompts, extractor, true)
    assert good.share == 1.0 and bad.share == 0.0
    assert result["frechet"]["true"] < 0.2 * result["frechet"]["noise"]


def test_prompts_are_balanced_and_held_out():
    prompts = scoring.balanced_prompts(20, 3)
    assert [p.category for p in prompts[:6]] == list(captions.CATEGORIES) and len(prompts) == 20
    assert all(captions.split_of(p.requirement) == "test" for p in prompts)
    assert prompts == scoring.balanced_prompts(40, 3)[:20]


def test_command_line_judges_a_model_of_shapes(tmp_path, capsys, few):
    argv = [*EVALUATED, "--steps", "1,2", "--prompts", "36", "--grid", str(tmp_path / "grid.png")]
    assert evaluate.main(argv) == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert set(result["judge"]) == set(result["frechet"]) == {"1", "2"}
    assert set(result["categories"]) == set(captions.CATEGORIES)
    mean = sum(row["1"] for row in result["categories"].values()) / len(captions.CATEGORIES)
    assert mean == pytest.approx(result["judge"]["1"], abs=0.02)
    assert Image.open(tmp_path / "grid.png").width == 3 * 128
    assert any("counting" in line for line in out)


def test_teacher_is_judged_too(tmp_path):
    """Any multi-step model with the same latents and captions: here one with the student's own size."""
    pipeline = Pipeline.load(MODEL)
    config = dataclasses.replace(pipeline.transformer.config, guidance_embed=False)
    tensors = standin.random_model(SanaTransformer(config, device="meta"))
    part = checkpoint.Weights(layouts.TRANSFORMER, config, tensors, tmp_path, {"size_px": 256, "flow_shift": 5.0})
    checkpoint.save(tmp_path / "teacher.safetensors", [part], {})
    paint = scoring.teacher(tmp_path / "teacher.safetensors", pipeline, 3, 2.0)
    images = paint(["a red circle", "two blue crosses"], [0, 1])
    assert images.shape == (2, 256, 256, 3)
    assert torch.allclose(paint(["two blue crosses"], [1])[0], images[1], atol=1e-3)
    part.settings["guidance"] = 2.0  # the file's own holds, whatever others are guided by
    checkpoint.save(tmp_path / "teacher.safetensors", [part], {})
    again = scoring.teacher(tmp_path / "teacher.safetensors", pipeline, 3, 4.5)(["a red circle"], [0])
    torch.testing.assert_close(again[0], images[0], rtol=0, atol=1e-3)


def test_files_for_geneval(tmp_path):
    lines = [{"tag": "counting", "prompt": "two crosses"}, {"tag": "colors", "prompt": "a red circle"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--geneval", str(tmp_path / "metadata.jsonl"), "--out", str(tmp_path / "out"), "--steps", "1"]
    assert evaluate.main(argv) == 0
    for i, line in enumerate(lines):
        folder = tmp_path / "out" / "steps1" / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        assert sorted(file.name for file in (folder / "samples").iterdir()) == [f"{j:04d}.png" for j in range(4)]
    first = tmp_path / "out" / "steps1" / "00000" / "samples" / "0000.png"
    bytes_before = first.read_bytes()
    first.unlink()
    assert evaluate.main(argv) == 0 and first.read_bytes() == bytes_before  # only what is missing, the same again


def test_images_for_geneval_have_seeds_of_their_own(tmp_path):
    """Four of each prompt, from four seeds behind the one that was asked for."""
    (tmp_path / "metadata.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    calls = []

    def paint(texts, seeds):
        calls.append((texts[0], seeds[0]))
        return torch.zeros(1, 2, 2, 3)

    jobs = list(official.geneval_jobs(tmp_path / "metadata.jsonl", tmp_path / "out"))
    assert official.paint_files(paint, jobs, seed=10) == 8
    assert calls == [(text, 10 + j) for text in ("a cat", "a dog") for j in range(4)]


def test_files_for_mjhq(tmp_path):
    entries = {
        "ab1": {"category": "people", "prompt": "a red circle"},
        "cd2": {"category": "food", "prompt": "two crosses"},
    }
    (tmp_path / "meta_data.json").write_text(json.dumps(entries))
    argv = ["--mjhq", str(tmp_path / "meta_data.json"), "--out", str(tmp_path / "out"), "--steps", "1"]
    assert evaluate.main(argv) == 0
    assert (tmp_path / "out" / "steps1" / "people" / "ab1.png").is_file() and (
        tmp_path / "out" / "steps1" / "food" / "cd2.png"
    ).is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*EVALUATED, "--prompts", "40", "--steps", "1"], "needs 320 images or more"),
        (["--steps", "5"], "1 to 4 steps"),
        (["--steps", "one"], "write it as 1,2,4"),
        (["--model", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--geneval", "x.jsonl"], "need --out"),
        (["--inception", __file__], "not a TorchScript file"),
        (["--prompts", "0"], "at least 1"),
        (["--grid", "x.foo"], "name it .png"),
        (["--device", "nope"], "--device nope"),
        (["--teacher", str(presets.BUNDLED)], "not its teacher"),
    ],
)
def test_bad_input(argv, message, caplog):
    assert evaluate.main(argv) == 1
    assert message in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [("nonsense", "line 2: not JSON"), ('["a"]', "line 2: no prompt"), ('{"tag": "x"}', "line 2: no prompt")],
)
def test_bad_geneval_lines(tmp_path, text, message):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"prompt": "a cat"}}\n{text}\n')
    with pytest.raises(ValueError, match=message):
        list(official.geneval_jobs(path, tmp_path / "out"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_in_any_encoding_and_with_any_character(tmp_path, encoding):
    """Lines end at line feeds alone, with or without a carriage return before."""
    prompts = ["one\u2028two\x85three\u2029four", "ein Käfer 🐞"]
    lines = "\r\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    (tmp_path / "m.jsonl").write_bytes(lines.encode(encoding))
    jobs = list(official.geneval_jobs(tmp_path / "m.jsonl", tmp_path / "out"))
    assert [text for text, _, _ in jobs[::4]] == prompts
    row = json.loads((tmp_path / "out" / "00001" / "metadata.jsonl").read_bytes())
    assert row == {"prompt": prompts[1]}
    entries = {"ab1": {"category": "people", "prompt": prompts[0]}}
    (tmp_path / "m.json").write_bytes(json.dumps(entries, ensure_ascii=False).encode(encoding))
    assert next(official.mjhq_jobs(tmp_path / "m.json", tmp_path / "out"))[0] == prompts[0]


def test_prompts_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "m.jsonl").write_bytes('{"prompt": "ein Käfer"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"m\.jsonl: neither UTF-8 .*save it as UTF-8"):
        list(official.geneval_jobs(tmp_path / "m.jsonl", tmp_path / "out"))
    (tmp_path / "m.jsonl").write_text('{"prompt": "a"}\n{"prompt": "half \\ud83d"}')
    with pytest.raises(ValueError, match=r"line 2: its prompt holds half of a surrogate pair"):
        list(official.geneval_jobs(tmp_path / "m.jsonl", tmp_path / "out"))
    (tmp_path / "m.json").write_text('{"ab1": {"category": "a", "prompt": "half \\ud83d"}}')
    with pytest.raises(ValueError, match=r"m\.json: ab1: its prompt holds half"):
        list(official.mjhq_jobs(tmp_path / "m.json", tmp_path / "out"))


@pytest.mark.parametrize(("text", "message"), [("[1]", "JSON object"), ('{"a": {"prompt": "x"}}', "a has no prompt")])
def test_bad_mjhq_files(tmp_path, text, message):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(official.mjhq_jobs(path, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("../escaped", "a"),
        ("a", "../.."),
        ("a", ".."),
        ("/tmp/a", "b"),
        ("a", "C:"),
        ("a\\b", "c"),
        ("a", ""),
        ("a\0", "b"),
    ],
)
def test_names_in_mjhq_stay_in_the_folder(tmp_path, name, category):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({name: {"prompt": "a cat", "category": category}}))
    with pytest.raises(ValueError, match=r"m\.json: .* cannot name a file in a folder"):
        list(official.mjhq_jobs(path, tmp_path / "out"))


def test_many_prompts_return_with_other_scenes(monkeypatch):
    monkeypatch.setattr(scoring, "DIFFERENT", 5)
    prompts = scoring.balanced_prompts(100, 0)
    assert len(prompts) == 100 and len({prompt.scene for prompt in prompts}) > 60
    assert prompts[:30] == scoring.balanced_prompts(30, 0)


def test_user_inception(tmp_path):
    """A TorchScript network that takes bytes [b, 3, h, w] and returns features."""

    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return x.float().mean((2, 3))

    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(Plain()).save(str(tmp_path / "plain.pt"))
    with pytest.raises(CheckpointError, match="does not take bytes"):
        frechet.inception(tmp_path / "plain.pt")
    torch.jit.script(Mean()).save(str(tmp_path / "net.pt"))
    images = torch.rand(3, 8, 8, 3)
    found = frechet.inception(tmp_path / "net.pt")(images)
    assert (found - images.mean((1, 2)) * 255).abs().max() < 0.5
    with pytest.raises(CheckpointError):
        frechet.bundled(tmp_path / "none.safetensors")
