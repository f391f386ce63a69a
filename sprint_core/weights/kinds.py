"""What a file holds, read off the names of its tensors: which parts of a model, or what of another family."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from ..models import autoencoder, autoencoder_config, controlnet, gemma
from ..models.transformer import SanaTransformer, TransformerConfig


@dataclass(frozen=True)
class Kind:
    """One part of a model: how its tensors are recognised and built."""

    name: str
    words: str  # what it is, in an error message
    folder: str  # its sub-folder in a diffusers pipeline
    markers: tuple[str, ...]  # any of these names means that the part is there
    prefixes: tuple[str, ...]
    model: Callable[..., nn.Module]
    config: type


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "transformer",
            "a SANA transformer",
            "transformer",
            ("transformer_blocks.0.ff.conv_inverted.weight", "blocks.0.mlp.inverted_conv.conv.weight"),
            ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "module.", ""),
            SanaTransformer,
            TransformerConfig,
        ),
        Kind(
            "autoencoder",
            "a DC-AE",
            "vae",
            ("decoder.norm_out.weight", "decoder.project_out.op_list.0.weight"),
            ("vae.", "first_stage_model.", "autoencoder.", "module.", ""),
            autoencoder.Autoencoder,
            autoencoder_config.AutoencoderConfig,
        ),
        Kind(
            "text_encoder",
            "a Gemma-2 text encoder",
            "text_encoder",
            (
                "model.layers.0.post_feedforward_layernorm.weight",
                "layers.0.post_feedforward_layernorm.weight",
            ),
            ("text_encoders.gemma2_2b.transformer.", "gemma2_2b.transformer.", "text_encoder.", "transformer.", ""),
            gemma.Gemma,
            gemma.GemmaConfig,
        ),
        Kind(
            "controlnet",
            "a SANA ControlNet",
            "controlnet",
            ("input_block.weight", "controlnet.0.before_proj.weight"),
            ("control_model.", "model.", "module.", ""),
            controlnet.SanaControlNet,
            controlnet.ControlNetConfig,
        ),
    )
}

# What else people put in a slot, specific before broad: (what it is, part of a tensor name).
LORA = ("a LoRA", (".lora_A.", ".lora_up.", ".lora_down.", ".lokr_w", ".hada_w"))
GEMMA3 = ("a Gemma 3 text encoder", (".self_attn.q_norm.",))
FAMILIES = (
    LORA,
    ("a ControlNet of another model", ("controlnet_blocks.0.", "zero_convs.0.", "controlnet_down_blocks.0.")),
    ("a FLUX model", ("double_blocks.0.",)),
    ("a Stable Diffusion 3 model", ("joint_blocks.0.",)),
    ("a Stable Diffusion or SDXL model", ("input_blocks.0.", "down_blocks.0.resnets.0.time_emb_proj")),
    ("a KL auto-encoder", ("decoder.mid.block_1.", "decoder.mid_block.")),
    ("a CLIP text encoder", ("text_model.encoder.",)),
    ("a T5 text encoder", ("encoder.block.0.layer.",)),
    GEMMA3,
    ("a Llama-like text encoder", ("layers.0.post_attention_layernorm.",)),
)


def prefix_of(names: Iterable[str], kind: str) -> str | None:
    """The prefix under which a set of tensor names holds a part, or None."""
    names = set(names)
    for prefix in KINDS[kind].prefixes:
        if any(prefix + marker in names for marker in KINDS[kind].markers):
            return prefix
    return None


def kinds_in(names: Iterable[str]) -> list[str]:
    """The parts that a set of tensor names holds; a LoRA holds none, and the trunk around a ControlNet is none."""
    names = set(names)
    if foreign_family(names):
        return [kind for kind in KINDS if kind != "transformer" and prefix_of(names, kind)]
    held = {kind: prefix for kind in KINDS if (prefix := prefix_of(names, kind)) is not None}
    if "controlnet" in held and held["controlnet"] == held.get("transformer"):
        del held["transformer"]
    return list(held)


def foreign_family(names: Iterable[str]) -> str | None:
    """What a file is that holds no part of ours, in words, or None."""
    names, families = list(names), FAMILIES
    if any(prefix_of(names, kind) is not None for kind in KINDS):
        families = (LORA, GEMMA3) if prefix_of(names, "text_encoder") is not None else (LORA,)  # these look alike
    for family, parts in families:
        if any(part in name for part in parts for name in names):
            return family
    return None
