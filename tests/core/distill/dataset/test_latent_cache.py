"""Encoding captioned images once, with encoders that can be checked by hand."""

import gc
import io
import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from picture_files import BLUE, RED, encoded_bytes, own_cache, parquet, plain, square, write  # noqa: F401
from PIL import Image
from safetensors.torch import load_file, save_file

from sprint_core.distill.dataset import encoding
from sprint_core.distill.dataset.captioned import Item, captioned
from sprint_core.distill.dataset.encoding import encode_images
from sprint_core.distill.dataset.latent_cache import LatentCache
from sprint_core.distill.engine.processes import ProcessGroup
from sprint_core.distill.engine.randomness import SampleRandom


class Encoders:
    """A latent repeats the colour of a 32-pixel square, an embedding the letters; counts what it is given."""

    def __init__(self):
        self.images, self.texts = 0, []

    def image(self, images: torch.Tensor) -> torch.Tensor:
        assert len(images) <= encoding.BATCH and images.shape[1:] == (3, 64, 64)
        self.images += len(images)
        return torch.nn.functional.avg_pool2d(images, 32).repeat(1, 11, 1, 1)[:, :32]

    def text(self, captions: list[str]) -> list[torch.Tensor]:
        self.texts += captions
        return [torch.tensor([[ord(c), 1.0] for c in "^" + caption]) for caption in captions]


class Loads:
    """Items that count how often they are loaded."""

    def __init__(self, count: int):
        self.loaded = []
        self.items = [Item(f"{i}.png", "abcdefgh"[: i % 8 + 1], lambda i=i: self.load(i)) for i in range(count)]

    def load(self, i: int) -> Image.Image:
        self.loaded.append(i)
        return Image.new("RGB", (64, 64), (10 * i, 0, 0))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(encoding, "SHARD", 4)
    monkeypatch.setattr(encoding, "BATCH", 3)


def encode(items, folder: Path, encoders: Encoders | None = None, fingerprint: str = "dc-ae gemma 64") -> LatentCache:
    encoders = encoders or Encoders()
    return encode_images(items, folder, encoding.Encoders(encoders.image, encoders.text, [(64, 64)]), fingerprint)


def random(count: int = 16) -> SampleRandom:
    return SampleRandom(0, 0, "test", range(count))


def test_a_batch_equals_direct_encoding(tmp_path):
    encoders, loads = Encoders(), Loads(10)
    data = encode(iter(loads.items), tmp_path, encoders)
    assert len(data) == 10 and encoders.images == 10 and encoders.texts[0] == ""
    batch = data.batch(random())
    latents, embeddings = batch.latents, batch.captions
    assert latents.shape == (16, 32, 2, 2) and latents.dtype == torch.float32
    chosen = [loads.items[i] for i in random().of_data().integers(10)]
    assert len({item.name for item in chosen}) > 5
    direct = encoders.image(torch.stack([square(item.load(), 64) for item in chosen[:3]]))
    assert torch.equal(latents[:3], direct.half().float())
    for embedding, expected in zip(embeddings, encoders.text([item.caption for item in chosen]), strict=True):
        assert torch.equal(embedding, expected.bfloat16())
    assert torch.equal(data.null, encoders.text([""])[0].bfloat16())


def test_the_encoders_are_released(tmp_path):
    """They are as large as what is trained next."""
    encoders = Encoders()
    gone = weakref.ref(encoders)
    data = encode(Loads(2).items, tmp_path, encoders)
    del encoders
    gc.collect()
    assert gone() is None and len(data) == 2


def test_shards_are_as_described(tmp_path):
    encode(Loads(6).items, tmp_path)
    names = ["null.safetensors", "shard_00000.safetensors", "shard_00001.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    shard = load_file(tmp_path / names[1])
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in shard.items()} == {
        "latents": (torch.float16, (4, 32, 2, 2)),
        "captions": (torch.bfloat16, (2 + 3 + 4 + 5, 2)),
        "lengths": (torch.int32, (4,)),
    }


def test_resuming_reads_no_image_of_whole_shards(tmp_path):
    class Stopped(Exception):
        pass

    def stopping(items):
        yield from items[:9]
        raise Stopped

    with pytest.raises(Stopped):
        encode(stopping(Loads(10).items), tmp_path)
    encoders, loads = Encoders(), Loads(10)
    resumed = encode(iter(loads.items), tmp_path, encoders)
    assert sorted(loads.loaded) == [8, 9] and encoders.images == 2 and "" not in encoders.texts
    whole = encode(Loads(10).items, tmp_path / "whole")
    for a, b in zip(resumed.batch(random()).captions, whole.batch(random()).captions, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(resumed.batch(random()).latents, whole.batch(random()).latents)
    assert torch.equal(resumed.null, whole.null)


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign"])
def test_a_damaged_shard_is_encoded_again(tmp_path, damage, caplog):
    before = encode(Loads(10).items, tmp_path).batch(random())
    path = tmp_path / "shard_00001.safetensors"
    content = path.read_bytes()
    if damage == "foreign":
        tensors = load_file(path)
        about = {"fingerprint": "dc-ae gemma 64", "sources": "", "skipped": "[]"}
        save_file({**tensors, "lengths": tensors["lengths"][:-1].clone()}, path, about)
    else:
        path.write_bytes(content[:-9] if damage == "truncated" else b"")
    loads = Loads(10)
    after = encode(loads.items, tmp_path).batch(random())
    assert sorted(loads.loaded) == [4, 5, 6, 7] and f"{path}: truncated or damaged" in caplog.text
    assert torch.equal(before.latents, after.latents) and path.read_bytes() == content


def test_a_shard_of_other_images_is_encoded_again(tmp_path, caplog):
    encode(Loads(6).items, tmp_path)
    loads = Loads(6)
    loads.items[5] = Item("5.png", "another caption", loads.items[5].load)
    encode(loads.items, tmp_path)
    assert sorted(loads.loaded) == [4, 5]
    assert f"{tmp_path / 'shard_00001.safetensors'}: of other images or captions" in caplog.text


def test_shards_of_other_encoders_are_refused(tmp_path):
    encode(Loads(6).items, tmp_path)
    loads = Loads(6)
    with pytest.raises(ValueError) as error:
        encode(loads.items, tmp_path, fingerprint="another 64")
    assert "dc-ae gemma 64" in str(error.value) and "another 64" in str(error.value)
    assert f"choose another --out or delete {tmp_path}" in str(error.value)
    assert not loads.loaded


def test_damaged_images_are_left_out_and_named(tmp_path, caplog):
    half = encoded_bytes(Image.effect_noise((64, 64), 50), "PNG")[:900]
    files = {f"{i:02d}.png": plain((i, 0, 0)) for i in range(12)} | {f"{i:02d}.txt": f"{i}" for i in range(12)}
    second_shard = {f"{i:02d}.png": b"nonsense" for i in range(4, 8)}
    write(tmp_path / "in", files | second_shard | {"00.png": b"", "02.png": half})
    data = encode(captioned(tmp_path / "in"), tmp_path / "out")
    assert len(data) == 6
    assert "6 of 12 images are damaged and left out: 00.png (not an image), 02.png (" in caplog.text
    assert not (tmp_path / "out" / "shard_00001.safetensors").exists()
    batch = data.batch(random(64))
    latents, embeddings = batch.latents, batch.captions
    for latent, embedding in zip(latents, embeddings, strict=True):
        number = int("".join(chr(int(c)) for c in embedding[1:, 0]))
        assert torch.equal(latent[0], torch.full((2, 2), number / 127.5 - 1).half().float())
    caplog.clear()
    again = encode(captioned(tmp_path / "in"), tmp_path / "out")
    assert len(again) == 6 and "6 of 12 images are damaged" in caplog.text  # those of kept shards too


def test_latents_that_are_not_finite_are_left_out(tmp_path, caplog):
    encoders = Encoders()
    exact = encoders.image
    encoders.image = lambda images: exact(images) * torch.where(images[:, :1, :1, :1] > -0.9, 1e6, 1.0)
    assert len(encode(Loads(5).items, tmp_path, encoders)) == 2  # 0 and 10 of 255 are below
    assert "3 of 5 images are damaged and left out: 2.png (the auto-encoder made it NaN or infinite)" in caplog.text


def test_nothing_that_can_be_used_is_an_error(tmp_path):
    write(tmp_path, {"a.png": b"nonsense", "a.txt": "a", "b.png": b"", "b.txt": "b"})
    with pytest.raises(ValueError, match=r"none of 2 images can be used: a\.png \(not an image\), b\.png"):
        encode(captioned(tmp_path), tmp_path / "out")


def test_too_little_disk_is_said_after_the_first_shard(tmp_path, monkeypatch):
    loads, usage = Loads(4 * 6), encoding.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda path: usage._replace(free=1))
    with pytest.raises(OSError, match=r"need about \d+ MiB and 0 MiB are free"):
        encode(loads.items, tmp_path)
    assert len(loads.loaded) == 4
    encode(iter_of_unknown_length(loads.items), tmp_path)  # nothing to compare with
    assert len(encode(loads.items, tmp_path)) == 24  # nothing is left to write


def iter_of_unknown_length(items):
    yield from items


def test_progress_knows_the_end(tmp_path, monkeypatch):
    bars = []

    class Bar(encoding.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(encoding, "tqdm", Bar)
    encode(iter(Loads(10).items), tmp_path)
    encode(iter(Loads(10).items), tmp_path)
    assert [(bar.n, bar.total, bar.unit) for bar in bars] == [(10, 10, " images")] * 2


class Together:
    """The waiting of two processes that are threads."""

    def __init__(self):
        self.wait_for_everyone = threading.Barrier(2).wait


def test_processes_share_the_shards(tmp_path):
    """Each encodes every second shard; both then read all of them, as one process would have made them."""
    together, encoders = Together(), [Encoders(), Encoders()]
    items = [loads.items for loads in (Loads(18), Loads(18))]
    items[1][5] = items[0][5] = Item("5.png", "f", lambda: Image.open(io.BytesIO(b"nonsense")))

    def run(rank: int) -> LatentCache:
        mine, group = encoders[rank], ProcessGroup(rank=rank, world_size=2, state=together)
        networks = encoding.Encoders(mine.image, mine.text, [(64, 64)])
        return encode_images(iter(items[rank]), tmp_path / "two", networks, "f", group)

    with ThreadPoolExecutor(2) as threads:
        caches = list(threads.map(run, range(2)))
    alone = encode(items[0], tmp_path / "one", fingerprint="f")
    assert [one.images for one in encoders] == [4 + 4 + 2, 3 + 4]
    for cache in (*caches, alone):
        assert len(cache) == 17
        assert torch.equal(cache.batch(random()).latents, alone.batch(random()).latents)


def test_training_reads_mapped_shards(tmp_path):
    embeddings = encode(Loads(10).items, tmp_path).batch(random(4)).captions
    assert all(row.untyped_storage().nbytes() > row.nbytes for row in embeddings)  # a view of the whole file


def test_parquet_to_batch(tmp_path, caplog):
    """All of it at once: a stream, a damaged image, and resuming."""
    caplog.set_level(logging.WARNING)
    content = [plain(RED, (64, 64)), b"nonsense", plain(BLUE, (64, 64))]
    words = ["red", "nothing", "blue"]
    path = parquet(tmp_path / "a.parquet", {"image": "binary", "text": "string"}, image=content, text=words)
    encoders = Encoders()
    for _ in range(2):
        data = encode(captioned(path), tmp_path / "out", encoders)
        assert len(data) == 2 and "1 of 3 images are damaged and left out: a.parquet/row 1" in caplog.text
        caplog.clear()
    assert encoders.images == 2
