"""Each kernel beside its equation in float64, and each network with kernels beside itself without, in Triton's
interpreter: what test_fused.py holds to its limits.
"""

from collections import Counter
from typing import Any

import pytest
import standin
import torch
import torch.nn.functional as F
from einops import rearrange
from tiny_networks import CONTROL, GEMMA, MODELS
from torch import Tensor, nn

from sprint_core.kernels import fused
from sprint_core.models.autoencoder import Autoencoder
from sprint_core.models.controlnet import SanaControlNet
from sprint_core.models.gemma import Gemma, rotary_angles
from sprint_core.models.transformer import SanaTransformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
READ_A_WEIGHT = {"rms_norm", "rms_norm_pair", "gated_depthwise"}
errors: dict[str, float] = {}
ran: Counter[str] = Counter()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(case: str, got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape, (case, got.shape, want.shape)
    errors[case] = float((got.double() - want.double()).norm() / want.double().norm())


def norms(name: str, dtype: torch.dtype, channels: int, count: int) -> None:
    x, more = (randn(2, count, channels, seed=seed).to(dtype) for seed in (0, 1))
    weight, bias = (randn(channels, seed=seed).to(dtype) for seed in (2, 3))

    def norm(y: Tensor, gain: Tensor) -> Tensor:
        return y.double() * (y.double().square().mean(-1, keepdim=True) + 0.1).rsqrt() * gain.double()

    case = f"{name} {count} of {channels}"
    compare(f"rms_norm, {case}", fused.rms_norm(x, weight, 0.1), norm(x, weight))
    compare(f"rms_norm with bias, {case}", fused.rms_norm(x, weight, 0.1, bias=bias), norm(x, weight) + bias)
    both = fused.rms_norm(x, weight, 0.1, bias=bias, residual=more)
    compare(f"rms_norm with bias and residual, {case}", both, norm(x, weight) + bias + more)
    gain = fused.rms_norm(x, weight.float(), 0.1, offset=1.0, residual=more)
    compare(f"rms_norm with offset and residual, {case}", gain, norm(x, weight.float() + 1) + more)
    for keys in (more[:, :1], torch.cat([more, more], 1)):
        q, k = fused.rms_norm_pair(x, weight, keys, bias, 0.1)
        compare(f"rms_norm_pair's first, {case} beside {keys.shape[1]}", q, norm(x, weight))
        compare(f"rms_norm_pair's second, {case} beside {keys.shape[1]}", k, norm(keys, bias))

    x, more = x[:, :7], more[:, :7]  # each token is a program
    six = randn(2, 6, channels, seed=4).to(dtype)
    for samples in (1, 2):  # with one modulation for all, and one for each
        shift, scale = six[:samples, 3:4], six[:samples, 4:5]
        for total, branch in ((x, None), (x + more, more)):
            got, normed = fused.modulated_norm(x, shift, scale, 0.1, branch)
            want = F.layer_norm(total.double(), (channels,), eps=0.1) * (1 + scale.double()) + shift
            compare(f"modulated_norm of {samples} and {branch is None}, {case}", normed, want)
            compare(f"modulated_norm's sum of {samples} and {branch is None}, {case}", got, total)


def linear_attention(name: str, dtype: torch.dtype, tokens: int, head_dim: int) -> None:
    """Also of heads whose queries, keys and values lie side by side, as DC-AE has them."""
    apart = [randn(2, tokens, 3 * head_dim, seed=seed).to(dtype) for seed in range(3)]
    beside = randn(2, tokens, 9 * head_dim).to(dtype)
    ways = {
        "apart": [rearrange(y, "b n (h d) -> b h n d", h=3) for y in apart],
        "beside": list(rearrange(beside, "b n (h three d) -> three b h n d", three=3, h=3)),
    }
    ways["one of them beside"] = [ways["apart"][0], ways["beside"][1], ways["apart"][2]]
    for way, (q, k, v) in ways.items():
        assert fused.attends(q, k, v)
        wide_q, wide_k, wide_v = q.double().relu(), k.double().relu(), v.double()
        weights = wide_q @ wide_k.mT  # each query with each key
        want = weights @ wide_v / (weights.sum(-1, keepdim=True) + 0.1)
        got = fused.relu_linear_attention(q, k, v, 0.1)
        case = f"linear attention, {name}, {tokens} tokens of {head_dim}, {way}"
        compare(case, got, rearrange(want, "b h n d -> b n (h d)"))


def convolution(name: str, dtype: torch.dtype, hidden: int, height: int, width: int) -> None:
    x = randn(2, 2 * hidden, height, width).to(dtype)
    weight, bias = randn(2 * hidden, 1, 3, 3, seed=1).to(dtype), randn(2 * hidden, seed=2).to(dtype)
    value, gate = F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=2 * hidden).chunk(2, dim=1)
    want = value * gate * gate.sigmoid()
    for memory_format in (torch.channels_last, torch.contiguous_format):
        got = fused.gated_depthwise(x.contiguous(memory_format=memory_format), weight, bias)
        assert got.is_contiguous(memory_format=torch.channels_last)
        compare(f"gated_depthwise, {name} {hidden}, {height} x {width}, {memory_format}", got, want)


def text(name: str, dtype: torch.dtype) -> None:
    x = rearrange(randn(2, 5, 4 * 24).to(dtype), "b n (h d) -> b h n d", h=4)[:, 1:]
    cos, sin = rotary_angles(7, 5, 24, 100.0, x.device)
    angles = torch.arange(7, 12).double()[:, None] / 100 ** (torch.arange(12).double() / 12)
    turned = torch.view_as_complex(torch.stack(x.double().chunk(2, dim=-1), -1)) * torch.polar(angles**0, angles)
    compare(f"rotate, {name}", fused.rotate(x, cos, sin), torch.cat([turned.real, turned.imag], -1))

    mask = torch.ones(5, 40, dtype=torch.bool).triu(36)
    logits = randn(2, 3, 10, 40).mul(9).to(dtype)
    for cap in (5.0, None):
        wide = 0.3 * logits.double()
        wide = wide if cap is None else cap * wide.tanh()
        want = wide.unflatten(2, (2, 5)).masked_fill(mask, float("-inf")).softmax(-1).flatten(2, 3)
        compare(f"softcapped_softmax, {name}, cap {cap}", fused.softcapped_softmax(logits, mask, 0.3, cap), want)

    for count in (1024, 1500):
        gate, x = randn(count).mul(3).to(dtype), randn(count, seed=1).to(dtype)
        want = F.gelu(gate.double(), approximate="tanh") * x
        compare(f"gelu_gate, {name} {count}", fused.gelu_gate(gate, x), want)


def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    latent, half = randn(2, 32, 3, 2), torch.full((2,), 0.5)
    caption, mask = randn(2, 5, 64), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    transformer: Any = {"x_s": latent, "s": half, "caption": caption, "guidance": 9 * half, "mask": mask}
    ids = torch.arange(12).reshape(2, 6)

    def encode(gemma: nn.Module) -> Tensor:
        return gemma(ids, prefix=gemma.prefill(ids[:1] + 20))

    calls = {
        "transformer": (SanaTransformer(standin.TRANSFORMER), lambda network: network(**transformer)),
        "controlnet": (SanaControlNet(CONTROL), lambda network: network(hint=latent, **transformer)[-1]),
        "decoder": (Autoencoder(standin.AUTOENCODER), lambda network: network.decode(latent)),
        "encoder": (Autoencoder(standin.AUTOENCODER), lambda network: network.encode(randn(1, 3, 32, 64))),
        "text_encoder": (Gemma(GEMMA), encode),
    }
    for name, (network, call) in calls.items():
        kind = name if name in MODELS else "autoencoder"
        network.load_state_dict(standin.random_model(MODELS[kind]))
        network.requires_grad_(False)
        monkeypatch.setattr(fused, "enabled", False)
        want = call(network)
        monkeypatch.setattr(fused, "enabled", True)
        before = ran.copy()
        compare(name, call(network), want)
        assert ran != before, f"no kernel ran in the {name}"
        for layer in network.modules():  # as under a host that streams weights: no kernel may read them behind its back
            layer.comfy_cast_weights = True
        before = ran.copy()
        compare(f"{name} whose weights are cast", call(network), want)
        assert not READ_A_WEIGHT & (ran - before).keys(), ran - before


@torch.inference_mode()
def run(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], Counter[str]]:
    """The relative error of each case, and how often each kernel ran."""
    launch = fused.launch

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> None:
        ran[kernel.__name__] += 1
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(fused, "launch", counted)
    for name, dtype in DTYPES.items():
        norms(name, dtype, channels=24, count=140)
        norms(name, dtype, channels=100, count=3)
        linear_attention(name, dtype, tokens=300, head_dim=16)
        linear_attention(name, dtype, tokens=10, head_dim=32)
        convolution(name, dtype, hidden=20, height=4, width=11)
        convolution(name, dtype, hidden=130, height=1, width=3)
        text(name, dtype)
    networks(monkeypatch)
    return errors, ran
