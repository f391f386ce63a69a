"""TAESANA: against its layers written out, its files in every form, and bad ones."""

import pytest
import safetensors.torch
import torch
from torch import nn

from sprint_core.models.tiny_autoencoder import HALVES, TinyAutoencoder
from sprint_core.weights import checkpoint
from sprint_core.weights.tensorfile import CheckpointError

SCALE = 0.41407


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TinyAutoencoder().eval().requires_grad_(False)


@pytest.fixture
def files(model, tmp_path):
    """The two published files."""
    for half in HALVES:
        torch.save(getattr(model, half).state_dict(), tmp_path / f"taesana_{half}.pth")
    return tmp_path


def layers(state: dict, plan: str, x: torch.Tensor) -> torch.Tensor:
    """The published networks, layer by layer: c conv, s conv of stride 2, r ReLU, b block, u upsample, t bend."""
    conv = nn.functional.conv2d

    def at(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return conv(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride=stride, padding=1)

    for i, kind in enumerate(plan):
        if kind == "b":
            y = at(f"{i}.conv.4", at(f"{i}.conv.2", at(f"{i}.conv.0", x).relu()).relu())
            x = (y + x).relu()
        elif kind == "u":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif kind in "cs":
            x = at(str(i), x, "cs".index(kind) + 1)
        else:
            x = x.relu() if kind == "r" else (x / 3).tanh() * 3
    return x


def test_against_the_layers_written_out(model):
    image, latent = torch.rand(2, 3, 64, 96) * 2 - 1, torch.randn(2, 32, 2, 3) * 4
    encoded = layers(model.encoder.state_dict(), "srsrb" + "sbbb" * 3 + "c", image / 2 + 0.5) / SCALE
    decoded = layers(model.decoder.state_dict(), "tcr" + "bbbuc" * 5 + "bc", latent * SCALE) * 2 - 1
    torch.testing.assert_close(model.encode(image), encoded, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(latent), decoded, rtol=0, atol=1e-5)
    assert model.encode(image).shape == (2, 32, 2, 3) and model.decode(latent).shape == (2, 3, 64, 96)
    results = model.encode(image), model.decode(latent)
    assert all(result.is_contiguous(memory_format=torch.channels_last) for result in results)


def test_size_of_the_published_networks(model):
    assert [sum(p.numel() for p in getattr(model, half).parameters()) for half in HALVES] == [1_256_288, 8_301_763]


@pytest.mark.parametrize("name", ["taesana_encoder.pth", "taesana_decoder.pth"])
def test_the_two_files_find_each_other(model, files, name):
    loaded = checkpoint.load_tiny(files / name)
    assert loaded.config.halves == HALVES
    latent = torch.randn(1, 32, 2, 2)
    assert torch.equal(checkpoint.build(loaded).decode(latent), model.decode(latent))


def test_containers_may_differ(model, files):
    safetensors.torch.save_file(model.encoder.state_dict(), files / "taesana_encoder.safetensors")
    (files / "taesana_encoder.pth").unlink()
    assert checkpoint.load_tiny(files / "taesana_decoder.pth").config.halves == HALVES


@pytest.mark.parametrize("half, lost", [HALVES, HALVES[::-1]])
def test_one_half_alone(files, half, lost):
    (files / f"taesana_{lost}.pth").unlink()
    alone = checkpoint.build(checkpoint.load_tiny(files / f"taesana_{half}.pth"))
    image, latent = torch.rand(1, 3, 64, 64), torch.randn(1, 32, 2, 2)
    works, fails = (alone.encode, alone.decode)[:: 1 if half == "encoder" else -1]
    given = (image, latent)[:: 1 if half == "encoder" else -1]
    assert works(given[0]).isfinite().all()
    with pytest.raises(ValueError, match=rf"no {lost}: put taesana_{lost}\.pth beside it"):
        fails(given[1])


@pytest.mark.parametrize("prefix", ["", "taesana_", "taesd_"])
def test_both_in_one_file(model, tmp_path, prefix):
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "tiny.safetensors")
    assert checkpoint.load_tiny(tmp_path / "tiny.safetensors").config.halves == HALVES


def test_by_tiles(model):
    image, latent = torch.rand(1, 3, 128, 128) * 2 - 1, torch.randn(1, 32, 4, 4)
    assert torch.equal(model.decode_tiled(latent), model.decode(latent))
    tiled = model.decode_tiled(latent, tile_px=96, overlap_px=64)
    assert tiled.shape == (1, 3, 128, 128) and (tiled - model.decode(latent)).abs().mean() < 0.05
    assert model.encode_tiled(image, tile_px=96, overlap_px=64).shape == (1, 32, 4, 4)


def test_other_files_are_none(tmp_path):
    """ComfyUI's TAESD has the same names, with 4 or 16 channels; folders hold no TAESANA."""
    safetensors.torch.save_file({"1.weight": torch.zeros(64, 4, 3, 3)}, tmp_path / "taesd_decoder.safetensors")
    safetensors.torch.save_file({"0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "taesd_encoder.safetensors")
    for path in (*tmp_path.iterdir(), tmp_path):
        assert checkpoint.load_tiny(path) is None


def test_damaged_files(model, tmp_path):
    state = model.decoder.state_dict()
    state["3.conv.0.weight"] = torch.zeros(1)
    del state["29.weight"]
    state["99.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "taesana_decoder.pth")
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_tiny(tmp_path / "taesana_decoder.pth")
    for part in ("taesana_decoder.pth", "decoder.29.weight", "decoder.3.conv.0.weight", "decoder.99.weight"):
        assert part in str(error.value)
    torch.save({"0.weight": torch.zeros(3)}, tmp_path / "taesana_encoder.pth")
    torch.save(model.decoder.state_dict(), tmp_path / "taesana_decoder.pth")
    with pytest.raises(CheckpointError, match=r"taesana_encoder\.pth: not a TAESANA encoder"):
        checkpoint.load_tiny(tmp_path / "taesana_decoder.pth")


@pytest.mark.parametrize("shape", [(1, 3, 33, 64), (1, 4, 64, 64), (3, 64, 64)])
def test_images_of_other_shapes(model, shape):
    with pytest.raises(ValueError, match="image must be"):
        model.encode(torch.zeros(shape))
