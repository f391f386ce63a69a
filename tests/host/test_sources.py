"""Model files are ComfyUI's to open where its dynamic VRAM streams from them."""

import pytest
import safetensors.torch
import torch


@pytest.fixture
def sources(host):
    return host.pack("nodes.adapters.sources")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.safetensors"
    safetensors.torch.save_file({"a": torch.arange(6.0).view(2, 3)}, path, metadata={"of": "mine"})
    return path


@pytest.fixture
def comfyui(host, monkeypatch):
    """Set what ComfyUI believes: comfyui(whether dynamic VRAM is on, its load_torch_file)."""
    import comfy.memory_management
    import comfy.utils

    def believe(dynamic, load):
        monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", dynamic)
        monkeypatch.setattr(comfy.utils, "load_torch_file", load)

    return believe


def test_opened_once_and_by_comfyui(sources, file, comfyui):
    asked = []
    comfyui(True, lambda path, **_: asked.append(path) or {"a": torch.full((2, 3), 7.0)})
    source = sources.opened(file)
    assert sources.opened(source) is source
    read = source.read(file)
    assert asked == [str(file)] and read.tensors["a"].eq(7).all() and read.metadata == {"of": "mine"}


@pytest.mark.parametrize("dynamic", [True, False])
def test_else_as_they_are(sources, file, comfyui, dynamic):
    """Without dynamic VRAM, and with numbers that ComfyUI does not know."""

    def unknown(*_, **__):
        raise KeyError("F4")

    comfyui(dynamic, unknown)
    assert torch.equal(sources.opened(file).read(file).tensors["a"], torch.arange(6.0).view(2, 3))


def test_damage_is_found_before_comfyui_opens_it(sources, file, host, comfyui):
    comfyui(True, lambda path, **_: pytest.fail("opened"))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(host.pack("sprint_core.weights.tensorfile").CheckpointError, match="truncated"):
        sources.opened(file).read(file)
