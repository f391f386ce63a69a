"""Edges: kornia for the pieces, closed forms for the whole, HED layer by layer, scribbles by their definition."""

import kornia
import numpy as np
import pytest
import standin
import torch
import torch.nn.functional as F
from oracles import randn

from sprint_core.images import edges
from sprint_core.models import hed
from sprint_core.weights.checkpoint import CheckpointError


def picture(height: int = 40, width: int = 56, seed: int = 1) -> torch.Tensor:
    """A smooth random picture [2, h, w, 3]."""
    coarse = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1).movedim(1, -1)


def step(low: float, high: float, px: int = 512) -> torch.Tensor:
    """A picture [1, 3, px, px], dark on the left."""
    image = torch.full((1, 3, px, px), low)
    image[..., px // 2 :] = high
    return image


# --- pieces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
def test_blur_is_kornias(sigma):
    x = randn(2, 3, 20, 30)
    size = len(edges._gaussian(sigma))
    want = kornia.filters.gaussian_blur2d(x, (size, size), (sigma, sigma), border_type="replicate")
    assert torch.allclose(edges.blur(x, sigma), want, atol=1e-6)


def test_sobel_is_kornias():
    x = randn(2, 3, 20, 30)
    want = kornia.filters.sobel(x, normalized=True, eps=0.0)
    assert torch.allclose(edges.sobel(x), want, atol=1e-6)


def test_small_pictures():
    for size in ((1, 1), (1, 64), (33, 2)):
        for scribble in (False, True):
            drawn = edges.detect(torch.rand(1, *size, 3), scribble=scribble)
            assert drawn.shape == (1, *size, 3) and drawn.isfinite().all()


# --- soft edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("px", [128, 512])
@pytest.mark.parametrize("height", [0.1, 0.5, 1.0])
def test_a_step_becomes_an_edge_of_its_height(height, px):
    """Whatever the scale, the gradient of a step is normalised to its height: 1 - exp(-height / contrast)."""
    drawn = edges.soft_edges(step(0.0, height, px))[0, px // 2]
    assert drawn.max().item() == pytest.approx(1 - np.exp(-height / edges.CONTRAST), abs=1e-4)
    assert drawn.argmax().item() in (px // 2 - 1, px // 2)
    assert drawn[: px // 4].max() == 0


def test_properties():
    image = picture()
    drawn = edges.detect(image)
    assert drawn.shape == image.shape and drawn.min() >= 0 and drawn.max() <= 1
    assert torch.equal(drawn[..., 0], drawn[..., 2])
    assert torch.allclose(edges.detect(1 - image), drawn, atol=1e-5)
    assert torch.allclose(edges.detect(image.flip(2)), drawn.flip(2), atol=1e-5)
    assert torch.allclose(edges.detect(image.transpose(1, 2)), drawn.transpose(1, 2), atol=1e-5)
    assert torch.allclose(edges.detect(image[1:]), drawn[1:], atol=1e-6)
    assert edges.detect(torch.full((1, 64, 64, 3), 0.3)).abs().max() == 0


def test_edges_of_colours_of_equal_brightness():
    image = torch.zeros(1, 3, 128, 128)
    image[:, 0, :, :64], image[:, 2, :, 64:] = 0.8, 0.8
    assert edges.soft_edges(image).max() > 0.9


def test_large_pictures_are_looked_at_smaller():
    """Edges of the enlarged picture are the enlarged edges, not finer ones."""
    image = picture(512, 512)
    large = F.interpolate(image.movedim(-1, 1), scale_factor=2, mode="bilinear").movedim(1, -1)
    want = F.interpolate(edges.detect(image).movedim(-1, 1), scale_factor=2, mode="bilinear").movedim(1, -1)
    assert (edges.detect(large) - want).abs().mean() < 0.01
    assert edges.detect(large, resolution=1024).shape == large.shape


# --- scribbles --------------------------------------------------------------------------------------


def test_ridges_by_definition():
    """A pixel is on a ridge if it is the highest of three in a row, in one of four directions."""
    x = randn(1, 1, 9, 11)
    padded = np.pad(x[0, 0].numpy(), 1, mode="edge")
    want = np.zeros((9, 11), dtype=bool)
    for i in range(9):
        for j in range(11):
            around = padded[i : i + 3, j : j + 3]
            lines = (around[1], around[:, 1], np.diag(around), np.diag(around[:, ::-1]))
            want[i, j] = any(line.max() == around[1, 1] for line in lines)
    assert np.array_equal(edges._is_ridge(x)[0, 0].numpy(), want)


def test_a_scribble_is_a_line_of_even_width():
    drawn = edges.scribbled(edges.soft_edges(step(0.0, 1.0)))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    widths = drawn[0, 50:-50].sum(-1)
    assert widths.min() == widths.max() and 10 <= widths[0] <= 30  # px of 512
    assert edges.scribbled(torch.zeros(1, 64, 64)).max() == 0


# --- HED --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hed_tensors():
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in hed.HED().state_dict().items()}
    return standin.random_tensors(shapes)


@pytest.fixture
def hed_file(tmp_path, hed_tensors):
    torch.save(hed_tensors, tmp_path / "ControlNetHED.pth")
    return tmp_path / "ControlNetHED.pth"


def test_published_names(hed_tensors):
    """As ControlNetHED.pth has them, from the table of its network: 13 convolutions, 5 projections and the mean."""
    channels = [3, 64, 128, 256, 512, 512]
    want = {"norm": (1, 3, 1, 1)}
    for i, layers in enumerate((2, 2, 3, 3, 3), 1):
        for j in range(layers):
            want[f"block{i}.convs.{j}.weight"] = (channels[i], channels[i - 1] if j == 0 else channels[i], 3, 3)
            want[f"block{i}.convs.{j}.bias"] = (channels[i],)
        want[f"block{i}.projection.weight"], want[f"block{i}.projection.bias"] = (1, channels[i], 1, 1), (1,)
    assert {name: tuple(tensor.shape) for name, tensor in hed_tensors.items()} == want


def test_hed_by_its_definition(hed_file, hed_tensors):
    image = picture(40, 56)
    x, maps = 255.0 * image.movedim(-1, 1) - hed_tensors["norm"], []
    for i, layers in enumerate((2, 2, 3, 3, 3), 1):
        x = F.max_pool2d(x, 2, 2) if i > 1 else x
        for j in range(layers):
            name = f"block{i}.convs.{j}"
            x = F.relu(F.conv2d(x, hed_tensors[f"{name}.weight"], hed_tensors[f"{name}.bias"], padding=1))
        name = f"block{i}.projection"
        edge = F.conv2d(x, hed_tensors[f"{name}.weight"], hed_tensors[f"{name}.bias"])
        maps.append(F.interpolate(edge, (40, 56), mode="bilinear", align_corners=False))
    want = torch.stack(maps).mean(0)[:, 0].sigmoid()
    model = edges.load_hed(hed_file)
    assert torch.allclose(model(image.movedim(-1, 1)), want, atol=1e-5)
    assert torch.allclose(edges.detect(image, model)[..., 1], want, atol=1e-5)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: t.pop("block3.projection.bias"), "block3.projection.bias"),
        (lambda t: t.update({"block1.convs.0.weight": torch.zeros(64, 4, 3, 3)}), "block1.convs.0.weight"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "extra"),
    ],
)
def test_files_that_are_not_hed(tmp_path, hed_tensors, change, named):
    tensors = dict(hed_tensors)
    change(tensors)
    torch.save(tensors, tmp_path / "hed.pth")
    with pytest.raises(CheckpointError, match=rf"hed\.pth: not the HED network.*1 tensors.*the first {named}"):
        edges.load_hed(tmp_path / "hed.pth")
