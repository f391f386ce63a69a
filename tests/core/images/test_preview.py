"""Colours of latents: the fit against a known map, its file, and what loaders make of it."""

import json
import shutil

import pytest
import standin
import torch
from PIL import Image

from sprint_core import convert, pipeline
from sprint_core.emoji import scenes as emoji_scenes
from sprint_core.emoji import templates
from sprint_core.images import preview
from sprint_core.images.preview import Factors, RGBFit
from sprint_core.shapes import examples, scenes
from sprint_core.weights import checkpoint, layouts, presets
from sprint_core.weights.checkpoint import Source
from sprint_core.weights.tensorfile import CheckpointError

SCALE = 0.41407


@pytest.fixture
def vae(tmp_path):
    return shutil.copytree(standin.make(tmp_path / "models") / "vae", tmp_path / "vae")


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for i in range(12):
        drawn = Image.fromarray(scenes.render(examples.scene_and_caption(i)[0]))
        drawn.save(tmp_path / "pictures" / ("more" if i % 2 else "") / f"{i}.png")
    return tmp_path / "pictures"


def fit(*words) -> int:
    return convert.main(["--fit-preview", *map(str, words)])


def test_a_linear_world_is_found():
    """Pictures that are linear in their latents: the fit finds the map, and improves with what it sees."""
    found, generator = RGBFit(), torch.Generator().manual_seed(0)
    rows, bias = torch.randn(32, 3, generator=generator) * 0.02, torch.tensor([0.1, -0.2, 0.0])
    errors = []
    for _ in range(3):
        latent = torch.randn(1, 32, 16, 16, generator=generator) / SCALE
        colours = (latent.movedim(1, -1) * SCALE) @ rows + bias
        image = (colours / 2 + 0.5).repeat_interleave(32, 1).repeat_interleave(32, 2)
        found.observe(latent, image)
        errors.append(float((torch.tensor(found.factors().rows) - rows).abs().max()))
    assert errors[-1] < 1e-3 and errors[-1] <= errors[0]
    torch.testing.assert_close(torch.tensor(found.factors().bias), bias, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.factors().paint(latent), (colours / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-3)
    assert found.explained() == pytest.approx(1, abs=1e-4) and found.cells == 768


def test_what_cannot_be_explained():
    """Colours that have nothing to do with latents: a share of about 0, and the bias is their mean."""
    found, generator = RGBFit(), torch.Generator().manual_seed(0)
    image = torch.rand(1, 64, 64, 3, generator=generator).repeat_interleave(32, 1).repeat_interleave(32, 2)
    found.observe(torch.randn(1, 32, 64, 64, generator=generator), image)
    assert 0 <= found.explained() < 0.03
    assert found.factors().bias == pytest.approx([0, 0, 0], abs=0.05)


def test_the_bundled_model_has_its_colours():
    """Fitted on its scenes: a preview looks like the picture, as small as it is."""
    factors = preview.find(Source(presets.BUNDLED))
    model = pipeline.Pipeline.load(presets.BUNDLED).autoencoder
    drawn = emoji_scenes.pack([emoji_scenes.scene_and_caption(seed, "test")[0] for seed in range(20)])
    image = emoji_scenes.paint(drawn, templates.load().art()).float() / 255
    painted = factors.paint(model.encode(image * 2 - 1)).movedim(-1, 1)
    true = torch.nn.functional.avg_pool2d(image, 32)
    assert (painted - true).square().mean() < 0.3 * (true - true.mean((0, 2, 3), keepdim=True)).square().mean()


def test_fitting_on_pictures(vae, pictures, capsys):
    assert fit(vae, pictures) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["pictures"], result["cells"], result["file"]) == (12, 12 * 64, str(vae / "vae.preview.json"))
    model = checkpoint.build(checkpoint.load(vae, layouts.AUTOENCODER), dtype=torch.float32)
    expected = RGBFit()
    with torch.inference_mode():
        for file in sorted(pictures.rglob("*.png")):
            image = preview._read_image(file)
            expected.observe(model.encode(image), (image.movedim(1, -1) + 1) / 2)
    assert preview.find(Source(vae)) == expected.factors()
    assert result["explained"] == pytest.approx(expected.explained(), abs=1e-4)
    assert fit(vae, pictures) == 1 and fit(vae, pictures, "--force") == 0


def test_of_a_single_file_and_of_a_pipeline(vae, pictures, tmp_path):
    assert convert.main([str(vae), str(tmp_path / "one.safetensors")]) == 0
    assert preview.find(Source(tmp_path / "one.safetensors")) is None
    assert fit(tmp_path / "one.safetensors", pictures) == 0
    assert preview.find(Source(tmp_path / "one.safetensors")) is not None
    folder = standin.make(tmp_path / "whole")
    assert preview.find(Source(folder)) is None
    assert fit(folder, pictures) == 0
    assert preview.find(Source(folder)) == preview.find(Source(folder / "vae")) is not None
    assert preview.find(Source(folder / "transformer")) is None


def test_pictures_of_any_size(tmp_path):
    for size, px in {(1500, 700): (512, 224), (40, 33): (32, 32), (10, 900): (32, 512)}.items():
        Image.new("RGB", size, "red").save(tmp_path / "x.png")
        picture = preview._read_image(tmp_path / "x.png")
        assert picture.shape == (1, 3, px[1], px[0])
        assert picture[0, :, 0, 0].tolist() == pytest.approx([1, -1, -1])


def test_bad_input(vae, pictures, tmp_path, caplog):
    def refused(*words) -> str:
        assert fit(*words) == 1
        return caplog.records[-1].getMessage()

    (tmp_path / "empty").mkdir()
    assert "no folder with images" in refused(vae, tmp_path / "empty")
    assert "no folder with images" in refused(vae, tmp_path / "none")
    assert "no such file" in refused(tmp_path / "none.safetensors", pictures)
    for file in sorted(pictures.rglob("*.png"))[1:]:
        file.unlink()
    assert "have 64 cells" in refused(vae, pictures) and not list(vae.glob("*preview*"))
    (pictures / "bad.png").write_bytes(b"\x89PNG")
    assert "bad.png: not an image" in refused(vae, pictures)


@pytest.mark.parametrize(
    "content", ["{}", '{"rows": [[1, 2, 3]], "bias": [0, 0, 0]}', "[]", '{"rows": 1, "bias": null}', "nothing"]
)
def test_a_damaged_fit(vae, content):
    (vae / "vae.preview.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"vae\.preview\.json"):
        preview.find(Source(vae))


def test_factors_are_checked():
    rows = [[0.0] * 3] * 32
    assert Factors(rows, [0, 0, 0]).bias == (0.0, 0.0, 0.0)
    for wrong in ((rows, [0, 0]), (rows[:-1], [0, 0, 0]), (rows, [0, 0, float("nan")])):
        with pytest.raises(ValueError, match=r"expected|finite"):
            Factors(*wrong)
