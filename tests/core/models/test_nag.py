"""Normalized attention guidance against the paper's formula in float64, and in a whole network against diffusers'."""

import copy

import pytest
import torch
from oracles import TINY, pair, randn, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sprint_core import trigflow
from sprint_core.models import layers
from sprint_core.models.layers import MASKED, sdpa
from sprint_core.models.nag import NAG, join
from sprint_core.models.transformer import SanaTransformer, TransformerConfig

SIZE = (4, 6)  # of the latent, not square
S = torch.tensor([0.7, 0.2])
GUIDANCE = torch.tensor([4.5, 2.0])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
STRONG = NAG(scale=5.0, alpha=0.7, tau=1.3)  # so that some tokens meet the bound and some do not


def by_the_paper(z_pos, z_neg, nag):
    """Z~ = Z+ + phi (Z+ - Z-); r = |Z~|_1 / |Z+|_1; Z^ = min(r, tau) / r Z~; alpha Z^ + (1 - alpha) Z+: token by token.

    Its authors' code has scale = phi + 1. The second result: which tokens met the bound.
    """
    out, bounded = torch.empty_like(z_pos), []
    for place in torch.cartesian_prod(*map(torch.arange, z_pos.shape[:2])).tolist():
        plus, minus = z_pos[tuple(place)], z_neg[tuple(place)]
        further = plus + (nag.scale - 1) * (plus - minus)
        ratio = further.norm(p=1) / plus.norm(p=1)
        bounded.append(bool(ratio > nag.tau))
        kept = min(ratio, torch.tensor(nag.tau, dtype=plus.dtype)) / ratio * further
        out[tuple(place)] = nag.alpha * kept + (1 - nag.alpha) * plus
    return out, bounded


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nag", [NAG(), STRONG, NAG(scale=11.0, alpha=1.0, tau=1.0)])
def test_the_formula(nag):
    z_pos, z_neg = (randn(2, 9, 24, seed=seed, dtype=torch.float64) for seed in (1, 2))
    shares = torch.tensor([-1, -0.5, 0, 0.5, 0.9, 1.1, 1.15, 1.5, 2], dtype=torch.float64)  # norms grow and shrink
    z_neg = shares[:, None] * z_pos + z_neg / 100
    expected, bounded = by_the_paper(z_pos, z_neg, nag)
    assert any(bounded) and not all(bounded)
    torch.testing.assert_close(nag.combine(z_pos.clone(), z_neg), expected, rtol=0, atol=1e-13)


def test_half_precision_is_computed_in_fp32():
    z_pos, z_neg = (randn(1, 4, 512, seed=seed).bfloat16() for seed in (1, 2))
    expected, _ = by_the_paper(z_pos.double(), z_neg.double(), STRONG)
    got = STRONG.combine(z_pos.clone(), z_neg)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()  # half a unit of bf16's 8 bits


def test_in_blocks_of_a_cpus_cache(monkeypatch):
    z_pos, z_neg = randn(2, 30, 16, seed=1), randn(2, 30, 16, seed=2)
    with torch.inference_mode():
        whole = STRONG.combine(z_pos.clone(), z_neg)
        monkeypatch.setattr(layers, "CACHE_ELEMENTS", 7 * 16)
        assert torch.equal(STRONG.combine(z_pos.clone(), z_neg), whole)


def test_equal_prompts_are_no_guidance():
    z = randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(STRONG.combine(z.clone(), z), z, rtol=0, atol=1e-15)
    nothing = torch.zeros(1, 3, 8)
    assert torch.equal(STRONG.combine(nothing.clone(), nothing), nothing)


@pytest.mark.parametrize("nag, idle", [(NAG(scale=1.0), True), (NAG(alpha=0.0), True), (NAG(), False)])
def test_when_it_does_nothing(nag, idle):
    z_pos, z_neg = randn(1, 5, 8, seed=1, dtype=torch.float64), randn(1, 5, 8, seed=2, dtype=torch.float64)
    assert nag.idle == idle == torch.equal(nag.combine(z_pos.clone(), z_neg), z_pos)


def test_the_papers_values_for_sana():
    """Its Table 5: phi 2, tau 2.5, alpha 0.5."""
    assert NAG() == NAG(scale=1 + 2, tau=2.5, alpha=0.5, start=0.0, end=1.0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scale": 0.9}, "scale is 0.9; it must lie in 1 to 50"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"alpha": 1.1}, "alpha is 1.1; it must lie in 0 to 1"),
        ({"tau": 0.5}, "tau is 0.5; it must lie in 1 to 10"),
        ({"start": 0.6, "end": 0.4}, "from 0.6 to 0.4: start must not exceed end"),
        ({"end": 1.5}, "both lie in 0 to 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NAG(**settings)


def test_it_acts_where_a_controlnet_of_that_range_would():
    """2 steps lie at 0 and 0.17, 4 at 0, 0.17, 0.3 and 0.62."""
    acts = [[NAG(end=end).acts_at(torch.tensor(s)) for s in trigflow.sigmas("paper", 4)[:-1]] for end in (0.1, 0.2, 1)]
    assert acts == [[True, False, False, False], [True, True, False, False], [True] * 4]
    assert not NAG(start=0.1).acts_at(torch.tensor(trigflow.sigmas("paper", 1)[0]))


# --- in a network ---------------------------------------------------------------------------------


class ByHand(nn.Module):
    """A cross-attention of diffusers' network that knows the negative prompt: two softmaxes, then the paper."""

    def __init__(self, attention, model, negative, mask, nag):
        super().__init__()
        projected = model.caption_norm(model.caption_projection(negative))
        self.inner, self.negative, self.negative_mask, self.nag = attention, projected, mask, nag

    def read(self, x, text, mask):
        attn = self.inner
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return (logits + mask).softmax(-1) @ v

    def forward(self, x, encoder_hidden_states, attention_mask=None):
        masks = [0.0 if m is None else m for m in (attention_mask, self.negative_mask)]
        masks = [m[:, None] if torch.is_tensor(m) and m.ndim == 3 else m for m in masks]
        z_pos = self.read(x, encoder_hidden_states, masks[0]).transpose(1, 2).flatten(2)
        z_neg = self.read(x, self.negative.expand(len(x), -1, -1), masks[1]).transpose(1, 2).flatten(2)
        return self.inner.to_out[0](by_the_paper(z_pos, z_neg, self.nag)[0])


def with_negative(theirs, negative, mask, nag):
    model = copy.deepcopy(theirs)
    additive = None if mask is None else (1 - mask[:, None, None].to(negative)) * MASKED
    for block in model.transformer_blocks:
        block.attn2 = ByHand(block.attn2, model, negative, additive, nag)
    return model


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("masks", ["none", "prompt", "negative", "both"])
def test_a_whole_network_with_a_negative_prompt(masks, rows):
    """Captions of different lengths, one negative prompt for all images or one for each, with and without padding."""
    ours, theirs = (model.double() for model in map(copy.deepcopy, pair("sprint-0.6B")))
    x, caption = randn(2, 32, *SIZE, dtype=torch.float64), randn(2, 7, TINY["caption_channels"], dtype=torch.float64)
    negative = randn(rows, 4, TINY["caption_channels"], seed=9, dtype=torch.float64)
    mask = MASK if masks in ("prompt", "both") else None
    negative_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])[:rows] if masks in ("negative", "both") else None
    wrapped = with_negative(theirs, negative, negative_mask, STRONG)
    s, w = S.double(), GUIDANCE.double()
    want = wrapped(x, caption, s, guidance=0.1 * w, encoder_attention_mask=mask, return_dict=False)[0]
    both, both_mask = join(caption, mask, negative, negative_mask)
    got = ours(x, s, both, w, both_mask, attention=STRONG.around(sdpa, caption.shape[1]))
    assert relative_error(got, want) < 1e-5  # the norms of keys have another epsilon there
    assert relative_error(got, ours(x, s, caption, w, mask)) > 1e-2


def test_a_batch_is_its_images_alone():
    ours, _ = pair("sprint-0.6B")
    x, caption, negative = randn(2, 32, *SIZE), randn(2, 7, 24, seed=2), randn(2, 4, 24, seed=3)
    negative_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])

    def run(rows):
        both, mask = join(caption[rows], MASK[rows], negative[rows], negative_mask[rows])
        return ours(x[rows], S[rows], both, GUIDANCE[rows], mask, attention=NAG().around(sdpa, 7))

    alone = torch.cat([run(slice(i, i + 1)) for i in range(2)])
    assert relative_error(run(slice(2)), alone) < 1e-6
    short = ours(x[1:], S[1:], torch.cat([caption[1:, :3], negative[1:, :2]], dim=1), GUIDANCE[1:],
                 attention=NAG().around(sdpa, 3))  # fmt: skip
    assert relative_error(short, alone[1:]) < 1e-5  # what the masks leave out might as well not be there


def test_it_costs_a_cross_attention_and_no_second_pass():
    """Counted by torch, of a block of the 0.6B's width at 1024 px: a few percent, where a second pass is 100."""
    ours = SanaTransformer(TransformerConfig(width=1152, depth=1, cross_heads=16), device="meta").eval()
    x, caption, one = (torch.empty(shape, device="meta") for shape in ((1, 32, 32, 32), (1, 22, 2304), (1,)))

    def operations(caption, **more):
        with FlopCounterMode(display=False) as counter:
            ours(x, one, caption, one, **more)
        return counter.get_total_flops()

    plain = operations(caption)
    guided = operations(join(caption, None, caption, None)[0], attention=NAG().around(sdpa, 22))
    assert 1.005 < guided / plain < 1.06
