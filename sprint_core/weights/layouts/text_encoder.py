"""How the published files hold Gemma-2: with or without Hugging Face's wrapper, and its configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...models.gemma import Gemma, GemmaConfig
from ..keymaps import Naming, rules
from ..part import Layout

HF_NAMES = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "attn_logit_softcapping": "softcap",
    "query_pre_attn_scalar": "query_scale",
    "sliding_window": "sliding_window",
}


def config_from_hf(json: Mapping[str, Any]) -> GemmaConfig:
    """From the contents of a Hugging Face config.json. Raises ValueError if it is not a Gemma 2."""
    kind, act = json.get("model_type"), json.get("hidden_activation", "gelu_pytorch_tanh")
    if kind != "gemma2" or act != "gelu_pytorch_tanh" or json.get("attention_bias"):
        raise ValueError(f"SANA's text encoder is a Gemma 2 with tanh-GELU, not a {kind!r} with {act!r}")
    flat = {**json, **(json.get("rope_parameters") or {})}  # transformers 5 nests rope_theta there
    return GemmaConfig(**{ours: flat[theirs] for theirs, ours in HF_NAMES.items() if theirs in flat})


def config_to_hf(config: GemmaConfig) -> dict[str, Any]:
    """The config.json of the Hugging Face layout; the inverse of `config_from_hf`."""
    written = {theirs: getattr(config, ours) for theirs, ours in HF_NAMES.items()}
    return {
        "architectures": ["Gemma2Model"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
    } | written


def infer_config(shapes: Mapping[str, Sequence[int]], head_dim: int = 256) -> GemmaConfig:
    """From the shapes of a state dict under native names.

    Shapes give heads * head_dim only, so head_dim must be known: 256 in the 2B and 9B models, whose
    query_scale equals it. (In the 27B both differ; it is no SANA encoder.) Raises ValueError.
    """
    try:
        vocab, width = shapes["model.embed_tokens.weight"]
        layer = "model.layers.0."
        q, k = (shapes[f"{layer}self_attn.{name}_proj.weight"][0] for name in "qk")
        ffn = shapes[f"{layer}mlp.gate_proj.weight"][0]
        shapes[f"{layer}post_feedforward_layernorm.weight"]  # Gemma 1 has none
    except KeyError as missing:
        raise ValueError(f"not a Gemma 2 in Hugging Face naming: {missing} is missing") from None
    if q % head_dim or k % head_dim or (q // head_dim) % (k // head_dim):
        raise ValueError(f"{q} query and {k} key channels do not divide into heads of {head_dim}")
    depth = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("model.layers."))
    heads = {"heads": q // head_dim, "kv_heads": k // head_dim, "head_dim": head_dim, "query_scale": head_dim}
    return GemmaConfig(vocab=vocab, width=width, depth=depth, ffn=ffn, **heads)


# Hugging Face saves Gemma without its causal-LM wrapper in diffusers folders, and with its head elsewhere.
GEMMA_BARE = Naming(
    rules((("embed_tokens.weight", "model.embed_tokens.weight"), ("norm.weight", "model.norm.weight")))
    + rules(
        (
            *((f"self_attn.{p}_proj.weight",) * 2 for p in "qkvo"),
            *((f"mlp.{p}_proj.weight",) * 2 for p in ("gate", "up", "down")),
            *(
                (f"{p}_layernorm.weight",) * 2
                for p in ("input", "post_attention", "pre_feedforward", "post_feedforward")
            ),
        ),
        "layers.*.",
        "model.layers.*.",
    ),
    dropped=r"lm_head\.weight",
)

TEXT_ENCODER = Layout(
    name="text_encoder",
    title="a Gemma-2 text encoder",
    folder="text_encoder",
    markers=(
        "model.layers.0.post_feedforward_layernorm.weight",
        "layers.0.post_feedforward_layernorm.weight",
    ),
    prefixes=("text_encoders.gemma2_2b.transformer.", "gemma2_2b.transformer.", "text_encoder.", "transformer.", ""),
    namings=(GEMMA_BARE,),
    diffusers_naming=lambda config: GEMMA_BARE,
    config=GemmaConfig,
    config_from_diffusers=config_from_hf,
    config_to_diffusers=config_to_hf,
    infer_config=infer_config,
    network=Gemma,
    file_stem="model",
    extras=("spiece_model", "tokenizer_json"),
    stays_mapped=True,
)
