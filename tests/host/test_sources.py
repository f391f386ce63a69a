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


@pytest.mark.parametrize(
    ("dynamic", "fault"), [(False, KeyError("F4")), (True, KeyError("F4")), (True, RuntimeError("not initialized"))]
)
def test_else_as_they_are(sources, file, comfyui, dynamic, fault):
    """Without dynamic VRAM, with numbers that ComfyUI does not know, and where comfy-aimdo fails."""

    def fail(*_, **__):
        raise fault

    comfyui(dynamic, fail)
    assert torch.equal(sources.opened(file).read(file).tensors["a"], torch.arange(6.0).view(2, 3))


def test_a_safetensors_file_of_another_name(sources, file, comfyui, tmp_path):
    """ComfyUI would unpickle it."""
    comfyui(True, lambda path, **_: pytest.fail("opened"))
    named = file.rename(tmp_path / "some.pth")
    assert torch.equal(sources.opened(named).read(named).tensors["a"], torch.arange(6.0).view(2, 3))


def test_damage_is_found_before_comfyui_opens_it(sources, file, host, comfyui):
    comfyui(True, lambda path, **_: pytest.fail("opened"))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(host.pack("sprint_core.weights.tensorfile").CheckpointError, match="truncated"):
        sources.opened(file).read(file)
