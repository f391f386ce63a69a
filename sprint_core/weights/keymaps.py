"""Tensor names of the published files, as data: rename tables and the one function that applies them.

A rule pairs one foreign name with the native ones. In patterns `*` stands for an index and `@` for
`weight` or `bias`; several native names share a foreign tensor in equal chunks along dim 0;
`conv1x1` rules see a 1x1 convolution where the native layer is linear. Native names are diffusers',
but for `scale_shift_table.weight` (layers.table_rows says why).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    foreign: str
    native: tuple[str, ...]
    conv1x1: bool = False


def _rules(table: Iterable[tuple], prefix: str = "", native_prefix: str = "") -> tuple[Rule, ...]:
    """Rules of rows (foreign, native or natives[, conv1x1])."""
    rows = []
    for foreign, native, *flags in table:
        natives = (native,) if isinstance(native, str) else native
        rows.append(Rule(prefix + foreign, tuple(native_prefix + n for n in natives), *flags))
    return tuple(rows)


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
NVLABS_INPUTS = _rules(
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
NVLABS = (
    NVLABS_INPUTS
    + _rules(
        (
            ("final_layer.linear.@", "proj_out.@"),
            ("final_layer.scale_shift_table", "scale_shift_table.weight"),
        )
    )
    + _rules(NVLABS_BLOCK, "blocks.*.", "transformer_blocks.*.")
)
# Training-only tensors of those files; pos_embed is a constant that the config stands for.
NVLABS_DROPPED = ("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias")

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

# diffusers' SanaTransformer2DModel. Models without guidance nest the time embedder one level deeper.
DIFFUSERS = _rules(
    (
        ("time_embed.emb.timestep_embedder.linear_1.@", "time_embed.timestep_embedder.linear_1.@"),
        ("time_embed.emb.timestep_embedder.linear_2.@", "time_embed.timestep_embedder.linear_2.@"),
        ("scale_shift_table", "scale_shift_table.weight"),
        ("transformer_blocks.*.scale_shift_table", "transformer_blocks.*.scale_shift_table.weight"),
    )
)

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
DCAE = (
    _rules(
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
    + _rules(DCAE_STAGE, "encoder.stages.*.op_list.*.", "encoder.down_blocks.*.*.")
    + _rules(DCAE_STAGE, "decoder.stages.*.op_list.*.", "decoder.up_blocks.*.*.")
)

# Hugging Face saves Gemma without its causal-LM wrapper in diffusers folders.
GEMMA_BARE = _rules(
    (("embed_tokens.weight", "model.embed_tokens.weight"), ("norm.weight", "model.norm.weight"))
) + _rules(
    (
        *((f"self_attn.{p}_proj.weight",) * 2 for p in "qkvo"),
        *((f"mlp.{p}_proj.weight",) * 2 for p in ("gate", "up", "down")),
        *((f"{p}_layernorm.weight",) * 2 for p in ("input", "post_attention", "pre_feedforward", "post_feedforward")),
    ),
    "layers.*.",
    "model.layers.*.",
)
GEMMA_DROPPED = ("lm_head.weight",)


@cache
def _matcher(pattern: str) -> re.Pattern:
    escaped = re.escape(pattern).replace(r"\*", r"(\d+)").replace("@", "(weight|bias)")
    return re.compile(escaped + r"\Z")


def _fill(pattern: str, values: tuple[str, ...]) -> str:
    values = iter(values)
    return re.sub(r"[*@]", lambda _: next(values), pattern)


def to_diffusers(tensors: Mapping[str, Tensor], guidance: bool) -> dict[str, Tensor]:
    """Native transformer tensors under diffusers' names, which nest the time embedder unless there is guidance."""
    foreign = from_native(tensors, DIFFUSERS)
    return {k.replace("time_embed.emb.", "time_embed."): v for k, v in foreign.items()} if guidance else foreign


def foreign_names(native: Iterable[str], rules: tuple[Rule, ...]) -> dict[str, tuple[str, ...]]:
    """Every foreign name of some native tensors, with the native ones that it holds."""
    names, found = set(native), {}
    for name in names:
        for rule in rules:
            if match := _matcher(rule.native[0]).match(name):
                found[_fill(rule.foreign, match.groups())] = tuple(_fill(n, match.groups()) for n in rule.native)
    return found


def to_native(tensors: Mapping[str, Tensor], rules: tuple[Rule, ...], dropped: Iterable[str] = ()) -> dict[str, Tensor]:
    """Foreign names to native ones; names that no rule knows stay, for the strict loader to report."""
    native = {}
    for name, tensor in tensors.items():
        if name in dropped:
            continue
        for rule in rules:
            if match := _matcher(rule.foreign).match(name):
                tensor = tensor[..., 0, 0] if rule.conv1x1 else tensor
                for target, part in zip(rule.native, tensor.chunk(len(rule.native))):
                    native[_fill(target, match.groups())] = part
                break
        else:
            native[name] = tensor
    return native


def from_native(tensors: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """The inverse of `to_native`; where two rules give the same native name the first one counts."""
    foreign, left = {}, dict(tensors)
    for name in list(tensors):
        for rule in rules:
            match = _matcher(rule.native[0]).match(name)
            if match and name in left:
                parts = [left.pop(_fill(target, match.groups())) for target in rule.native]
                tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
                foreign[_fill(rule.foreign, match.groups())] = tensor[..., None, None] if rule.conv1x1 else tensor
                break
    return foreign | left
