"""Every container that weights come in, damaged and malicious ones, and writing that never leaves half a file."""

import argparse
import json
import logging
import os
import pickle
import random
import sys
import zipfile
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import safetensors.torch
import torch
from residence import resident_bytes

from sprint_core.weights import tensorfile
from sprint_core.weights.tensorfile import CheckpointError, is_shard, read, read_json, write

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}


def assert_holds(file: tensorfile.TensorFile, tensors: dict[str, torch.Tensor]) -> None:
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert file.tensors[name].dtype == tensor.dtype and torch.equal(file.tensors[name], tensor)


def save_safetensors(path: Path, tensors: dict = TENSORS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path)
    return path


class Code:
    """What a malicious file pickles: loading it would make a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# --- single files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.safetensors", "x.sft", "X.SAFETENSORS"])
def test_safetensors(tmp_path, name):
    assert_holds(read(str(save_safetensors(tmp_path / name))), TENSORS)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "data",
    [
        TENSORS,
        {"state_dict": TENSORS, "epoch": 3, "optimizer": {"lr": 1e-3}},
        {"state_dict_ema": {"a": torch.zeros(1)}, "state_dict": TENSORS},
        {"state_dict_ema": TENSORS, "state_dict": {}},
        {"generator": TENSORS, "discriminator": {"a": torch.zeros(1)}},
        {"module": {"ema": TENSORS}, "optimizer": {"a": torch.zeros(1)}},
        {"model_state_dict": TENSORS},
        {"weights": {"model": TENSORS}},
        {**TENSORS, "step": 7},
    ],
    ids=["flat", "nested", "with an average", "empty", "adversarial", "deep", "lightning", "deeper", "with numbers"],
)
def test_pickles(tmp_path, data, legacy):
    torch.save(data, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    assert_holds(read(tmp_path / "x.pth"), TENSORS)


AVERAGE = {"a": torch.zeros(1), "b.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    "data, names",
    [
        ({"state_dict": TENSORS, "state_dict_ema": AVERAGE}, "state_dict_ema"),
        ({"model": TENSORS, "ema": {"module": AVERAGE, "decay": 0.99}}, "ema > module"),
        ({"module": {"state_dict": TENSORS, "model_ema": AVERAGE}}, "module > model_ema"),
    ],
)
def test_the_average_on_request(tmp_path, data, names, caplog):
    caplog.set_level(logging.INFO)
    torch.save(data, tmp_path / "x.pth")
    assert_holds(read(tmp_path / "x.pth"), TENSORS)
    caplog.clear()
    assert_holds(read(tmp_path / "x.pth", average=True), AVERAGE)
    assert f"x.pth: weights of {names}" in caplog.text


def test_there_is_no_average(tmp_path):
    torch.save({"state_dict": TENSORS}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: holds no moving average of its weights"):
        read(tmp_path / "x.pth", average=True)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: a safetensors file has one set of weights"):
        read(save_safetensors(tmp_path / "x.safetensors"), average=True)


def truncated(path: Path, part: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])


@pytest.mark.parametrize("part", [0.005, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["x.safetensors", "x.pth", "legacy.pth"])
def test_truncated(tmp_path, kind, part):
    path = tmp_path / kind
    if path.suffix == ".pth":
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "x.pth")
    else:
        save_safetensors(path)
    truncated(path, part)
    with pytest.raises(CheckpointError, match=rf"{kind}: (truncated|the file is empty|refused)") as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", tensorfile.WEIGHT_SUFFIXES)
def test_not_weights(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    pages = [b"\0", b"PK\x03\x04"]
    pages += [random.Random(i).randbytes(300) for i in range(40)]
    for page in pages:
        path.write_bytes(page)
        with pytest.raises(CheckpointError, match=rf"x{suffix}: (truncated|refused|not a safetensors file)") as error:
            read(path)
        assert suffix not in tensorfile.SAFETENSORS or page[:2] == b"PK" or "download it again" not in str(error.value)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file is empty; download it again"):
        read(path)


def test_refuses_what_is_no_weight_file(tmp_path):
    (tmp_path / "x.gguf").write_text("x")
    with pytest.raises(CheckpointError, match=r"x.gguf: unknown file type; expected one of \.safetensors"):
        read(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"nowhere.pth: no such file"):
        read(tmp_path / "nowhere.pth")
    for data in ([torch.zeros(1)], {"epoch": 1}, torch.zeros(3)):
        torch.save(data, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=r"x.pth: holds no tensors"):
            read(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme", "no weights")
    with pytest.raises(CheckpointError, match=r"zip.pth: truncated or damaged"):
        read(tmp_path / "zip.pth")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_trainers_save_beside_the_weights(tmp_path, legacy, caplog):
    """Random states of numpy, in the names of its versions 1 and 2, the command line's namespace, paths."""
    extras = {
        "rng_state": {
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "generator": np.random.PCG64(1).state,
        },
        "scores": [np.float32(1), np.int64(2), np.arange(3), np.array([True])],
        "args": argparse.Namespace(work_dir=Path("runs"), size=torch.Size([2, 3]), pure=PureWindowsPath("C:/x")),
    }
    caplog.set_level(logging.INFO)
    torch.save(
        {"state_dict": TENSORS, "state_dict_ema": TENSORS, **extras},
        tmp_path / "x.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    real = [np.dtype, type(np.dtype("f8")), (np.int64(1).__reduce__()[0], "numpy._core.multiarray.scalar")]
    with torch.serialization.safe_globals(real):  # as ComfyUI allows them
        assert_holds(read(tmp_path / "x.pth"), TENSORS)
        assert set(real) <= set(torch.serialization.get_safe_globals())
    assert_holds(read(tmp_path / "x.pth"), TENSORS)
    assert "x.pth: weights of state_dict; the file also has state_dict_ema" in caplog.text
    old = (tmp_path / "x.pth").read_bytes()
    if legacy:  # not compressed and without a checksum, so that a name can be replaced
        assert b"numpy._core" in old
        (tmp_path / "old.pth").write_bytes(old.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        assert_holds(read(tmp_path / "old.pth"), TENSORS)


def test_code_is_refused_and_not_run(tmp_path):
    path, made = tmp_path / "x.pth", tmp_path / "made"
    malicious = {"state_dict": {**TENSORS, "bad": Code(made)}}
    torch.save(malicious, tmp_path / "zip.pth")
    torch.save(malicious, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Code(made), protocol=2))
    for name, code in (("zip.pth", "would run code"), ("legacy.pth", "would run code"), ("raw.ckpt", "")):
        path = tmp_path / name
        with pytest.raises(CheckpointError, match=f"{name}: refused, because .*{code}; use a safetensors version"):
            read(path)
    assert not made.exists()
    pickle.loads((tmp_path / "raw.ckpt").read_bytes())
    assert made.exists(), "the file would have run code"


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "model.fp16.safetensors", "other.sft"])
def test_folder_with_one_file(tmp_path, name):
    save_safetensors(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert_holds(read(tmp_path), TENSORS)


def test_folder_prefers_full_precision_over_variants(tmp_path):
    for variant in ("", ".bf16", ".fp16"):
        save_safetensors(tmp_path / f"model{variant}.safetensors", {variant or "plain": torch.zeros(1)})
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    found = []
    for variant in ("", ".bf16", ".fp16"):
        found += read(tmp_path).tensors
        (tmp_path / f"model{variant}.safetensors").unlink()
    assert found == ["plain", ".bf16", ".fp16"]
    assert_holds(read(tmp_path), TENSORS)


def make_shards(folder: Path) -> list[str]:
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for name, key in zip(names, TENSORS, strict=True):
        save_safetensors(folder / name, {key: TENSORS[key]})
    index = {"metadata": {"total_size": 1}, "weight_map": dict(zip(TENSORS, names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def test_shards_of_a_variant(tmp_path):
    """As in a download of one variant: model.safetensors.index.bf16.json, and whole files of another part's."""
    for name in make_shards(tmp_path):
        (tmp_path / name).rename(tmp_path / name.replace("model-", "model.bf16-"))
    index = tmp_path / "model.safetensors.index.json"
    index.with_name("model.safetensors.index.bf16.json").write_text(index.read_text().replace("model-", "model.bf16-"))
    index.unlink()
    assert_holds(read(tmp_path), TENSORS)


SHARD_NAMES = ("model-00001-of-00002", "model-00002-of-00002")


def shard_files(folder: Path, suffix: str = ".safetensors", back: str = "", variant: str = "") -> None:
    """TENSORS in two files, without an index."""
    for name, key in zip(SHARD_NAMES, TENSORS, strict=True):
        path = folder / f"{name.replace('model', 'model' + variant)}{back}{suffix}"
        if suffix == ".safetensors":
            save_safetensors(path, {key: TENSORS[key]})
        else:
            torch.save({key: TENSORS[key]}, path)


def lone_index(folder: Path, name: str = "model.safetensors.index.json") -> None:
    """As a download of another variant leaves it."""
    weight_map = dict(zip(TENSORS, (f"{name}.safetensors" for name in SHARD_NAMES), strict=True))
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("variant", [".bf16", ".fp16"])
def test_a_variant_beside_the_index_of_another_without_its_shards(tmp_path, variant):
    lone_index(tmp_path)
    save_safetensors(tmp_path / f"model{variant}.safetensors")
    assert_holds(read(tmp_path), TENSORS)


@pytest.mark.parametrize(
    "options",
    [{}, {"variant": ".fp16"}, {"back": ".fp16"}, {"suffix": ".bin"}],
    ids=["plain", "variant", "variant behind", "pickles"],
)
def test_shards_without_an_index(tmp_path, options):
    shard_files(tmp_path, **options)
    lone_index(tmp_path, "other.safetensors.index.json")
    (tmp_path / "other.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert_holds(read(tmp_path), TENSORS)
    next(file for file in sorted(tmp_path.iterdir()) if "00002-of" in file.name).unlink()
    with pytest.raises(
        CheckpointError, match=r"lists files that are not there|shards are missing: model.*00002-of-00002"
    ):
        read(tmp_path)


def test_more_missing_shards_than_are_named(tmp_path):
    (tmp_path / "model-00001-of-00020.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"missing: model-00002-of.*00011-of-00020.safetensors, \.\.\.; download"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin.index.json", "model.bin.index.fp16.json"])
def test_indexed_shards_of_pickles(tmp_path, name):
    shard_files(tmp_path, ".bin")
    (tmp_path / "model-00002-of-00002.bin").rename(tmp_path / "last.bin")
    weight_map = dict(zip(TENSORS, ("model-00001-of-00002.bin", "last.bin"), strict=True))
    (tmp_path / name).write_text("\ufeff" + json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert_holds(read(tmp_path), TENSORS)


def test_an_interrupted_variant_gives_way_to_a_whole_one(tmp_path):
    shard_files(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert_holds(read(tmp_path), TENSORS)


def test_states_of_a_training_are_no_weights(tmp_path):
    save_safetensors(tmp_path / "weights.safetensors")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", ".hidden.safetensors"):
        torch.save({"x": torch.zeros(1)}, tmp_path / name)
    assert_holds(read(tmp_path), TENSORS)


def test_shards_outside_the_folder_are_refused(tmp_path):
    (tmp_path / "inside").mkdir()
    save_safetensors(tmp_path / "outside.safetensors", TENSORS)
    index = {"weight_map": dict.fromkeys(TENSORS, "../outside.safetensors")}
    (tmp_path / "inside" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"files that are not there: \.\./outside"):
        read(tmp_path / "inside")


def test_shards(tmp_path):
    names = make_shards(tmp_path)
    assert_holds(read(tmp_path), TENSORS)
    assert all(map(is_shard, names)) and is_shard("pytorch_model-00001-of-00003.bin")
    assert is_shard("model-00001-of-00002.fp16.safetensors")
    assert not any(map(is_shard, ("model.safetensors", "a-1-of-2.safetensors", "x-00001-of-00002")))
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"lists files that are not there: {names[1]}"):
        read(tmp_path)


@pytest.mark.parametrize(
    "index", ['{"weight_map": {}}', "{}", "[]", "{", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_bad_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=tmp_path.name):
        read(tmp_path)


def test_folder_without_or_with_too_many_files(tmp_path):
    for found in (0, 2):
        with pytest.raises(CheckpointError, match=f"found {found} files"):
            read(tmp_path)
        save_safetensors(tmp_path / "a.safetensors")
        save_safetensors(tmp_path / "b.safetensors")


# --- writing --------------------------------------------------------------------------------------


def test_written_files_read_back(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T, **TENSORS}  # one is not contiguous
    write(path, tensors, {"note": "ä"})
    file = read(path)
    assert_holds(file, tensors)
    assert file.metadata == {"format": "pt", "note": "ä"}
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]
    assert path.stat().st_mode & 0o044 == 0o044  # others may read it


def test_equal_content_is_written_as_equal_bytes(tmp_path):
    metadata = {f"key{i}": 'a "quoted" ä\n\t\x01\\' for i in range(6)}
    for i in range(8):
        write(tmp_path / f"{i}.safetensors", TENSORS, metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    file = read(tmp_path / "0.safetensors")
    assert file.metadata == {"format": "pt", **metadata}
    assert_holds(file, TENSORS)


@pytest.mark.parametrize("moment", ["save_file", "replace"])
def test_interrupted_writing_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "x.safetensors"
    write(path, TENSORS, {})
    old = path.read_bytes()

    def fail(tensors, target, *_):
        if moment == "save_file":
            Path(target).write_bytes(old[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(*(safetensors.torch, "save_file") if moment == "save_file" else (os, "replace"), fail)
    with pytest.raises(KeyboardInterrupt):
        write(path, {"a": torch.zeros(1)}, {})
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    for text, message in (("[1]", "expected a JSON object"), ("{", "not readable as JSON"), ("\xff", "not readable")):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=rf"config.json: {message}"):
            read_json(path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say which pages were written to")
def test_unmapping_frees_memory_and_keeps_values(tmp_path):
    numbers = torch.randn(1 << 21)
    mapped = read(save_safetensors(tmp_path / "x.safetensors", {"x": numbers})).tensors["x"]
    assert torch.equal(mapped, numbers) and resident_bytes(mapped) > numbers.nbytes
    tensorfile.unmap([mapped])
    assert resident_bytes(mapped) < 1 << 16
    assert torch.equal(mapped, numbers)


def test_unmapping_loses_no_change(tmp_path):
    tensors = {name: torch.randn(1 << 16) for name in "abc"}
    file = read(save_safetensors(tmp_path / "x.safetensors", tensors))
    tensors["b"][40000] = file.tensors["b"][40000] = 5
    own, small, none = torch.randn(1 << 16), torch.randn(3), torch.randn(0)
    expected = own.clone(), small.clone()
    tensorfile.unmap([*file.tensors.values(), own, small, none, torch.empty(4096, device="meta")])
    assert_holds(file, tensors)
    assert torch.equal(own, expected[0]) and torch.equal(small, expected[1])


def test_unmapping_where_the_system_does_not_tell(tmp_path, monkeypatch):
    """A container may hide the page map; nothing may be assumed then."""
    mapped = read(save_safetensors(tmp_path / "x.safetensors", {"x": torch.ones(1 << 16)})).tensors["x"]
    mapped[7] = 3
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    tensorfile.unmap([mapped])
    assert mapped[7] == 3
