"""Key maps: published names spelled by hand and diffusers' converters as oracles; nothing left over, bit for bit."""

import dataclasses

import pytest
import standin
import torch
from diffusers.loaders.single_file_utils import (
    convert_autoencoder_dc_checkpoint_to_diffusers,
    convert_sana_transformer_to_diffusers,
)
from oracles import TINY, shapes_of

from sprint_core.models.autoencoder import Autoencoder
from sprint_core.models.autoencoder_config import SANA
from sprint_core.models.gemma import Gemma, GemmaConfig
from sprint_core.models.transformer import SanaTransformer, TransformerConfig
from sprint_core.weights import keymaps, layouts
from sprint_core.weights.layouts.transformer import config_from_diffusers
from sprint_core.weights.presets import PRESETS

COUNTS = {"sprint-0.6B": 664, "sprint-1.6B": 480, "sprint-1.6B-teacher": 476, "sana-0.6B": 548, "sana-1.6B": 396}
COUNTS |= {"sana-1.5-1.6B": 476, "sana-1.5-4.8B": 1396}
WITHOUT_FIRST_STAGE = dataclasses.replace(
    standin.AUTOENCODER, encoder_layers=(0, 1, 1, 1, 1, 1), decoder_layers=(0, 1, 1, 1, 1, 1)
)


def nvlabs_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the authors' SanaMS / SanaMSCM module with its shape, written out from their code."""
    d, hidden = config.width, int(config.mlp_ratio * config.width)
    shapes = {
        "x_embedder.proj.weight": (d, 32, 1, 1),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "t_block.1.weight": (6 * d, d),
        "t_block.1.bias": (6 * d,),
        "y_embedder.y_proj.fc1.weight": (d, config.caption_width),
        "y_embedder.y_proj.fc1.bias": (d,),
        "y_embedder.y_proj.fc2.weight": (d, d),
        "y_embedder.y_proj.fc2.bias": (d,),
        "attention_y_norm.weight": (d,),
        "final_layer.linear.weight": (32, d),
        "final_layer.linear.bias": (32,),
        "final_layer.scale_shift_table": (2, d),
    }
    if config.guidance_embed:
        shapes |= {k.replace("t_", "cfg_"): v for k, v in shapes.items() if k.startswith("t_embedder")}
    block = {
        "scale_shift_table": (6, d),
        "attn.qkv.weight": (3 * d, d),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "cross_attn.q_linear.weight": (d, d),
        "cross_attn.q_linear.bias": (d,),
        "cross_attn.kv_linear.weight": (2 * d, d),
        "cross_attn.kv_linear.bias": (2 * d,),
        "cross_attn.proj.weight": (d, d),
        "cross_attn.proj.bias": (d,),
        "mlp.inverted_conv.conv.weight": (2 * hidden, d, 1, 1),
        "mlp.inverted_conv.conv.bias": (2 * hidden,),
        "mlp.depth_conv.conv.weight": (2 * hidden, 1, 3, 3),
        "mlp.depth_conv.conv.bias": (2 * hidden,),
        "mlp.point_conv.conv.weight": (d, hidden, 1, 1),
    }
    if config.qk_norm:
        block |= {f"{attn}.{which}_norm.weight": (d,) for attn in ("attn", "cross_attn") for which in "qk"}
    return shapes | {f"blocks.{i}.{name}": shape for i in range(config.depth) for name, shape in block.items()}


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# --- transformer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_nvlabs_names_at_full_size(name):
    config = PRESETS[name].transformer
    native = keymaps.to_native(meta(nvlabs_shapes(config)), layouts.transformer.NVLABS)
    assert len(native) == COUNTS[name]
    assert shapes(native) == shapes_of(SanaTransformer(config, device="meta"))
    assert shapes(keymaps.from_native(native, layouts.transformer.NVLABS)) == nvlabs_shapes(config)


@pytest.mark.parametrize("settings", [{}, {"qk_norm": "rms"}, {"qk_norm": "rms", "guidance_embeds": True}])
def test_nvlabs_names_are_invertible(settings):
    config = config_from_diffusers(TINY | settings)
    published = standin.random_tensors(nvlabs_shapes(config))
    extras = {name: torch.zeros(2, 2) for name in ("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight")}
    native = keymaps.to_native(published | extras, layouts.transformer.NVLABS)
    assert_same_tensors(keymaps.from_native(native, layouts.transformer.NVLABS), published)
    q, k, v = (native[f"transformer_blocks.1.attn1.to_{x}.weight"] for x in "qkv")
    assert torch.equal(torch.cat([q, k, v]), published["blocks.1.attn.qkv.weight"])


def test_nvlabs_names_as_diffusers_converts_them():
    """Its converter knows SANA 1.0 only; ours goes through native names to diffusers'."""
    config = config_from_diffusers(TINY)
    published = standin.random_tensors(nvlabs_shapes(config))
    native = keymaps.to_native(published, layouts.transformer.NVLABS)
    ours = layouts.TRANSFORMER.to_diffusers(native, config)
    extras = {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)}
    assert_same_tensors(ours, convert_sana_transformer_to_diffusers(published | extras))


@pytest.mark.parametrize("guidance", [True, False])
def test_diffusers_names_are_invertible(guidance):
    config = config_from_diffusers(TINY | {"guidance_embeds": guidance})
    native = standin.random_model(SanaTransformer(config, device="meta"))
    published = layouts.TRANSFORMER.to_diffusers(native, config)
    nested = "time_embed.timestep_embedder" if guidance else "time_embed.emb.timestep_embedder"
    assert {"scale_shift_table", "transformer_blocks.0.scale_shift_table", f"{nested}.linear_1.bias"} <= set(published)
    assert_same_tensors(keymaps.to_native(published, layouts.transformer.DIFFUSERS), native)


def test_unknown_names_stay():
    kept = keymaps.to_native({"blocks.0.attn.qkv.bias": torch.zeros(3)}, layouts.transformer.NVLABS)
    assert set(kept) == {"blocks.0.attn.qkv.bias"}


# --- DC-AE ----------------------------------------------------------------------------------------

# Names in the authors' f32c32-sana file, with the native names of what each holds.
DCAE_NAMES = {
    "encoder.project_in.conv.bias": ("encoder.conv_in.bias",),
    "encoder.stages.0.op_list.0.main.conv1.conv.weight": ("encoder.down_blocks.0.0.conv1.weight",),
    "encoder.stages.0.op_list.0.main.conv2.norm.bias": ("encoder.down_blocks.0.0.norm.bias",),
    "encoder.stages.1.op_list.2.main.conv.weight": ("encoder.down_blocks.1.2.conv.weight",),
    "encoder.stages.3.op_list.0.context_module.main.qkv.conv.weight": tuple(
        f"encoder.down_blocks.3.0.attn.to_{x}.weight" for x in "qkv"
    ),
    "encoder.stages.5.op_list.2.context_module.main.aggreg.0.1.weight": (
        "encoder.down_blocks.5.2.attn.to_qkv_multiscale.0.proj_out.weight",
    ),
    "encoder.stages.4.op_list.1.local_module.main.point_conv.norm.weight": (
        "encoder.down_blocks.4.1.conv_out.norm.weight",
    ),
    "encoder.project_out.main.op_list.0.conv.weight": ("encoder.conv_out.weight",),
    "decoder.project_in.main.conv.weight": ("decoder.conv_in.weight",),
    "decoder.stages.0.op_list.0.main.conv.conv.weight": ("decoder.up_blocks.0.0.conv.weight",),
    "decoder.stages.5.op_list.1.context_module.main.proj.conv.weight": ("decoder.up_blocks.5.1.attn.to_out.weight",),
    "decoder.stages.5.op_list.1.local_module.main.depth_conv.conv.bias": (
        "decoder.up_blocks.5.1.conv_out.conv_depth.bias",
    ),
    "decoder.project_out.op_list.0.bias": ("decoder.norm_out.bias",),
    "decoder.project_out.op_list.2.conv.weight": ("decoder.conv_out.weight",),
}


def test_autoencoder_names_at_full_size():
    native = meta(shapes_of(Autoencoder(SANA, device="meta")))
    published = keymaps.from_native(native, layouts.autoencoder.DCAE)
    assert not set(native) & set(published)
    assert shapes(keymaps.to_native(published, layouts.autoencoder.DCAE)) == shapes(native)
    assert shapes(convert_autoencoder_dc_checkpoint_to_diffusers(published)) == shapes(native)
    for name, holds in DCAE_NAMES.items():
        assert set(keymaps.to_native({name: torch.zeros(3, 1, 1, 1)}, layouts.autoencoder.DCAE)) == set(holds), name
        assert set(holds) <= set(native)


@pytest.mark.parametrize("config", [standin.AUTOENCODER, WITHOUT_FIRST_STAGE], ids=["sana", "no first stage"])
def test_autoencoder_names_are_invertible(config):
    native = standin.random_model(Autoencoder(config, device="meta"))
    published = keymaps.from_native(native, layouts.autoencoder.DCAE)
    assert_same_tensors(keymaps.to_native(published, layouts.autoencoder.DCAE), native)
    assert_same_tensors(convert_autoencoder_dc_checkpoint_to_diffusers(dict(published)), native)


# --- Gemma ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [standin.TEXT, GemmaConfig()], ids=["tiny", "full"])
def test_gemma_names(config):
    model = Gemma(config, device="meta")
    native = shapes_of(model)
    bare = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    renamed = keymaps.to_native(bare, layouts.text_encoder.GEMMA_BARE)
    assert shapes(renamed) == native
    assert set(keymaps.from_native(renamed, layouts.text_encoder.GEMMA_BARE)) == set(bare)
    head = {"lm_head.weight": torch.empty(1)}
    assert shapes(keymaps.to_native(model.state_dict() | head, layouts.text_encoder.GEMMA_BARE)) == native
