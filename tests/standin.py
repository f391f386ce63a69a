"""A tiny SANA-Sprint with seeded random weights in the published diffusers layout.

It makes coloured noise, not pictures. It stands in for the published models in tests of files, formats and
equality: unlike the bundled model it has their layout, their instruction and a guidance embedding of any width.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sprint_core import checkpoint, keymaps, tensorfile
from sprint_core.autoencoder import Autoencoder
from sprint_core.autoencoder_config import SCALE, AutoencoderConfig
from sprint_core.controlnet import ControlNetConfig, SanaControlNet
from sprint_core.gemma import HF_NAMES, Gemma, GemmaConfig
from sprint_core.transformer import SELF_HEAD_DIM, SanaTransformer, TransformerConfig

NAME = "SANA-Sprint-standin"
SEED = 0
TRANSFORMER = TransformerConfig(width=64, depth=2, cross_heads=2, caption_width=64)
AUTOENCODER = AutoencoderConfig(
    encoder_channels=(8, 16, 16, 32, 32, 32),
    decoder_channels=(8, 16, 16, 32, 32, 32),
    encoder_layers=(1,) * 6,
    decoder_layers=(1,) * 6,
)
TEXT = GemmaConfig(vocab=320, width=64, depth=2, heads=2, kv_heads=1, head_dim=32, ffn=128, query_scale=32)


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = SEED) -> dict[str, Tensor]:
    """Seeded weights under which signals keep their size: gains near 1, matrices with std 1/sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in sorted(shapes):
        shape = shapes[name]
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            gain = 1.0 if name.endswith("weight") and "layernorm" not in name and name != "model.norm.weight" else 0.0
            tensors[name] = gain + 0.1 * noise
        elif "embed_tokens" in name:
            tensors[name] = noise
        else:
            tensors[name] = noise / max(1, noise[0].numel()) ** 0.5
    return tensors


def random_model(model: torch.nn.Module, seed: int = SEED) -> dict[str, Tensor]:
    """`random_tensors` for a module, which may live on the meta device."""
    return random_tensors({name: tuple(t.shape) for name, t in model.state_dict().items()}, seed)


def diffusers_transformer(config: TransformerConfig) -> dict:
    """The config.json that diffusers would write for a transformer."""
    return {
        "_class_name": "SanaTransformer2DModel",
        "num_attention_heads": config.width // SELF_HEAD_DIM,
        "attention_head_dim": SELF_HEAD_DIM,
        "num_layers": config.depth,
        "num_cross_attention_heads": config.cross_heads,
        "cross_attention_head_dim": config.width // config.cross_heads,
        "cross_attention_dim": config.width,
        "caption_channels": config.caption_width,
        "mlp_ratio": config.mlp_ratio,
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
        "guidance_embeds": config.guidance_embed,
        "guidance_embeds_scale": config.guidance_scale,
        "timestep_scale": 1.0 if config.guidance_embed else config.time_scale / 1000.0,
        "interpolation_scale": config.pos_embed_scale if config.pos_embed_base else None,
        "sample_size": config.pos_embed_base or 32,
    }


def diffusers_transformer_tensors(tensors: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Native tensors under diffusers' names."""
    foreign = keymaps.from_native(tensors, keymaps.DIFFUSERS)
    if not config.guidance_embed:
        return foreign
    return {name.replace("time_embed.emb.", "time_embed."): tensor for name, tensor in foreign.items()}


def diffusers_autoencoder(config: AutoencoderConfig) -> dict:
    """The config.json that diffusers would write for a DC-AE."""
    return {
        "_class_name": "AutoencoderDC",
        "latent_channels": config.latent_channels,
        "attention_head_dim": config.head_dim,
        "encoder_block_types": list(config.encoder_blocks),
        "decoder_block_types": list(config.decoder_blocks),
        "encoder_block_out_channels": list(config.encoder_channels),
        "decoder_block_out_channels": list(config.decoder_channels),
        "encoder_layers_per_block": list(config.encoder_layers),
        "decoder_layers_per_block": list(config.decoder_layers),
        "encoder_qkv_multiscales": [list(k) for k in config.encoder_multiscales],
        "decoder_qkv_multiscales": [list(k) for k in config.decoder_multiscales],
        "decoder_act_fns": list(config.decoder_acts),
        "decoder_conv_act_fn": config.decoder_conv_act,
        "downsample_block_type": config.downsample,
        "upsample_block_type": config.upsample,
        "scaling_factor": SCALE,
    }


def byte_tokenizer() -> dict:
    """A tokenizer.json with Gemma's special tokens whose other tokens are single bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocab = {piece: i for i, piece in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"])}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": piece, **added} for i, piece in enumerate(special)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": vocab, "merges": []},
    }


def make(folder: Path, transformer: TransformerConfig = TRANSFORMER, seed: int = SEED) -> Path:
    """Write the pipeline folder, unless it is there; `model_index.json` comes last. Returns the folder."""
    if (folder / "model_index.json").is_file():
        return folder
    text_json = {theirs: getattr(TEXT, ours) for theirs, ours in HF_NAMES.items()}
    text_tensors = random_model(Gemma(TEXT, device="meta"), seed)
    tensors = random_model(SanaTransformer(transformer, device="meta"), seed)
    parts = {
        "transformer": (diffusers_transformer(transformer), diffusers_transformer_tensors(tensors, transformer)),
        "vae": (diffusers_autoencoder(AUTOENCODER), random_model(Autoencoder(AUTOENCODER, device="meta"), seed)),
        "text_encoder": (
            {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", **text_json},
            keymaps.from_native(text_tensors, keymaps.GEMMA_BARE),
        ),
    }
    for name, (config, weights) in parts.items():
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        tensorfile.write(folder / name / f"{stem}.safetensors", weights, {"seed": str(seed)})
        _write_json(folder / name / "config.json", config)
    _write_json(folder / "tokenizer" / "tokenizer.json", byte_tokenizer())
    shift = {} if transformer.guidance_embed else {"flow_shift": 3.0}
    _write_json(folder / "scheduler" / "scheduler_config.json", shift)
    pipeline = "SanaSprintPipeline" if transformer.guidance_embed else "SanaPipeline"
    _write_json(folder / "model_index.json", {"_class_name": pipeline})
    return folder


def _write_json(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


TEACHER = dataclasses.replace(TRANSFORMER, guidance_embed=False)


def control(wiring: str, depth: int = 1, seed: int = SEED, **settings) -> checkpoint.Weights:
    """A ControlNet for the stand-in, of random weights: projections as well, so that it does something."""
    fields = dataclasses.asdict(TRANSFORMER) | {"depth": depth, "wiring": wiring} | settings
    config = ControlNetConfig(**fields)
    tensors = random_model(SanaControlNet(config, device="meta"), seed)
    return checkpoint.Weights("controlnet", config, tensors, Path(f"{wiring}.safetensors"))
