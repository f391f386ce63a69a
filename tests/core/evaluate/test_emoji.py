"""The evaluation of a model of emoji: true scenes score full, noise nothing, and the command line tells the world."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from sprint_core.distill.dataset import emoji_text
from sprint_core.distill.runs import shapes
from sprint_core.emoji import captions, templates
from sprint_core.emoji.concepts import common
from sprint_core.evaluate import __main__ as evaluate
from sprint_core.evaluate import contrastive, emoji, emoji_run, frechet, records
from sprint_core.pipeline import Pipeline
from sprint_core.text.encoder import TextEncoder
from sprint_core.weights import tensorfile
from sprint_core.weights.tensorfile import CheckpointError

SEED, COUNT = 3, 40
VOCABULARY = emoji_text.tokenizer()


@pytest.fixture(scope="module")
def pipeline(emoji_model):
    return Pipeline.load(emoji_model)


@pytest.fixture(scope="module")
def true():
    """Scenes of every prompt that an evaluation asks for, drawn by another seed than its own true ones."""
    prompts = captions.prompts(COUNT, SEED) + emoji.short_prompts(COUNT // 5, SEED)
    images = emoji.true_images(prompts, templates.load().art(), seed=99).float() / 255.0
    return {prompt.text: image for prompt, image in zip(prompts, images, strict=True)}


@pytest.fixture
def painters(true):
    """Truth at one step; noise at two."""
    blank = torch.zeros(256, 256, 3)
    return {
        "1": lambda texts, seeds: torch.stack([true.get(text, blank) for text in texts]),
        "2": lambda texts, seeds: torch.rand(len(texts), 256, 256, 3),
    }


class Lossless(Pipeline):
    """A model whose DC-AE lets all through."""

    def encode_image(self, image):
        return image

    def decode(self, x0):
        return x0


class Lossy(Lossless):
    """A model whose DC-AE loses every fourth image of a batch."""

    def decode(self, x0):
        return torch.where(torch.arange(len(x0))[:, None, None, None] % 4 == 0, 0.0, x0)


@pytest.fixture(scope="module")
def lossless(pipeline):
    return Lossless(**vars(pipeline))


def test_truth_scores_full_and_noise_nothing(lossless, painters):
    result, _, prompts = emoji_run.Evaluation(lossless, painters, COUNT, SEED).run()
    assert result["judge"] == {"1": 1.0, "2": 0.0} and result["ceiling"] == 1.0
    assert result["short_by_steps"] == {"1": 1.0, "2": 0.0} and result["short"] == 0.0
    assert result["shapes"] == {"1": 0.0, "2": 0.0}  # a blank image is no circle
    for name in ("one", "pair", "count", "place", "style", "ground", "nothing wrong"):
        assert result["rows"][name]["1"] == result["rows"][name]["true"] == 1.0
        assert result["rows"][name]["2"] == 0.0
    assert all(captions.split_of(prompt.requirement) == "test" for prompt in prompts)
    lines = emoji.table(result).splitlines()
    assert lines[0].split() == ["true", "ceiling", "1", "2"] and len(lines) == 1 + len(emoji.ROWS) + 3 + 2
    found = result["retrieval"]
    assert found["true"]["R@1"] == found["ceiling"]["R@1"] > 0.6 > 0.3 > found["2"]["R@5"] and found["1"]["R@1"] > 0.6


def test_a_share_is_over_the_ceiling(pipeline, painters):
    result, *_ = emoji_run.Evaluation(Lossy(**vars(pipeline)), {"1": painters["1"]}, COUNT, SEED).run()
    assert result["ceiling"] == 29 / 40  # of batches of 25 and 15
    assert result["judge"]["1"] == pytest.approx(40 / 29, abs=1e-4)


def test_frechet_distances_need_features_and_truth_of_this_world(lossless, painters, monkeypatch, tmp_path):
    """Of true art or of records made with it, not of thumbnails; the teacher's share is recorded, too."""
    monkeypatch.setattr(frechet, "SAMPLES_PER_FEATURE", 1)
    plain = emoji_run.Evaluation(lossless, painters, COUNT, SEED, records_file=tmp_path / "records.json")
    assert plain.run()[0]["frechet"] == {"ceiling": None, "1": None, "2": None}
    both = painters | {emoji_run.TEACHER: painters["1"]}
    full = dataclasses.replace(plain, painters=both, art=templates.load().art())
    measured = full.run(record=True)[0]
    assert measured["teacher20"] == 1.0 and set(measured["judge"]) == {"1", "2"}
    assert abs(measured["frechet"]["ceiling"]) < 1e-3 and measured["frechet"]["1"] < 0.2 * measured["frechet"]["2"]
    again = plain.run()[0]
    assert again["teacher20"] == 1.0 and again["frechet"]["1"] == pytest.approx(measured["frechet"]["1"], abs=1e-3)


def test_features_of_another_world_are_refused(tmp_path):
    path = tmp_path / "features.safetensors"
    contrastive.save(contrastive.ContrastiveNetwork(VOCABULARY.size), path, "")
    with pytest.raises(CheckpointError, match=r"features\.safetensors: features of the world of emoji, not of shapes"):
        frechet.bundled(path)
    with pytest.raises(CheckpointError, match=r"features\.safetensors: features of the world of shapes, not of emoji"):
        contrastive.load(frechet.FILE)


def test_damaged_records_are_told(tmp_path):
    path = tmp_path / "records.json"
    assert records.load(path) is None
    whole = {"teacher20": 0.9, "features": "ab", "mean": [0.0, 0.0], "covariance": [[1.0, 0.0], [0.0, 1.0]]}
    path.write_text(json.dumps(whole))
    assert records.load(path) == records.Records(**whole)
    changes = [{"mean": "x"}, {"mean": None}, {"mean": [0.0]}, {"covariance": [[1.0, 0.0], [0.0]]}, {"teacher20": "a"}]
    changes += [{"covariance": [[1.0, float("nan")], [0.0, 1.0]]}]
    for text in ("{", '{"teacher20": 1}', "[1]", *(json.dumps(whole | change) for change in changes)):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"records\.json: not records of an evaluation"):
            records.load(path)


FEATURES = {
    "without": lambda tensors: tensors.pop("convs.0.bias"),
    "empty": lambda tensors: tensors.clear(),
    "more": lambda tensors: tensors.update(more=torch.zeros(1)),
    "scalar": lambda tensors: tensors.update({"out.bias": torch.zeros(())}),
    "shape": lambda tensors: tensors.update({"hidden.bias": torch.zeros(7)}),
    "NaN": lambda tensors: tensors["hidden.bias"].fill_(torch.nan),
}


@pytest.mark.parametrize("damage", FEATURES)
def test_a_damaged_feature_network_is_told(tmp_path, damage):
    path, tensors = tmp_path / "features.safetensors", frechet.FeatureNetwork(3).state_dict()
    FEATURES[damage](tensors)
    tensorfile.write(path, tensors, {})
    says = "its tensor hidden.bias holds NaN" if damage == "NaN" else "its tensors are not those of a feature network"
    with pytest.raises(CheckpointError, match=rf"features\.safetensors: {says}.*; train it anew") as error:
        frechet.bundled(path)
    assert "\n" not in str(error.value)


def test_a_model_is_told_by_its_words(pipeline):
    assert emoji.is_known_to(pipeline)
    preset, gemma = pipeline.text_encoder.prompts.preset, pipeline.text_encoder.gemma
    of_shapes = TextEncoder(gemma, shapes.tokenizer(), preset)
    assert not emoji.is_known_to(dataclasses.replace(pipeline, text_encoder=of_shapes))


def test_short_prompts_are_bare_names():
    prompts = emoji.short_prompts(900, 0)
    assert len({prompt.requirement.concepts for prompt in prompts[:700]}) == 700
    assert prompts[:10] == emoji.short_prompts(10, 0) and len(prompts) == 900
    assert prompts[1].text.split()[-1] == emoji.concepts()[prompts[1].requirement.concepts[0]].names[0].split()[-1]


def test_command_line(emoji_model, tmp_path, capsys):
    """All of it on a model of random weights: nothing is right, and the last line is the document."""
    argv = ["--model", str(emoji_model), "--steps", "1,2", "--prompts", "5", "--grid", str(tmp_path / "grid.png")]
    assert evaluate.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert {"judge", "ceiling", "teacher20", "short", "shapes", "frechet"} <= set(result)
    assert result["judge"] == {"1": 0.0, "2": 0.0} and result["rows"]["all"]["true"] == 1.0
    assert any(line.startswith("pair") for line in lines)
    assert Image.open(tmp_path / "grid.png").width == 4 * 128


def test_the_bundled_model_is_of_this_world(capsys):
    """Asked for the things alone that it learnt; of bare names it paints more than half."""
    assert evaluate.main(["--steps", "2", "--prompts", "20"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["world"], result["concepts"]) == ("emoji", len(common())) and result["short"] > 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--record"], "needs --sprites and --teacher"),
        (["--sprites", "nowhere.zip"], "nowhere.zip: No such file"),
        (["--sprites", __file__], r"test_emoji.py"),
    ],
)
def test_bad_input(emoji_model, argv, message, caplog):
    assert evaluate.main(["--model", str(emoji_model), "--steps", "1", "--prompts", "5", *argv]) == 1
    assert message in caplog.text
