"""What a file is, told by its tensors' names, and the words for one that is something else."""

import pytest
import torch
from tiny_networks import NATIVE, nvlabs, save

from sprint_core.weights import layouts
from sprint_core.weights.checkpoint import load
from sprint_core.weights.kinds import parts_in
from sprint_core.weights.tensorfile import CheckpointError

SDXL = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.mid.block_1.conv1.weight")
FOREIGN = {
    "a Stable Diffusion or SDXL model": SDXL,
    "a FLUX model": ("double_blocks.0.img_attn.qkv.weight",),
    "a Stable Diffusion 3 model": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",),
    "a LoRA": ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "lora_unet_blocks_0.lora_down.weight"),
    "a KL auto-encoder": ("decoder.mid.block_1.conv1.weight", "encoder.conv_in.weight"),
    "a CLIP text encoder": ("text_model.encoder.layers.0.mlp.fc1.weight",),
    "a T5 text encoder": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "a Gemma 3 text encoder": ("model.layers.0.self_attn.q_norm.weight",),
    "a Llama-like text encoder": ("model.layers.0.post_attention_layernorm.weight",),
    "something this pack does not know": ("net.0.weight",),
}


@pytest.mark.parametrize("kind", layouts.PARTS)
@pytest.mark.parametrize("family", FOREIGN)
def test_foreign_families(tmp_path, family, kind):
    path = save(tmp_path / "file.safetensors", {name: torch.zeros(2, 2) for name in FOREIGN[family]})
    with pytest.raises(CheckpointError, match=rf"file\.safetensors: this is {family}, not a.*; choose another file"):
        load(path, layouts.PARTS[kind])
    assert not parts_in(FOREIGN[family])


def test_relatives(tmp_path):
    """Files that hold a SANA network's tensors and more are not that network."""
    control = {"controlnet.0.before_proj.weight": torch.zeros(2, 2)}
    lora = {"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 2)}
    gemma3 = {"model.layers.0.self_attn.q_norm.weight": torch.zeros(2)}
    for tensors, kind, family in (
        (nvlabs() | control, "transformer", "a SANA ControlNet"),
        (NATIVE["transformer"] | {"input_block.weight": torch.zeros(1)}, "transformer", "a SANA ControlNet"),
        (NATIVE["transformer"] | lora, "transformer", "a LoRA"),
        (NATIVE["text_encoder"] | gemma3, "text_encoder", "a Gemma 3 text encoder"),
    ):
        with pytest.raises(CheckpointError, match=f"this is {family}, not"):
            load(save(tmp_path / "x.safetensors", tensors), layouts.PARTS[kind])


@pytest.mark.parametrize("slot", layouts.PARTS)
@pytest.mark.parametrize("held", layouts.PARTS)
def test_parts_in_the_wrong_slot(tmp_path, held, slot):
    path = save(tmp_path / "x.safetensors", NATIVE[held])
    if held == slot:
        assert parts_in(NATIVE[held]) == [slot]
    else:
        words = f"this is {layouts.PARTS[held].title}, not {layouts.PARTS[slot].title}; choose another file"
        with pytest.raises(CheckpointError, match=words):
            load(path, layouts.PARTS[slot])
