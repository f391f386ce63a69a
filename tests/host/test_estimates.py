"""What our objects tell ComfyUI that they need, against what the full-size networks hold at their peak.

On the meta device, where nothing is computed but every tensor has its size: each is made whole, and norms in single
operations, as on a device that has no better. Kernels' own buffers are not seen.
"""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sprint_core.models.autoencoder import Autoencoder
from sprint_core.models.gemma import Gemma, GemmaConfig
from sprint_core.models.tiny_autoencoder import TinyAutoencoder
from sprint_core.models.transformer import SanaTransformer
from sprint_core.weights import presets

LOWEST, HIGHEST = 0.6, 3.2  # of an estimate, as a share of the peak
DTYPES = (torch.bfloat16, torch.float32)


class Activations(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive among those made under it; `peak` is the most at a time."""

    def __init__(self):
        super().__init__()
        self.peak, self.total, self.alive = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)):
            if storage._cdata not in inputs and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.total += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.total)
        return result

    def forget(self, storage: int) -> None:
        self.total -= self.alive.pop(storage)


def peak_of(run, *shapes, dtype: torch.dtype) -> int:
    inputs = [torch.empty(shape, device="meta", dtype=dtype) for shape in shapes]
    with Activations() as activations:
        run(*inputs)
    return activations.peak


def test_peaks_count_what_is_alive():
    """A 4 MB input is not counted; two results of 4 MB are alive at once."""
    assert peak_of(lambda x: (x + 1).mul(2).sum(), (1000, 1000), dtype=torch.float32) == 8_000_000
    assert peak_of(lambda x: x.view(-1)[:5], (1000, 1000), dtype=torch.float32) == 0


@pytest.fixture(scope="module")
def tiny_vae(host):
    """A TAESANA, whole in one file."""
    path = host.base / "taesana.pth"
    torch.save(TinyAutoencoder().state_dict(), path)
    return host.pack("nodes.adapters.vae").load_vae(path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Autoencoder, TinyAutoencoder])
def test_estimate_of_a_vae(vae, tiny_vae, kind, dtype):
    network, cells, hosted = kind(dtype=dtype, device="meta"), 16, vae if kind is Autoencoder else tiny_vae
    image, latent = (1, 3, 32 * cells, 32 * cells), (1, 32, cells, cells)
    for estimate, run, shape in (
        (hosted.memory_used_encode, network.encode, image),
        (hosted.memory_used_decode, network.decode, latent),
    ):
        assert LOWEST <= estimate(shape, dtype) / peak_of(run, shape, dtype=dtype) <= HIGHEST


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sprint-0.6B", "sprint-1.6B"])
def test_estimate_of_a_model(model, monkeypatch, name, dtype):
    """As ComfyUI asks on a GPU, where attention needs no scores; at 1024 px, with a prompt of 300 tokens."""
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "pytorch_attention_flash_attention", lambda: True)
    monkeypatch.setattr(model.model, "get_dtype_inference", lambda: dtype)
    config = presets.PRESETS[name].transformer
    network, latent = SanaTransformer(config, dtype=dtype, device="meta"), (1, 32, 32, 32)

    def run(x, caption):
        one = torch.empty(1, device="meta")
        network(x, one, caption, one)

    peak = peak_of(run, latent, (1, 300, config.caption_width), dtype=dtype)
    assert LOWEST <= model.memory_required(list(latent)) / peak <= HIGHEST


@pytest.mark.parametrize("dtype", DTYPES)
def test_estimate_of_a_text_encoder(clip, dtype):
    """Ten to thirty times what is needed: as generous as ComfyUI's estimates for its own language models."""
    gemma, tokens = Gemma(GemmaConfig(), dtype=dtype, device="meta"), 450
    peak = peak_of(lambda ids: gemma(ids.long()), (1, tokens), dtype=dtype)
    estimate = clip.cond_stage_model.memory_estimation_function({"gemma2_2b": [[(0, 1.0)] * tokens]})
    assert 10 <= estimate / peak <= 30
