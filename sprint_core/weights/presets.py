"""One aligned row for each published model, and how to find a file's configuration among them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.controlnet import AUTHORS, DIFFUSERS, TRUNK_TIME_SCALE, ControlNetConfig
from ..models.transformer import SELF_HEAD_DIM, TransformerConfig
from .tensorfile import CheckpointError

GUIDANCE = 4.5  # the paper's, and the default wherever none is given
FLOW_SHIFT, FLOW_SHIFT_4K = 3.0, 6.0  # of the multi-step models, as their scheduler_config.json has it
HUB = "Efficient-Large-Model"
BUNDLED_NAME = "SANA-Sprint-tiny"  # the model that comes with this repository; made by distill, see demo/README.md
BUNDLED_CONTROL_NAME = "SANA-Sprint-tiny ControlNet"
BUNDLED = Path(__file__).parents[1] / "demo" / "sana_sprint_tiny.safetensors"
BUNDLED_CONTROL = BUNDLED.with_name("sana_controlnet_tiny.safetensors")  # by distill --recipe demo-control


@dataclass(frozen=True)
class Preset:
    name: str
    repo: str  # in the diffusers layout, among HUB's
    transformer: TransformerConfig
    size_px: int

    @property
    def hub_id(self) -> str:
        return f"{HUB}/{self.repo}"


# Sizes: width, depth, heads of the cross-attention. Positions: latent size they number, scale.
S, M, L = (1152, 28, 16), (2240, 20, 20), (2240, 60, 20)
POSITIONS = {4096: 64, 16384: 128}  # stored position embeddings: tokens to base; only the 2K and 4K models use theirs
NONE, P2K, P4K = (0, 1.0), (64, 1.0), (128, 2.0)
# fmt: off
_ROWS = (
    # name                  repository                                   size  qk    guide    time pos.  px
    ("sprint-0.6B",         "Sana_Sprint_0.6B_1024px_diffusers",         S, True,  True,     1.0, NONE, 1024),
    ("sprint-1.6B",         "Sana_Sprint_1.6B_1024px_diffusers",         M, True,  True,     1.0, NONE, 1024),
    ("sprint-0.6B-teacher", "Sana_Sprint_0.6B_1024px_teacher_diffusers", S, True,  False,    1.0, NONE, 1024),
    ("sprint-1.6B-teacher", "SANA_Sprint_1.6B_1024px_teacher_diffusers", M, True,  False,    1.0, NONE, 1024),
    ("sana-0.6B",           "Sana_600M_1024px_diffusers",                S, False, False, 1000.0, NONE, 1024),
    ("sana-1.6B",           "Sana_1600M_1024px_diffusers",               M, False, False, 1000.0, NONE, 1024),
    ("sana-1.6B-2K",        "Sana_1600M_2Kpx_BF16_diffusers",            M, False, False, 1000.0, P2K,  2048),
    ("sana-1.6B-4K",        "Sana_1600M_4Kpx_BF16_diffusers",            M, False, False, 1000.0, P4K,  4096),
    ("sana-1.5-1.6B",       "SANA1.5_1.6B_1024px_diffusers",             M, True,  False, 1000.0, NONE, 1024),
    ("sana-1.5-4.8B",       "SANA1.5_4.8B_1024px_diffusers",             L, True,  False, 1000.0, NONE, 1024),
)
# fmt: on


def _preset(name, repo, size, qk_norm, guidance_embed, time_scale, positions, size_px) -> Preset:
    config = TransformerConfig(
        *size,
        qk_norm=qk_norm,
        guidance_embed=guidance_embed,
        time_scale=time_scale,
        pos_embed_base=positions[0],
        pos_embed_scale=positions[1],
    )
    return Preset(name, repo, config, size_px)


PRESETS = {row[0]: _preset(*row) for row in _ROWS}


def cross_heads(width: int, depth: int) -> int | None:
    """Heads of the cross-attention, which no tensor shape shows, of the published (width, depth)."""
    rows = (p.transformer for p in PRESETS.values())
    return next((t.cross_heads for t in rows if (t.width, t.depth) == (width, depth)), None)


def config_to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """The config.json that diffusers writes for it; the inverse of `config_from_diffusers`."""
    return (
        {"_class_name": "SanaTransformer2DModel"}
        | _sizes_for_diffusers(config)
        | {
            "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
            "guidance_embeds": config.guidance_embed,
            "guidance_embeds_scale": config.guidance_scale,
            "timestep_scale": 1.0 if config.guidance_embed else config.time_scale / 1000.0,
        }
    )


def control_config_to_diffusers(config: ControlNetConfig) -> dict[str, Any]:
    """The same for a ControlNet. Raises ValueError for one that diffusers' class cannot be."""
    if config.guidance_embed or config.qk_norm or config.wiring != DIFFUSERS or config.time_scale != TRUNK_TIME_SCALE:
        raise ValueError(
            "diffusers' SanaControlNetModel knows neither guidance, q/k norm, the authors' wiring nor times from 0 to 1"
        )
    return {"_class_name": "SanaControlNetModel"} | _sizes_for_diffusers(config)


def _sizes_for_diffusers(config: TransformerConfig) -> dict[str, Any]:
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


def control_config_from_diffusers(data: Mapping[str, Any]) -> ControlNetConfig:
    """Configuration of a diffusers SanaControlNetModel config.json. Raises ValueError."""
    if data.get("_class_name", "SanaControlNetModel") != "SanaControlNetModel":
        raise ValueError(f"config.json describes {data['_class_name']}")
    scale = data.get("interpolation_scale")
    return ControlNetConfig(
        width=data["num_attention_heads"] * data["attention_head_dim"],
        depth=data["num_layers"],
        cross_heads=data["num_cross_attention_heads"],
        caption_width=data.get("caption_channels", 2304),
        mlp_ratio=data.get("mlp_ratio", 2.5),
        pos_embed_base=0 if scale is None else data["sample_size"],
        pos_embed_scale=scale or 1.0,
        wiring=DIFFUSERS,
    )


def infer_control_config(shapes: Mapping[str, tuple[int, ...]], positions: int = 0) -> ControlNetConfig:
    """Configuration of a ControlNet from native names and shapes: of SANA 1.0, or of a Sprint if it embeds guidance.

    Raises ValueError when its width is no published model's.
    """
    width = shapes["patch_embed.proj.weight"][0]
    trunk = next((p.transformer for p in PRESETS.values() if p.transformer.width == width), None)
    if trunk is None:
        raise ValueError(f"no published SANA model has width {width}; a config.json is needed")
    guidance = "time_embed.guidance_embedder.linear_1.weight" in shapes
    base = POSITIONS.get(positions, 0)
    return ControlNetConfig(
        width=width,
        depth=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("controlnet_blocks.")),
        cross_heads=trunk.cross_heads,
        caption_width=shapes["caption_projection.linear_1.weight"][1],
        mlp_ratio=shapes["transformer_blocks.0.ff.conv_inverted.weight"][0] / (2 * width),
        qk_norm="transformer_blocks.0.attn1.norm_q.weight" in shapes,
        guidance_embed=guidance,
        time_scale=1.0 if guidance else TRUNK_TIME_SCALE,
        pos_embed_base=base,
        pos_embed_scale=base / 64 if base else 1.0,
        wiring=AUTHORS if "base_block.ff.conv_inverted.weight" in shapes else DIFFUSERS,
    )


def name_of(config: TransformerConfig) -> str:
    """The preset a configuration belongs to, or 'custom'."""
    return next((p.name for p in PRESETS.values() if p.transformer == config), "custom")


def config_from_diffusers(data: Mapping[str, Any]) -> TransformerConfig:
    """Configuration of a diffusers SanaTransformer2DModel config.json. Raises ValueError."""
    if data.get("_class_name", "SanaTransformer2DModel") != "SanaTransformer2DModel":
        raise ValueError(f"config.json describes {data['_class_name']}")
    guidance = bool(data.get("guidance_embeds", False))
    scale = data.get("interpolation_scale")
    return TransformerConfig(
        width=data["num_attention_heads"] * data["attention_head_dim"],
        depth=data["num_layers"],
        cross_heads=data["num_cross_attention_heads"],
        caption_width=data.get("caption_channels", 2304),
        mlp_ratio=data.get("mlp_ratio", 2.5),
        qk_norm=data.get("qk_norm") is not None,
        guidance_embed=guidance,
        guidance_scale=data.get("guidance_embeds_scale", 0.1),
        # diffusers feeds Sprint s itself, every other model 1000 s times timestep_scale.
        time_scale=1.0 if guidance else 1000.0 * data.get("timestep_scale", 1.0),
        pos_embed_base=0 if scale is None else data["sample_size"],
        pos_embed_scale=scale or 1.0,
    )


def infer_config(shapes: Mapping[str, tuple[int, ...]], positions: int = 0) -> TransformerConfig:
    """Configuration from native names and shapes; `positions`: tokens of a stored position embedding.

    Raises ValueError when (width, depth) is no published model, since no shape shows the heads of
    the cross-attention.
    """
    width = shapes["patch_embed.proj.weight"][0]
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("transformer_blocks."))
    heads = cross_heads(width, depth)
    if heads is None:
        raise ValueError(f"no published SANA model has width {width} and {depth} blocks; a config.json is needed")
    qk_norm = "transformer_blocks.0.attn1.norm_q.weight" in shapes
    guidance = "time_embed.guidance_embedder.linear_1.weight" in shapes
    base = POSITIONS.get(positions, 0)
    teacher_only = (width, depth) == (1152, 28)  # SANA 1.5 has no 0.6B
    return TransformerConfig(
        width=width,
        depth=depth,
        cross_heads=heads,
        caption_width=shapes["caption_projection.linear_1.weight"][1],
        mlp_ratio=shapes["transformer_blocks.0.ff.conv_inverted.weight"][0] / (2 * width),
        qk_norm=qk_norm,
        guidance_embed=guidance,
        time_scale=1.0 if guidance or (qk_norm and teacher_only) else 1000.0,
        pos_embed_base=base,
        pos_embed_scale=base / 64 if base else 1.0,
    )


def find_model(name: str) -> Path:
    """A path, or a preset's folder in the Hugging Face cache of this machine. Raises CheckpointError."""
    if name not in PRESETS:
        return Path(name)
    from huggingface_hub import snapshot_download  # what transformers downloads with
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub_id = PRESETS[name].hub_id
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        raise CheckpointError(f"{name} is not on this machine; download it with: hf download {hub_id}") from None
