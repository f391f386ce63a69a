"""A tiny SANA-Sprint with seeded random weights in the published diffusers layout.

Its images are coloured noise. It stands in for the published models in tests of files, formats and
equality: unlike the bundled model it has their layout, their instruction and a guidance embedding of any width.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sprint_core.models import tiny_autoencoder
from sprint_core.models.autoencoder import Autoencoder
from sprint_core.models.autoencoder_config import AutoencoderConfig
from sprint_core.models.controlnet import ControlNetConfig, SanaControlNet
from sprint_core.models.gemma import Gemma, GemmaConfig
from sprint_core.models.transformer import SanaTransformer, TransformerConfig
from sprint_core.text.loading import find_tokenizer
from sprint_core.text.tokenizers import tokenizer_state
from sprint_core.weights import checkpoint, keymaps, layouts, quantise, tensorfile
from sprint_core.weights.layouts.text_encoder import config_to_hf

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


def byte_tokenizer(turns: bool = False) -> dict:
    """A tokenizer.json with Gemma's special tokens, <bos> in front, whose other tokens are single bytes.

    turns: with the marks of a chat model's turns, as gemma-2-2b-it has.
    """
    marks = ["<start_of_turn>", "<end_of_turn>"] if turns else []
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *marks]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}
    one = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    two = [*one, {"Sequence": {"id": "B", "type_id": 1}}]
    front = {"type": "TemplateProcessing", "single": one, "pair": two, "special_tokens": {"<bos>": bos}}
    return {
        "version": "1.0",
        "post_processor": front,
        "added_tokens": [{"id": vocab[piece], "content": piece, **added} for piece in (*special, *marks)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": vocab, "merges": []},
    }


def make(folder: Path, transformer: TransformerConfig = TRANSFORMER, seed: int = SEED) -> Path:
    """Write the pipeline folder, unless it is there; `model_index.json` comes last. Returns the folder."""
    if (folder / "model_index.json").is_file():
        return folder
    text_tensors = random_model(Gemma(TEXT, device="meta"), seed)
    tensors = random_model(SanaTransformer(transformer, device="meta"), seed)
    parts = {
        "transformer": (
            layouts.transformer.config_to_diffusers(transformer),
            layouts.TRANSFORMER.to_diffusers(tensors, transformer),
        ),
        "vae": (
            layouts.autoencoder.config_to_diffusers(AUTOENCODER),
            random_model(Autoencoder(AUTOENCODER, device="meta"), seed),
        ),
        "text_encoder": (
            config_to_hf(TEXT),
            keymaps.from_native(text_tensors, layouts.text_encoder.GEMMA_BARE),
        ),
    }
    for name, (config, weights) in parts.items():
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        tensorfile.write(folder / name / f"{stem}.safetensors", weights, {"seed": str(seed)})
        _write_json(folder / name / "config.json", config)
    _write_json(folder / "tokenizer" / "tokenizer.json", byte_tokenizer(turns=True))
    shift = {} if transformer.guidance_embed else {"flow_shift": 3.0}
    _write_json(folder / "scheduler" / "scheduler_config.json", shift)
    pipeline = "SanaSprintPipeline" if transformer.guidance_embed else "SanaPipeline"
    _write_json(folder / "model_index.json", {"_class_name": pipeline})
    return folder


def fill(models: Path) -> None:
    """Put stand-ins into ComfyUI's model folders, under the names of the real files that the workflows name.

    What cannot be read off their odd shapes, they say themselves.
    """
    folder = make(models / "diffusers" / NAME)
    kinds = ("transformer", "autoencoder", "text_encoder")
    parts = {kind: checkpoint.load(folder, layouts.PARTS[kind]) for kind in kinds}
    encoder = parts["text_encoder"]
    encoder.extras = tokenizer_state(find_tokenizer(encoder))
    for name in ("gemma_2_2b_it_elm_bf16", "gemma_2_2b_it_elm_fp8_scaled"):
        checkpoint.save(models / "text_encoders" / f"{name}.safetensors", [encoder], {})
    checkpoint.save(models / "vae" / "dc-ae-f32c32-sana-1.1.safetensors", [parts["autoencoder"]], {})
    transformer = parts["transformer"]
    description = {checkpoint.TENSOR_KEY: checkpoint.describe_tensor(transformer)}
    (models / "diffusion_models").mkdir(parents=True, exist_ok=True)
    for name in ("Sana_Sprint_1.6B_1024px", "Sana_Sprint_0.6B_1024px"):
        torch.save(transformer.tensors | description, models / "diffusion_models" / f"{name}.pth")
    transformer.tensors = quantise.quantised(transformer.tensors, "transformer", "fp8_e4m3fn")
    checkpoint.save(models / "diffusion_models" / "Sana_Sprint_0.6B_1024px_fp8.safetensors", [transformer], {})
    (models / "vae_approx").mkdir(parents=True, exist_ok=True)
    torch.save(random_model(tiny_autoencoder.decoder(device="meta")), models / "vae_approx" / "taesana_decoder.pth")


def _write_json(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


TEACHER = dataclasses.replace(TRANSFORMER, guidance_embed=False)


def control(wiring: str, depth: int = 1, seed: int = SEED, **settings) -> checkpoint.Weights:
    """A ControlNet for the stand-in, of random weights: projections as well, so that it does something."""
    fields = dataclasses.asdict(TRANSFORMER) | {"depth": depth, "wiring": wiring} | settings
    config = ControlNetConfig(**fields)
    tensors = random_model(SanaControlNet(config, device="meta"), seed)
    return checkpoint.Weights(layouts.CONTROLNET, config, tensors, Path(f"{wiring}.safetensors"))
