"""Damage by chance: a reader raises CheckpointError, or reads; nothing else comes out of it."""

import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import standin
import torch
from tiny_networks import NATIVE, nvlabs

from sprint_core.weights import checkpoint, layouts, lora, tensorfile
from sprint_core.weights.checkpoint import check_names, load, load_tiny
from sprint_core.weights.lora_settings import METADATA_KEY, LoraSettings
from sprint_core.weights.tensorfile import CheckpointError

CASES = 300
SHAPES = {name: tuple(tensor.shape) for name, tensor in NATIVE["transformer"].items()}
LORA = {
    "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 64),
    "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(64, 2),
    "transformer.transformer_blocks.0.attn1.to_q.alpha": torch.tensor(1.0),
    "lora_unet_blocks_1_attn_qkv.lokr_w1": torch.ones(6, 4),
    "lora_unet_blocks_1_attn_qkv.lokr_w2_a": torch.ones(32, 2),
    "lora_unet_blocks_1_attn_qkv.lokr_w2_b": torch.ones(2, 16),
    "transformer.transformer_blocks.1.attn2.to_q.hada_w1_a": torch.ones(64, 2),
    "transformer.transformer_blocks.1.attn2.to_q.hada_w1_b": torch.ones(2, 64),
    "transformer.transformer_blocks.1.attn2.to_q.hada_w2_a": torch.ones(64, 2),
    "transformer.transformer_blocks.1.attn2.to_q.hada_w2_b": torch.ones(2, 64),
    "transformer.transformer_blocks.0.ff.conv_depth.oft_blocks": torch.ones(40, 8, 8),
    "transformer.transformer_blocks.0.ff.conv_depth.dora_scale": torch.ones(320, 1, 1, 1),
    "transformer.transformer_blocks.0.attn1.to_out.0.diff_b": torch.ones(64),
}
SETTINGS = {METADATA_KEY: '{"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"to_q": 2}, "transformer.r": 2}'}


def small(kind: str) -> dict[str, torch.Tensor]:
    """Native tensors of a part in bf16, so that files stay small."""
    return {name: tensor.bfloat16() for name, tensor in NATIVE[kind].items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Whole files of every container."""
    folder = tmp_path_factory.mktemp("whole")
    weights = checkpoint.Weights(layouts.TRANSFORMER, standin.TRANSFORMER, small("transformer"), Path("x"))
    checkpoint.save(folder / "native.safetensors", [weights], {})
    safetensors.torch.save_file(small("text_encoder"), folder / "text.safetensors")
    safetensors.torch.save_file(LORA, folder / "lora.safetensors", SETTINGS)
    published = {name: tensor.bfloat16() for name, tensor in nvlabs().items()}
    torch.save({"state_dict": published, "epoch": 1}, folder / "zip.pth")
    torch.save({"state_dict": published}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return {path.name: path for path in sorted(folder.iterdir())}


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Some bytes replaced, most of them where headers and pickles are."""
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 3, 20))):
        end = chance.choice((16, 300, 4000, len(damaged)))
        damaged[chance.randrange(min(end, len(damaged)))] = chance.randrange(256)
    return bytes(damaged)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def renamed(content: bytes, chance: random.Random) -> bytes:
    """A name, a type or a number of the header, in place of another of the same length."""
    words = (b"weight", b"blocks", b"F32", b"BF16", b"lora_A", b"alpha", b"attn1", b"64", b"config", b"0", b"to_q")
    found = [word for word in words if word in content]
    word = chance.choice(found)
    places = [i for i in range(min(len(content), 60_000)) if content.startswith(word, i)] or [content.index(word)]
    place = chance.choice(places)
    other = bytes(chance.choice(b'abz019._-"{}[]:,\\\xff\0') for _ in word)
    return content[:place] + other + content[place + len(word) :]


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (flipped, cut, renamed)


def read_as_everything(path: Path) -> None:
    """By every reader, each of which may refuse it."""
    for layout in layouts.PARTS.values():
        try:
            check_names(load(path, layout))
        except CheckpointError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    for read in (load_tiny, lambda path: tensorfile.read(path, average=True), read_lora):
        try:
            read(path)
        except CheckpointError as error:
            assert path.name in str(error) and "\n" not in str(error)


def read_lora(path: Path) -> lora.Lora:
    file = tensorfile.read(path)
    settings = LoraSettings(file.metadata, None, path.name)
    return lora.read(file.tensors, settings, SHAPES, weight=NATIVE["transformer"].get, source=path.name)


def test_whole_files_are_read(files):
    """Or all that follows would show nothing."""
    for name in ("native.safetensors", "zip.pth", "legacy.pth"):
        assert tensorfile.read(files[name]).tensors
    load(files["native.safetensors"], layouts.TRANSFORMER)
    load(files["text.safetensors"], layouts.TEXT_ENCODER)
    assert read_lora(files["lora.safetensors"]).count > 4


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
def test_damage_by_chance(tmp_path, files, damage):
    """CASES in all, of the same seeds in every run."""
    names = list(files)
    for seed in range(CASES // len(DAMAGES)):
        chance = random.Random(f"{damage.__name__} {seed}")
        whole = files[names[seed % len(names)]]
        path = tmp_path / f"{seed}{whole.suffix}"
        path.write_bytes(damage(whole.read_bytes(), chance))
        read_as_everything(path)
        path.unlink()


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.eye(3).to_sparse(), "is sparse; save it dense"),
        (torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), "is quantised by PyTorch; save it dense"),
        (torch.nested.nested_tensor([torch.eye(2), torch.eye(3)]), "is nested; save it dense"),
        (torch.eye(3, device="meta"), r"has no numbers \(meta\)"),
    ],
    ids=["sparse", "quantised", "nested", "meta"],
)
def test_tensors_of_pytorch_that_are_no_dense_numbers(tmp_path, tensor, what):
    torch.save({"a": torch.eye(3), "b": tensor}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"x\.pth: its tensor b {what}"):
        tensorfile.read(tmp_path / "x.pth")


def test_pytorchs_oldest_format_quotes_no_advice_to_run_code(tmp_path):
    """PyTorch's error for it advises weights_only=False."""
    with tarfile.open(tmp_path / "x.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(CheckpointError, match=r"x\.pth: PyTorch can read it only by running its code") as error:
        tensorfile.read(tmp_path / "x.pth")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 1}', "[" * 100_000])
def test_a_description_of_quantised_layers_that_is_none(tmp_path, text):
    path = tmp_path / "quantised.safetensors"
    safetensors.torch.save_file(small("transformer"), path, {checkpoint.QUANT_KEY: text})
    with pytest.raises(CheckpointError, match="metadata is damaged") as refused:
        load(path, layouts.TRANSFORMER)
    assert path.name in str(refused.value)
