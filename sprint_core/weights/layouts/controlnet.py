"""How the published files hold SANA's ControlNet: the authors' .pth is a whole SANA, diffusers' folder the branch."""

import re
from collections.abc import Mapping
from typing import Any

from ...models.controlnet import AUTHORS, DIFFUSERS, TRUNK_TIME_SCALE, ControlNetConfig
from ..keymaps import _rules
from ..presets import PRESETS
from .transformer import NVLABS_BLOCK, NVLABS_INPUTS, POSITIONS, _sizes_for_diffusers


def control_config_to_diffusers(config: ControlNetConfig) -> dict[str, Any]:
    """The same for a ControlNet. Raises ValueError for one that diffusers' class cannot be."""
    if config.guidance_embed or config.qk_norm or config.wiring != DIFFUSERS or config.time_scale != TRUNK_TIME_SCALE:
        raise ValueError(
            "diffusers' SanaControlNetModel knows neither guidance, q/k norm, the authors' wiring nor times from 0 to 1"
        )
    return {"_class_name": "SanaControlNetModel"} | _sizes_for_diffusers(config)


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


# The same with a ControlNet: a whole trunk, of which the branch reads the inputs and block 0, and the copies.
NVLABS_CONTROL = (
    NVLABS_INPUTS
    + _rules(
        (
            ("controlnet.0.before_proj.@", "input_block.@"),
            ("controlnet.*.after_proj.@", "controlnet_blocks.*.@"),
        )
    )
    + _rules(NVLABS_BLOCK, "controlnet.*.copied_block.", "transformer_blocks.*.")
    + _rules(NVLABS_BLOCK, "blocks.0.", "base_block.")
)

NVLABS_TRUNK = re.compile(r"blocks\.(?!0\.)|final_layer\.")  # tensors there that a ControlNet does without
