"""Gemma 2, the text encoder: a decoder whose last hidden states are what SANA's cross-attention reads.

What sets it apart from a plain transformer decoder (Gemma 2 report, arXiv 2408.00118): RMSNorm before
and after each branch with gain 1 + w, grouped queries, and attention logits soft-capped at 50, without
which the states are visibly wrong. Layers alternate between a 4096-token window and full attention.

The instruction in front of each prompt is constant. `prefill` computes its keys and values once, and
`forward` then runs the prompt's tokens alone. A text that grows token by token is prefilled behind itself, and
`logits` says what may follow it. Weights are named as in the Hugging Face causal-LM files.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import Count, Depth, PositiveNumber, check_fields
from ..devices import fp32
from ..kernels import fused
from .layers import gains_of, in_few_passes, rms_norm_to, uses_its_weight

KV = tuple[Tensor, Tensor]  # keys after rotation and values, each [b, kv_heads, n, head_dim]
FINAL_SOFTCAP = 30.0  # of the logits of the next token, in every Gemma 2


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes and constants of a Gemma 2; the defaults are gemma-2-2b's.

    query_scale: queries are divided by its square root. softcap: None switches soft-capping off.
    sliding_window: how many tokens each of the layers 0, 2, 4, ... sees, its own among them. Raises ValueError on
    fields that make no Gemma 2.
    """

    vocab: Count = 256000
    width: Count = 2304
    depth: Depth = 26
    heads: Count = 8
    kv_heads: Count = 4
    head_dim: Count = 256
    ffn: Count = 9216
    rope_theta: PositiveNumber = 10000.0
    norm_eps: PositiveNumber = 1e-6
    softcap: PositiveNumber | None = 50.0
    query_scale: Count = 256
    sliding_window: Count = 4096

    def __post_init__(self) -> None:
        check_fields(self)
        if self.heads % self.kv_heads:
            raise ValueError(f"GemmaConfig.heads is {self.heads}, no multiple of {self.kv_heads} kv_heads")
        if self.head_dim % 2:
            raise ValueError(f"GemmaConfig.head_dim is {self.head_dim}; the rotary embedding needs an even one")


@dataclass(frozen=True, eq=False)
class KVPrefix:
    """The tokens at the front of a text, computed once: what later tokens attend to.

    ids: the p tokens. keys, values: per layer, [1, kv_heads, p, head_dim]. hidden: [1, p, width], the
    states that `Gemma.forward` would return for these tokens. layer: the layer that `hidden` is from.
    """

    ids: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    hidden: Tensor
    layer: int


# --- the pieces -----------------------------------------------------------------------------------


def gemma_norm(norm: nn.RMSNorm, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """RMSNorm with gain 1 + w, in fp32, plus the residual: all [..., c] in x's dtype.

    `norm` is an `ops.RMSNorm` and multiplies by w alone; hosts cast and patch its weight inside its
    own forward, so the 1 is added to its output instead: (1 + w) n = w n + n.
    """
    eps: Any = norm.eps
    if fused.serves(x) and uses_its_weight(norm, x.device):
        return fused.rms_norm(x, norm.weight, eps, offset=1.0, residual=residual)
    if in_few_passes(x):
        gains = gains_of(norm, fp32(x[:0]), norm) + 1
        return rms_norm_to(torch.empty(x.shape, dtype=x.dtype), x, gains, eps, residual=residual)
    x32 = x.float()
    y = (norm(x32) + F.rms_norm(x32, x.shape[-1:], eps=eps)).to(x.dtype)
    return y if residual is None else residual + y


def rotary_angles(start: int, n: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `rotate` multiplies positions start .. start+n-1 by, each [n, head_dim] in fp32 (RoFormer, 2104.09864)."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.arange(start, start + n, dtype=torch.float32, device=device)[:, None] * inverse
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [b, h, n, d], in fp32: channel i is rotated with channel i + d/2 by `rope`'s angles."""
    cos, sin = rope
    if fused.serves(x):
        return fused.rotate(x, cos, sin)
    x32 = x.to(torch.float32, memory_format=torch.contiguous_format)
    return torch.addcmul(x32 * cos, torch.cat(x32.chunk(2, dim=-1)[::-1], dim=-1), sin).to(x.dtype)


def unseen(start: int, n: int, window: int | None, device: torch.device) -> Tensor:
    """Mask [n, start+n], true where a key comes after its query, or `window` tokens or more before it."""
    every = torch.ones(n, start + n, dtype=torch.bool, device=device)
    later = every.triu(start + 1)
    return later if window is None else later | every.tril(start - window)


def softcapped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float | None) -> Tensor:
    """Grouped-query attention with capped logits: softmax(cap tanh(scale q k / cap)) v.

    q [b, kv*g, n, d], k and v [b, kv, m, d], mask [n, m], true where query n does not see key m.
    Returns [b, n, kv*g*d]. The queries of a group are stacked, so that keys need no repeating.
    """
    groups = q.shape[1] // k.shape[1]
    q = rearrange(q, "b (k g) n d -> b k (g n) d", g=groups)
    logits, scale = q @ k.transpose(-1, -2), scale if cap is None else scale / cap
    if fused.serves(logits):
        weights = fused.softcapped_softmax(logits, mask, scale, cap)
    else:
        logits = logits.float() * scale
        if cap is not None:
            logits = cap * torch.tanh(logits)
        logits = rearrange(logits, "b k (g n) m -> b k g n m", g=groups).masked_fill(mask, float("-inf"))
        weights = rearrange(logits.softmax(dim=-1).to(v.dtype), "b k g n m -> b k (g n) m")
    return rearrange(weights @ v, "b k (g n) d -> b n (k g d)", g=groups)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention whose query heads share fewer key and value heads."""

    def __init__(self, config: GemmaConfig, ops: Any, **factory: Any):
        super().__init__()
        self.config = config
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = ops.Linear(config.width, q, bias=False, **factory)
        self.k_proj = ops.Linear(config.width, kv, bias=False, **factory)
        self.v_proj = ops.Linear(config.width, kv, bias=False, **factory)
        self.o_proj = ops.Linear(q, config.width, bias=False, **factory)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        """x [b, n, width] -> the branch [b, n, width], and the keys and values of all p + n tokens.

        past: keys and values of the tokens in front, [1, kv_heads, p, head_dim], which all of the batch share.
        """
        c = self.config
        together = torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1)
        qk, v = (rearrange(y, "b n (h d) -> b h n d", d=c.head_dim) for y in (together, self.v_proj(x)))
        q, k = rotate(qk, rope).split([c.heads, c.kv_heads], dim=1)
        if past is None:
            k = k.clone()  # or the queries beside it would be kept with it
        else:
            past_keys, past_values = (tensor.expand(len(x), -1, -1, -1) for tensor in past)
            k = torch.cat([past_keys, k], dim=2)
            v = torch.cat([past_values, v], dim=2)
        y = softcapped_attention(q, k, v, mask, c.query_scale**-0.5, c.softcap)
        return self.o_proj(y), (k, v)


class GatedMLP(nn.Module):
    """The feed-forward branch, a tanh-GELU gate times a linear map: [b, n, width] -> [b, n, width]."""

    def __init__(self, config: GemmaConfig, ops: Any, **factory: Any):
        super().__init__()
        self.gate_proj = ops.Linear(config.width, config.ffn, bias=False, **factory)
        self.up_proj = ops.Linear(config.width, config.ffn, bias=False, **factory)
        self.down_proj = ops.Linear(config.ffn, config.width, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.gate_proj(x), self.up_proj(x)
        if fused.serves(x):
            return self.down_proj(fused.gelu_gate(gate, x))
        gate = F.gelu(gate, approximate="tanh")
        return self.down_proj(gate * x if torch.is_grad_enabled() else gate.mul_(x))


def _rms_norm(config: GemmaConfig, ops: Any, device: torch.device | str | None) -> nn.RMSNorm:
    """A norm with gain 1, in fp32 whatever the model's dtype: bf16 cannot hold a merged LoRA's changes to the gains."""
    norm = ops.RMSNorm(config.width, eps=config.norm_eps, dtype=torch.float32, device=device)
    nn.init.zeros_(norm.weight)  # `gemma_norm` adds the 1
    return norm


class Block(nn.Module):
    """Attention and feed-forward branches, each between two norms, added to the residual stream."""

    def __init__(self, config: GemmaConfig, ops: Any, **factory: Any):
        super().__init__()
        self.input_layernorm = _rms_norm(config, ops, factory["device"])
        self.self_attn = GroupedQueryAttention(config, ops, **factory)
        self.post_attention_layernorm = _rms_norm(config, ops, factory["device"])
        self.pre_feedforward_layernorm = _rms_norm(config, ops, factory["device"])
        self.mlp = GatedMLP(config, ops, **factory)
        self.post_feedforward_layernorm = _rms_norm(config, ops, factory["device"])

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        """x [b, n, width] -> [b, n, width], and all tokens' keys and values; past: those of the tokens in front."""
        y, kv = self.self_attn(gemma_norm(self.input_layernorm, x), rope, mask, past)
        x = gemma_norm(self.post_attention_layernorm, y, x)
        y = self.mlp(gemma_norm(self.pre_feedforward_layernorm, x))
        return gemma_norm(self.post_feedforward_layernorm, y, x), kv


class Decoder(nn.Module):
    """The modules under the name `model` in Hugging Face's files; `Gemma` runs them."""

    def __init__(self, config: GemmaConfig, ops: Any, **factory: Any):
        super().__init__()
        self.embed_tokens = ops.Embedding(config.vocab, config.width, **factory)
        self.layers = nn.ModuleList(Block(config, ops, **factory) for _ in range(config.depth))
        self.norm = _rms_norm(config, ops, factory["device"])


# --- the encoder ----------------------------------------------------------------------------------


class Gemma(nn.Module):
    """Gemma 2. Its language-model head is its embedding, as in every Gemma 2, and needs no weights of its own.

    ops: torch.nn, or a host's namespace with Linear, Embedding and RMSNorm. Activations have the dtype
    of the embedding, or a method's `dtype` (for a host whose ops cast their weights).
    Sequences of different lengths share a batch by padding on the right with any token: attention is
    causal, so no real token sees the padding and no mask is needed; ignore the padded rows.
    """

    def __init__(
        self,
        config: GemmaConfig,
        *,
        ops: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config = config
        self.model = Decoder(config, ops, dtype=dtype, device=device)

    def forward(
        self, ids: Tensor, *, prefix: KVPrefix | None = None, layer: int = -1, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Hidden states after the final norm: ids [b, n] -> [b, n, width].

        prefix: tokens in front of `ids`, the same for the whole batch; their states are not returned.
        layer: -1 all layers, -2 all but the last, and so on; the final norm always follows.
        Raises ValueError for a bad or differing layer.
        """
        return self._run(ids, prefix, layer, dtype)[0]

    def prefill(
        self, ids: Tensor, *, prefix: KVPrefix | None = None, layer: int = -1, dtype: torch.dtype | None = None
    ) -> KVPrefix:
        """The KVPrefix of the tokens of `prefix` and ids [1, n] behind them, of which only the latter are computed.

        For `forward` with the same layer and dtype. Raises ValueError as it does.
        """
        hidden, kv = self._run(ids, prefix, layer, dtype)
        keys, values = zip(*kv, strict=True)
        front: tuple[int, ...] = ()
        if prefix is not None:
            front, hidden = prefix.ids, torch.cat([prefix.hidden, hidden], dim=1)
        return KVPrefix(front + tuple(ids[0].tolist()), keys, values, hidden, layer)

    def logits(self, hidden: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Of every token as the one that follows: hidden states after the final norm [b, width] -> [b, vocab], fp32.

        embedding: the weight [vocab, width] as a host has it at hand; the model's own if None.
        """
        weight = self.model.embed_tokens.weight if embedding is None else embedding
        return FINAL_SOFTCAP * torch.tanh(F.linear(hidden, weight.to(hidden.dtype)).float() / FINAL_SOFTCAP)

    def _run(
        self, ids: Tensor, prefix: KVPrefix | None, layer: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, list[KV]]:
        """States after the final norm [b, n, width], and each layer's keys and values of all tokens."""
        c, n = self.config, ids.shape[1]
        start = 0 if prefix is None else len(prefix.ids)
        if prefix is not None and prefix.layer != layer:
            raise ValueError(f"the prefix was computed for layer {prefix.layer}, not {layer}")
        if not -c.depth <= layer <= -1:
            raise ValueError(f"layer {layer} is none of -1 (the last) to {-c.depth}")
        table = self.model.embed_tokens  # a gigabyte, so that tokens go where it lies, and not it to them
        x = table(ids.to(table.weight.device)).to(ids.device)
        x = x if dtype is None else x.to(dtype)
        x = x * torch.tensor(c.width**0.5, dtype=x.dtype)  # rounded to x's dtype, as in training; 48 in the 2B
        rope = rotary_angles(start, n, c.head_dim, c.rope_theta, ids.device)
        masks = [unseen(start, n, window, ids.device) for window in (c.sliding_window, None)]
        kv = []
        for i, block in enumerate(self.model.layers[: c.depth + 1 + layer]):
            past = None if prefix is None else (prefix.keys[i], prefix.values[i])
            x, known = block(x, rope, masks[i % 2], past)
            kv.append(known)
        return gemma_norm(self.model.norm, x), kv
