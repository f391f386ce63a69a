"""What a file holds, read off the names of its tensors: which model parts, or what of another family."""

import re
from collections.abc import Iterable
from typing import Any

from .layouts import CONTROLNET, PARTS, TEXT_ENCODER, TRANSFORMER
from .part import Layout

# What else people put in a slot, specific before broad: (what it is, part of a tensor name).
LORA = ("a LoRA", (".lora_A.", ".lora_up.", ".lora_down.", ".lokr_w", ".hada_w"))
GEMMA3 = ("a Gemma 3 text encoder", (".self_attn.q_norm.",))
VIDEO = ("a SANA-Video model", (".ff.conv_temp.", ".mlp.t_conv."))
FAMILIES = (
    LORA,
    VIDEO,
    ("a ControlNet of another model", ("controlnet_blocks.0.", "zero_convs.0.", "controlnet_down_blocks.0.")),
    ("a FLUX model", ("double_blocks.0.",)),
    ("a Stable Diffusion 3 model", ("joint_blocks.0.",)),
    ("a Stable Diffusion or SDXL model", ("input_blocks.0.", "down_blocks.0.resnets.0.time_emb_proj")),
    ("a KL auto-encoder", ("decoder.mid.block_1.", "decoder.mid_block.")),
    ("a CLIP text encoder", ("text_model.encoder.",)),
    ("a T5 text encoder", ("encoder.block.0.layer.",)),
    ("a PixArt model", ("adaln_single.linear",)),
    ("a Lumina 2 or Z-Image model", ("noise_refiner.0.",)),
    ("a Qwen-Image model", ("transformer_blocks.0.img_mod.",)),
    ("a Wan model", ("blocks.0.ffn.0.",)),
    GEMMA3,
    ("a Llama-like text encoder", ("layers.0.post_attention_layernorm.",)),
)

STOCK = "and load this one with ComfyUI's own loader"
ENCODER = "SANA reads gemma-2-2b-it"
# What to do with those that people take for SANA's.
ADVICE = {
    LORA[0]: "and load this one from models/loras with Load SANA LoRA",
    VIDEO[0]: "this pack loads SANA's image models",
    "a FLUX model": STOCK,
    "a Stable Diffusion 3 model": STOCK,
    "a Stable Diffusion or SDXL model": STOCK,
    "a KL auto-encoder": "SANA's is a DC-AE, dc-ae-f32c32-sana",
    "a CLIP text encoder": ENCODER,
    "a T5 text encoder": ENCODER,
    GEMMA3[0]: ENCODER,
    "a Llama-like text encoder": ENCODER,
}

FRONTS = re.compile(r"(?:(?:net|student|unet)\.)*")  # what trainers call the network that they train


def prefix_of(names: Iterable[str], layout: Layout[Any, Any]) -> str | None:
    """The prefix under which a set of tensor names holds a part, or None; what trainers put in front counts to it."""
    names = set(names)
    fronts = {front[0] for name in names if (front := FRONTS.match(name))}
    for front in sorted(fronts, key=len):
        for prefix in layout.prefixes:
            if any(front + prefix + marker in names for marker in layout.markers):
                return front + prefix
    return None


def parts_in(names: Iterable[str]) -> list[str]:
    """The parts that a set of tensor names holds; a LoRA holds none, and the trunk around a ControlNet is none."""
    names = set(names)
    prefixes = {part: prefix for part in PARTS if (prefix := prefix_of(names, PARTS[part])) is not None}
    if foreign_family(names):
        return [part for part, prefix in prefixes.items() if part != TRANSFORMER.name and prefix]
    if CONTROLNET.name in prefixes and prefixes[CONTROLNET.name] == prefixes.get(TRANSFORMER.name):
        del prefixes[TRANSFORMER.name]
    return list(prefixes)


def foreign_family(names: Iterable[str]) -> str | None:
    """What a file is that holds no part of ours, in words, or None."""
    names = set(names)
    families = FAMILIES
    if any(prefix_of(names, layout) is not None for layout in PARTS.values()):  # these look alike
        families = (LORA, VIDEO, *((GEMMA3,) if prefix_of(names, TEXT_ENCODER) is not None else ()))
    for family, parts in families:
        if any(part in name for part in parts for name in names):
            return family
    return None
