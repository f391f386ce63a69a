"""How the published files hold SANA's ControlNet: the authors' .pth is a whole SANA, diffusers' folder the branch."""

from collections.abc import Mapping
from typing import Any

from ...models.controlnet import AUTHORS, DIFFUSERS, TRUNK_TIME_SCALE, ControlNetConfig, SanaControlNet
from ..keymaps import Naming, rules
from ..part import Layout, Shapes
from ..presets import PRESETS
from . import transformer


def config_to_diffusers(config: ControlNetConfig) -> dict[str, Any]:
    """The config.json of diffusers' SanaControlNetModel. Raises ValueError for what that class cannot be."""
    if config.guidance_embed or config.qk_norm or config.wiring != DIFFUSERS or config.time_scale != TRUNK_TIME_SCALE:
        raise ValueError(
            "diffusers' SanaControlNetModel knows neither guidance, q/k norm, the authors' wiring nor times from 0 to 1"
        )
    return {"_class_name": "SanaControlNetModel"} | transformer.sizes_to_diffusers(config)


def config_from_diffusers(data: Mapping[str, Any]) -> ControlNetConfig:
    """Configuration of a diffusers SanaControlNetModel config.json. Raises ValueError."""
    if data.get("_class_name", "SanaControlNetModel") != "SanaControlNetModel":
        raise ValueError(f"config.json describes {data['_class_name']}")
    return ControlNetConfig(**transformer.sizes_from_diffusers(data), wiring=DIFFUSERS)


def infer_config(shapes: Shapes) -> ControlNetConfig:
    """Configuration of a ControlNet from native names and shapes: of SANA 1.0, or of a Sprint if it embeds guidance.

    Raises ValueError when its width is no published model's.
    """
    sizes = transformer.infer_sizes(shapes, "controlnet_blocks.")
    trunk = next((p.transformer for p in PRESETS.values() if p.transformer.width == sizes["width"]), None)
    if trunk is None:
        raise ValueError(f"no published SANA model has width {sizes['width']}; a config.json is needed")
    return ControlNetConfig(
        **sizes,
        cross_heads=trunk.cross_heads,
        time_scale=1.0 if sizes["guidance_embed"] else TRUNK_TIME_SCALE,
        wiring=AUTHORS if "base_block.ff.conv_inverted.weight" in shapes else DIFFUSERS,
    )


# The authors' .pth: a whole trunk, of which the branch reads the inputs and block 0, and the copies.
NVLABS = Naming(
    transformer.NVLABS_INPUTS
    + rules((("controlnet.0.before_proj.@", "input_block.@"), ("controlnet.*.after_proj.@", "controlnet_blocks.*.@")))
    + rules(transformer.NVLABS_BLOCK, "controlnet.*.copied_block.", "transformer_blocks.*.")
    + rules(transformer.NVLABS_BLOCK, "blocks.0.", "base_block."),
    transformer.NVLABS_MARKER,
    rf"{transformer.NVLABS_DROPPED}|(blocks\.(?!0\.)|final_layer\.).*",  # of the trunk what the branch does without
)

CONTROLNET = Layout(
    name="controlnet",
    title="a SANA ControlNet",
    folder="controlnet",
    markers=("input_block.weight", "controlnet.0.before_proj.weight"),
    prefixes=("control_model.", "model.", ""),
    namings=(NVLABS, transformer.DIFFUSERS),
    diffusers_naming=lambda config: transformer.DIFFUSERS,
    config=ControlNetConfig,
    config_from_diffusers=config_from_diffusers,
    config_to_diffusers=config_to_diffusers,
    infer_config=infer_config,
    network=SanaControlNet,
)
