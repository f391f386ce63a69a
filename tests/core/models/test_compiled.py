"""torch.compile: the networks are one graph each, and what they compute stays."""

import pytest
import torch

from sprint_core.models import compiled
from sprint_core.weights import checkpoint, layouts
from sprint_core.weights.presets import BUNDLED, BUNDLED_CONTROL

LIMIT = 1e-4


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bundled(kind):
    return checkpoint.build(
        checkpoint.load(BUNDLED_CONTROL if kind == "controlnet" else BUNDLED, layouts.PARTS[kind]), dtype=torch.float32
    )


def calls(device):
    """Every network's call, at two sizes: (network, arguments of the first, of the second)."""
    networks = (bundled(kind).to(device) for kind in ("transformer", "controlnet", "autoencoder"))
    transformer, net, autoencoder = networks

    def latent(side):
        return torch.randn(1, 32, side, side, device=device)

    caption, one = torch.randn(1, 12, transformer.config.caption_width, device=device), torch.ones(1, device=device)
    yield "transformer", transformer, *((latent(n), one, caption, 4.5 * one) for n in (4, 6))
    yield "controlnet", net, *((latent(n), one, caption, latent(n), 4.5 * one) for n in (4, 6))
    yield "encoder", autoencoder.encoder, *((torch.randn(1, 3, 32 * n, 32 * n, device=device),) for n in (4, 6))
    yield "decoder", autoencoder.decoder, *((latent(n),) for n in (4, 6))


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
@torch.inference_mode()
def test_every_network_is_one_graph(device):
    """Without a break, which fullgraph refuses: CUDA graphs need that, and fused kernels end at each."""
    for name, network, first, second in calls(device):
        expected = [network(*first), network(*second)]
        one_graph = torch.compile(network, backend="eager", fullgraph=True)
        for arguments, right in zip((first, second), expected, strict=True):
            for got, want in zip(one_graph(*arguments), right, strict=True):
                if want is not None:
                    torch.testing.assert_close(got, want, rtol=LIMIT, atol=LIMIT, msg=name)


@torch.inference_mode()
def test_compiled_in_place_it_keeps_names_and_results():
    graphs = []
    decoder = bundled("autoencoder").decoder
    names, latent = list(decoder.state_dict()), torch.randn(1, 32, 4, 4)
    expected = decoder(latent)
    compiled.compile_in_place(decoder, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(decoder(latent), expected, rtol=LIMIT, atol=LIMIT)
    assert len(graphs) == 1 and list(decoder.state_dict()) == names


def test_what_cannot_compile_says_so(monkeypatch):
    def fail(run):
        raise RuntimeError("No C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    compiled.require_compiler.cache_clear()
    with pytest.raises(ValueError, match=r"cannot compile for cpu on this machine \(No C\+\+ compiler\); install"):
        compiled.require_compiler("cpu")
    compiled.require_compiler.cache_clear()
