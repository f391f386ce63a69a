"""How the published files hold a DC-AE: its authors' names and diffusers', and its configuration, also from shapes."""

import re
from collections.abc import Mapping
from typing import Any

from ...config import from_dict
from ...latent import SCALE
from ...models.autoencoder import Autoencoder
from ...models.autoencoder_config import RES, SANA, VIT, AutoencoderConfig
from ..keymaps import Naming, rules
from ..part import Layout, Shapes

# Names in the config.json of a diffusers AutoencoderDC, and what it means by leaving one out.
_DIFFUSERS_KEYS = {
    "in_channels": ("in_channels", 3),
    "latent_channels": ("latent_channels", 32),
    "attention_head_dim": ("head_dim", 32),
    "encoder_block_out_channels": ("encoder_channels", SANA.encoder_channels),
    "decoder_block_out_channels": ("decoder_channels", SANA.decoder_channels),
    "encoder_layers_per_block": ("encoder_layers", SANA.encoder_layers),
    "decoder_layers_per_block": ("decoder_layers", SANA.decoder_layers),
    "encoder_block_types": ("encoder_blocks", RES),
    "decoder_block_types": ("decoder_blocks", RES),
    "encoder_qkv_multiscales": ("encoder_multiscales", SANA.encoder_multiscales),
    "decoder_qkv_multiscales": ("decoder_multiscales", SANA.decoder_multiscales),
    "decoder_act_fns": ("decoder_acts", "silu"),
    "decoder_conv_act_fn": ("decoder_conv_act", "relu"),
    "encoder_out_shortcut": ("encoder_out_shortcut", True),
    "decoder_in_shortcut": ("decoder_in_shortcut", True),
    "downsample_block_type": ("downsample", "pixel_unshuffle"),
    "upsample_block_type": ("upsample", "pixel_shuffle"),
}

_PER_STAGE = ("encoder_blocks", "decoder_blocks", "decoder_acts")  # one word there means all stages


def config_from_diffusers(data: Mapping[str, Any]) -> AutoencoderConfig:
    """The configuration that a diffusers AutoencoderDC config.json describes.

    Raises ValueError on settings that are unknown, and on the norms and latent scales of other
    DC-AE families, which this decoder would turn into plausible but wrong images.
    """
    data = {key: value for key, value in data.items() if not key.startswith("_")}
    scale, norms = data.pop("scaling_factor", SCALE), data.pop("decoder_norm_types", "rms_norm")
    if abs(scale - SCALE) > 1e-5 and scale != 1.0:  # diffusers writes 1 where nobody set a scale
        raise ValueError(f"this DC-AE scales its latents by {scale:g}; SANA's scale is {SCALE}")
    if set([norms] if isinstance(norms, str) else norms) != {"rms_norm"}:
        raise ValueError(f"this DC-AE has norms {norms!r}; only 'rms_norm' is supported")
    unknown = set(data) - set(_DIFFUSERS_KEYS)
    if unknown:
        raise ValueError(f"unknown settings in an AutoencoderDC config: {', '.join(sorted(unknown))}")
    ours = {name: data.get(key, default) for key, (name, default) in _DIFFUSERS_KEYS.items()}
    for name in _PER_STAGE:
        if isinstance(ours[name], str):
            ours[name] = (ours[name],) * len(ours["encoder_channels"])
    for name in ("downsample", "upsample"):
        ours[name] = str(ours[name]).lower()  # published files have "Conv"
    for side in ("encoder", "decoder"):  # residual stages have no attention, whatever the file says
        pairs = zip(ours[f"{side}_blocks"], ours[f"{side}_multiscales"], strict=False)  # the config compares lengths
        ours[f"{side}_multiscales"] = tuple(scales if kind == VIT else () for kind, scales in pairs)
    return from_dict(AutoencoderConfig, ours)


def config_to_diffusers(config: AutoencoderConfig) -> dict[str, Any]:
    """The config.json that diffusers writes for it; the inverse of `config_from_diffusers`."""
    written = {key: getattr(config, name) for key, (name, _) in _DIFFUSERS_KEYS.items()}
    return {"_class_name": "AutoencoderDC", "scaling_factor": SCALE} | written


def _infer_stage(shapes: Shapes, stage: str) -> tuple[str, int, int, tuple[int, ...]]:
    """Block type, channels, layers and attention kernels of the stage with this key prefix."""

    def matching(suffix: str) -> list[tuple]:
        pattern = re.compile(re.escape(stage) + r"\d+\." + suffix)
        return [tuple(shapes[key]) for key in sorted(shapes) if pattern.fullmatch(key)]

    if to_q := matching(r"attn\.to_q\.weight"):
        kernels = matching(r"attn\.to_qkv_multiscale\.\d+\.proj_in\.weight")
        return VIT, to_q[0][1], len(to_q), tuple(kernel[-1] for kernel in kernels[: len(kernels) // len(to_q)])
    convs = matching(r"conv1\.weight")
    return RES, convs[0][0] if convs else 0, len(convs), ()


def _infer_side(shapes: Shapes, side: str, root: str) -> dict[str, Any]:
    """Per-stage settings of the encoder or decoder, whose stages have keys beginning with `root`."""
    count = 1 + max(int(key[len(root) :].split(".")[0]) for key in shapes if key.startswith(root))
    blocks, channels, layers, scales = zip(*(_infer_stage(shapes, f"{root}{i}.") for i in range(count)), strict=True)
    if not layers[0]:  # nothing reads its width; published files write half the next one
        channels = (channels[1] // 2, *channels[1:])
    values = {"blocks": blocks, "channels": channels, "layers": layers, "multiscales": scales}
    return {f"{side}_{name}": value for name, value in values.items()}


def _infer_fields(shapes: Shapes) -> dict[str, Any]:
    down, up = "encoder.down_blocks.", "decoder.up_blocks."
    sides = {**_infer_side(shapes, "encoder", down), **_infer_side(shapes, "decoder", up)}
    stages = len(sides["encoder_channels"])
    lite = sides["decoder_layers"][0] == 0 and VIT not in sides["decoder_blocks"]
    heads = [shape[1] for key, shape in shapes.items() if key.endswith("to_qkv_multiscale.0.proj_out.weight")]
    last_down = shapes[f"{down}{stages - 2}.{sides['encoder_layers'][-2]}.conv.weight"][0]
    last_up = shapes[f"{up}{stages - 2}.0.conv.weight"][0]
    return sides | {
        "in_channels": (shapes.get("encoder.conv_in.weight") or shapes["encoder.conv_in.conv.weight"])[1],
        "latent_channels": shapes["encoder.conv_out.weight"][0],
        "head_dim": heads[0] if heads else SANA.head_dim,
        "decoder_acts": ("silu",) * stages,
        "decoder_conv_act": "silu" if lite else "relu",
        "downsample": "conv" if last_down == sides["encoder_channels"][-1] else "pixel_unshuffle",
        "upsample": "interpolate" if last_up == sides["decoder_channels"][-2] else "pixel_shuffle",
    }


def infer_config(shapes: Shapes) -> AutoencoderConfig:
    """The configuration behind a state dict in diffusers naming, from {key: shape}.

    Three things leave no trace in shapes. Both latent shortcuts are taken to be there, as in every
    published model. Activations are SiLU, but ReLU before the last convolution; a decoder of
    residual blocks only, with an empty first stage, is taken to be dc-ae-lite, which has SiLU there
    too. Raises ValueError where `shapes` are not those of a DC-AE.
    """
    try:
        return AutoencoderConfig(**_infer_fields(shapes))
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError("these are not the tensors of a DC-AE in diffusers naming") from error


# DC-AE in its authors' naming (mit-han-lab/efficientvit); native names are diffusers'.
DCAE_STAGE = (
    ("main.conv1.conv.@", "conv1.@"),
    ("main.conv2.conv.@", "conv2.@"),
    ("main.conv2.norm.@", "norm.@"),
    (
        "context_module.main.qkv.conv.weight",
        ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight"),
        True,
    ),
    ("context_module.main.aggreg.0.0.weight", "attn.to_qkv_multiscale.0.proj_in.weight"),
    ("context_module.main.aggreg.0.1.weight", "attn.to_qkv_multiscale.0.proj_out.weight"),
    ("context_module.main.proj.conv.weight", "attn.to_out.weight", True),
    ("context_module.main.proj.norm.@", "attn.norm_out.@"),
    ("local_module.main.inverted_conv.conv.@", "conv_out.conv_inverted.@"),
    ("local_module.main.depth_conv.conv.@", "conv_out.conv_depth.@"),
    ("local_module.main.point_conv.conv.@", "conv_out.conv_point.@"),
    ("local_module.main.point_conv.norm.@", "conv_out.norm.@"),
)

DCAE = Naming(
    rules(
        (
            ("encoder.project_in.conv.@", "encoder.conv_in.@"),
            ("encoder.project_in.conv.conv.@", "encoder.conv_in.conv.@"),
            ("encoder.project_out.main.op_list.0.conv.@", "encoder.conv_out.@"),
            ("encoder.project_out.op_list.0.conv.@", "encoder.conv_out.@"),  # no shortcut
            ("decoder.project_in.main.conv.@", "decoder.conv_in.@"),
            ("decoder.project_in.conv.@", "decoder.conv_in.@"),  # no shortcut
            ("decoder.project_out.op_list.0.@", "decoder.norm_out.@"),
            ("decoder.project_out.op_list.2.conv.@", "decoder.conv_out.@"),
            ("decoder.project_out.op_list.2.conv.conv.@", "decoder.conv_out.conv.@"),
            ("encoder.stages.*.op_list.*.main.conv.@", "encoder.down_blocks.*.*.conv.@"),
            ("encoder.stages.*.op_list.*.main.conv.conv.@", "encoder.down_blocks.*.*.conv.@"),
            ("decoder.stages.*.op_list.*.main.conv.conv.@", "decoder.up_blocks.*.*.conv.@"),
            ("decoder.stages.*.op_list.*.main.conv.@", "decoder.up_blocks.*.*.conv.@"),
        )
    )
    + rules(DCAE_STAGE, "encoder.stages.*.op_list.*.", "encoder.down_blocks.*.*.")
    + rules(DCAE_STAGE, "decoder.stages.*.op_list.*.", "decoder.up_blocks.*.*.")
)

AUTOENCODER = Layout(
    name="autoencoder",
    title="a DC-AE",
    folder="vae",
    markers=("decoder.norm_out.weight", "decoder.project_out.op_list.0.weight"),
    prefixes=("vae.", "first_stage_model.", "autoencoder.", ""),
    namings=(DCAE,),  # no name of diffusers' is one of its authors'
    diffusers_naming=lambda config: Naming(()),
    config=AutoencoderConfig,
    config_from_diffusers=config_from_diffusers,
    config_to_diffusers=config_to_diffusers,
    infer_config=infer_config,
    network=Autoencoder,
    authors_naming=DCAE,
)
