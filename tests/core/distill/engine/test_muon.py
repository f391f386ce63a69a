"""Muon against torch's own, against singular values, and in a training that is interrupted."""

import pytest
import standin
import torch
from torch import nn

from sprint_core.distill.engine import muon
from sprint_core.models.autoencoder import Autoencoder
from sprint_core.models.transformer import SanaTransformer, TransformerConfig


def matrices(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 40, 24), (1, 16, 16)])
def test_singular_values_become_one_and_directions_stay(shape):
    """The iterations act on singular values alone: u s v becomes u p(s) v, p the quintic applied five times."""
    given = matrices(*shape).double()
    u, s, v = torch.linalg.svd(given, full_matrices=False)
    s = s / given.flatten(1).norm(dim=1)[:, None]
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    found = muon.orthogonalised(given)
    torch.testing.assert_close(found, u @ torch.diag_embed(s) @ v, rtol=1e-5, atol=1e-5)
    assert torch.linalg.svdvals(found)[:, : min(shape[1:]) // 2].sub(1).abs().max() < 0.35


def test_matrices_move_as_by_torchs_own_muon():
    """Which iterates in bf16, so that it agrees to 1 %. Convolutions are matrices of their rows."""
    ours = [nn.Parameter(matrices(*shape)) for shape in ((16, 32), (48, 16), (16, 32), (24, 4, 3, 3))]
    theirs = [nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    mine = muon.Muon(ours, lr=0.02)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in theirs]
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = matrices(*p.shape, seed=10 * step + i)
            q.grad = p.grad.flatten(1).clone()
        mine.step()
        other.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        assert (p.flatten(1) - q).norm() < 0.02 * (q - start).norm()


def test_a_step_left_out_changes_nothing():
    p = nn.Parameter(matrices(8, 9))
    optimizer = muon.Muon([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before, kept = p.detach().clone(), optimizer.state[p]["momentum"].clone()
    p.grad, optimizer.found_inf = torch.full_like(p, float("nan")), torch.ones(())
    optimizer.step()
    assert torch.equal(p, before) and torch.equal(optimizer.state[p]["momentum"], kept)
    p.grad, optimizer.found_inf = torch.ones_like(p), torch.zeros(())
    optimizer.step()
    assert not torch.equal(p, before) and p.isfinite().all()


def names(model: nn.Module) -> tuple[set[str], set[str]]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    hidden, rest = muon.split(model)
    return {by_id[id(p)] for p in hidden}, {by_id[id(p)] for p in rest}


def test_hidden_matrices_are_muons_the_rest_is_adams():
    config = TransformerConfig(width=64, depth=1, cross_heads=2, caption_width=32)
    transformer = SanaTransformer(config, device="meta")
    transformer.transformer_blocks[0].attn1.to_v.requires_grad_(False)
    hidden, rest = names(transformer)
    block = "transformer_blocks.0."
    assert {"caption_projection.linear_1.weight", block + "attn1.to_q.weight", block + "ff.conv_point.weight"} <= hidden
    others = ("patch_embed.proj", "proj_out", "time_embed.linear", "scale_shift_table", block + "ff.conv_depth")
    assert {f"{name}.weight" for name in others} <= rest and block + "attn1.to_v.weight" not in hidden | rest
    hidden, rest = names(Autoencoder(standin.AUTOENCODER, device="meta"))
    ends = {f"{half}.{end}" for half in ("encoder", "decoder") for end in ("conv_in", "conv_out")}
    assert all(any(name.startswith(end) for name in rest) for end in ends)
    assert hidden and not any(name.startswith(tuple(ends)) for name in hidden)
    assert any(name.endswith("conv_inverted.weight") for name in hidden)
    assert not any("conv_depth" in name or "multiscale" in name for name in hidden)
