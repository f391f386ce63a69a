"""How the published files hold SANA's transformer: the authors' names and diffusers', and its configuration."""

from collections.abc import Mapping
from typing import Any

from ...models.transformer import SELF_HEAD_DIM, SanaTransformer, TransformerConfig
from ..keymaps import Naming, rules
from ..part import Layout, Shapes
from ..presets import PRESETS

CAPTION_TOKENS = 300  # of the authors' empty caption
POSITIONS = {4096: 64, 16384: 128}  # stored position embeddings: tokens to base; only the 2K and 4K models use theirs


def cross_heads(width: int, depth: int) -> int | None:
    """Heads of the cross-attention, which no tensor shape shows, of the published (width, depth)."""
    rows = (p.transformer for p in PRESETS.values())
    return next((t.cross_heads for t in rows if (t.width, t.depth) == (width, depth)), None)


def config_to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """The config.json that diffusers writes for it; the inverse of `config_from_diffusers`."""
    return (
        {"_class_name": "SanaTransformer2DModel"}
        | sizes_to_diffusers(config)
        | {
            "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
            "guidance_embeds": config.guidance_embed,
            "guidance_embeds_scale": config.guidance_scale,
            "timestep_scale": 1.0 if config.guidance_embed else config.time_scale / 1000.0,
        }
    )


def sizes_to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """What the config.json of a transformer and of a ControlNet share."""
    return {
        "num_attention_heads": config.width // SELF_HEAD_DIM,
        "attention_head_dim": SELF_HEAD_DIM,
        "num_layers": config.depth,
        "num_cross_attention_heads": config.cross_heads,
        "cross_attention_head_dim": config.width // config.cross_heads,
        "cross_attention_dim": config.width,
        "caption_channels": config.caption_width,
        "mlp_ratio": config.mlp_ratio,
        "interpolation_scale": config.pos_embed_scale if config.pos_embed_base else None,
        "sample_size": config.pos_embed_base or 32,
    }


def config_from_diffusers(data: Mapping[str, Any]) -> TransformerConfig:
    """Configuration of a diffusers SanaTransformer2DModel config.json. Raises ValueError."""
    if data.get("_class_name", "SanaTransformer2DModel") != "SanaTransformer2DModel":
        raise ValueError(f"config.json describes {data['_class_name']}")
    guidance = bool(data.get("guidance_embeds", False))
    return TransformerConfig(
        **sizes_from_diffusers(data),
        qk_norm=data.get("qk_norm") is not None,
        guidance_embed=guidance,
        guidance_scale=data.get("guidance_embeds_scale", 0.1),
        # diffusers feeds Sprint s itself, every other model 1000 s times timestep_scale.
        time_scale=1.0 if guidance else 1000.0 * data.get("timestep_scale", 1.0),
    )


def sizes_from_diffusers(data: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `sizes_to_diffusers`, as fields of a configuration."""
    scale = data.get("interpolation_scale")
    return {
        "width": data["num_attention_heads"] * data["attention_head_dim"],
        "depth": data["num_layers"],
        "cross_heads": data["num_cross_attention_heads"],
        "caption_width": data.get("caption_channels", 2304),
        "mlp_ratio": data.get("mlp_ratio", 2.5),
        "pos_embed_base": 0 if scale is None else data["sample_size"],
        "pos_embed_scale": scale or 1.0,
    }


def infer_config(shapes: Shapes) -> TransformerConfig:
    """Configuration from native names and shapes, and that of a stored `pos_embed`.

    Raises ValueError when (width, depth) is no published model, since no shape shows the heads of
    the cross-attention.
    """
    sizes = infer_sizes(shapes, "transformer_blocks.")
    width, depth = sizes["width"], sizes["depth"]
    heads = cross_heads(width, depth)
    if heads is None:
        raise ValueError(f"no published SANA model has width {width} and {depth} blocks; a config.json is needed")
    teacher_only = (width, depth) == (1152, 28)  # SANA 1.5 has no 0.6B
    time_scale = 1.0 if sizes["guidance_embed"] or (sizes["qk_norm"] and teacher_only) else 1000.0
    return TransformerConfig(**sizes, cross_heads=heads, time_scale=time_scale)


def infer_sizes(shapes: Shapes, blocks: str) -> dict[str, Any]:
    """What the shapes of a transformer and of a ControlNet show alike; `blocks` is the prefix of what to count."""
    width = shapes["patch_embed.proj.weight"][0]
    base = POSITIONS.get(shapes["pos_embed"][-2], 0) if "pos_embed" in shapes else 0
    return {
        "width": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith(blocks)),
        "caption_width": shapes["caption_projection.linear_1.weight"][1],
        "mlp_ratio": shapes["transformer_blocks.0.ff.conv_inverted.weight"][0] / (2 * width),
        "qk_norm": "transformer_blocks.0.attn1.norm_q.weight" in shapes,
        "guidance_embed": "time_embed.guidance_embedder.linear_1.weight" in shapes,
        "pos_embed_base": base,
        "pos_embed_scale": base / 64 if base else 1.0,
    }


# The authors' .pth (NVlabs/Sana), 1.0 to Sprint.
NVLABS_BLOCK = (
    ("scale_shift_table", "scale_shift_table.weight"),
    ("attn.qkv.weight", ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight")),
    ("attn.q_norm.weight", "attn1.norm_q.weight"),
    ("attn.k_norm.weight", "attn1.norm_k.weight"),
    ("attn.proj.@", "attn1.to_out.0.@"),
    ("cross_attn.q_linear.@", "attn2.to_q.@"),
    ("cross_attn.kv_linear.@", ("attn2.to_k.@", "attn2.to_v.@")),
    ("cross_attn.q_norm.weight", "attn2.norm_q.weight"),
    ("cross_attn.k_norm.weight", "attn2.norm_k.weight"),
    ("cross_attn.proj.@", "attn2.to_out.0.@"),
    ("mlp.inverted_conv.conv.@", "ff.conv_inverted.@"),
    ("mlp.depth_conv.conv.@", "ff.conv_depth.@"),
    ("mlp.point_conv.conv.weight", "ff.conv_point.weight"),
)

NVLABS_INPUTS = rules(
    (
        ("x_embedder.proj.@", "patch_embed.proj.@"),
        ("y_embedder.y_proj.fc1.@", "caption_projection.linear_1.@"),
        ("y_embedder.y_proj.fc2.@", "caption_projection.linear_2.@"),
        ("attention_y_norm.weight", "caption_norm.weight"),
        ("t_embedder.mlp.0.@", "time_embed.timestep_embedder.linear_1.@"),
        ("t_embedder.mlp.2.@", "time_embed.timestep_embedder.linear_2.@"),
        ("cfg_embedder.mlp.0.@", "time_embed.guidance_embedder.linear_1.@"),
        ("cfg_embedder.mlp.2.@", "time_embed.guidance_embedder.linear_2.@"),
        ("t_block.1.@", "time_embed.linear.@"),
    )
)

# Training-only tensors of those files; pos_embed is a constant that the configuration stands for.
NVLABS_DROPPED = r"y_embedder\.y_embedding|pos_embed|logvar_linear\.(weight|bias)"
NVLABS_MARKER = "x_embedder.proj.weight"
NVLABS = Naming(
    NVLABS_INPUTS
    + rules((("final_layer.linear.@", "proj_out.@"), ("final_layer.scale_shift_table", "scale_shift_table.weight")))
    + rules(NVLABS_BLOCK, "blocks.*.", "transformer_blocks.*."),
    NVLABS_MARKER,
    NVLABS_DROPPED,
)

# diffusers' SanaTransformer2DModel. Models without guidance nest the time embedder one level deeper.
_TABLES = rules(
    (
        ("scale_shift_table", "scale_shift_table.weight"),
        ("transformer_blocks.*.scale_shift_table", "transformer_blocks.*.scale_shift_table.weight"),
    )
)
_NESTED_TIME = rules(
    (
        ("time_embed.emb.timestep_embedder.linear_1.@", "time_embed.timestep_embedder.linear_1.@"),
        ("time_embed.emb.timestep_embedder.linear_2.@", "time_embed.timestep_embedder.linear_2.@"),
    )
)
DIFFUSERS = Naming(_NESTED_TIME + _TABLES)  # it reads those with guidance, too
DIFFUSERS_GUIDANCE = Naming(_TABLES)


def diffusers_naming(config: TransformerConfig) -> Naming:
    """As diffusers writes a model of this configuration."""
    return DIFFUSERS_GUIDANCE if config.guidance_embed else DIFFUSERS


def training_only(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of what the authors' code demands of a file and never reads: the empty caption, Sprint's loss weight."""
    shapes: dict[str, tuple[int, ...]] = {"y_embedder.y_embedding": (CAPTION_TOKENS, config.caption_width)}
    if config.guidance_embed:
        shapes |= {"logvar_linear.weight": (1, config.width), "logvar_linear.bias": (1,)}
    return shapes


TRANSFORMER = Layout(
    name="transformer",
    title="a SANA transformer",
    folder="transformer",
    markers=("transformer_blocks.0.ff.conv_inverted.weight", "blocks.0.mlp.inverted_conv.conv.weight"),
    prefixes=("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", ""),
    namings=(NVLABS, DIFFUSERS),
    diffusers_naming=diffusers_naming,
    config=TransformerConfig,
    config_from_diffusers=config_from_diffusers,
    config_to_diffusers=config_to_diffusers,
    infer_config=infer_config,
    network=SanaTransformer,
    authors_naming=NVLABS,
    authors_zeros=training_only,
)
