"""Images of many aspect ratios: each cropped to its bin, each batch of one bin, in all processes alike."""

import collections
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_caches import SIZES, latent_cache
from picture_files import RED, WHITE
from PIL import Image
from processes import run_two

from sprint_core.distill.dataset import encoding
from sprint_core.distill.dataset.captioned import cropped
from sprint_core.distill.dataset.encoding import Encoders, encode_images
from sprint_core.distill.dataset.latent_cache import LatentCache
from sprint_core.distill.dataset.pairing import Item
from sprint_core.distill.engine.processes import ProcessGroup, launched_processes
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.images import sizes

BINS = sizes.bins(64)  # 96 x 64, 64 x 64 and 64 x 96
SHAPES = {0: (64, 64), 1: (200, 100), 2: (60, 90), 3: (65, 64), 4: (5000, 2), 5: (1, 1), 6: (2, 5000), 7: (96, 64)}
EXPECTED = {0: (2, 2), 1: (2, 3), 2: (3, 2), 3: (2, 2), 4: (2, 3), 5: (2, 2), 6: (3, 2), 7: (2, 3)}  # latents


def items() -> list[Item]:
    return [Item(f"{n}.png", str(n), lambda n=n: Image.new("RGB", SHAPES[n], (20 * n, 0, 0))) for n in SHAPES]


def image(pixels: torch.Tensor) -> torch.Tensor:
    """A latent repeats the colours of squares of 32 pixels."""
    return torch.nn.functional.avg_pool2d(pixels, 32).repeat(1, 11, 1, 1)[:, :32]


def text(captions: list[str]) -> list[torch.Tensor]:
    return [torch.tensor([[float(caption or -1)]]) for caption in captions]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> LatentCache:
    """In shards of five images, of which three are encoded at once."""
    monkeypatch.setattr(encoding, "SHARD", 5)
    monkeypatch.setattr(encoding, "BATCH", 3)
    return encode_images(items(), tmp_path, Encoders(image, text, BINS), "f")


def numbers(captions) -> list[int]:
    return [int(caption) for caption in captions]


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (50, 50), (301, 7), (7, 301), (1, 1), (9000, 1)])
def test_a_crop_is_of_the_nearest_ratio_and_undistorted(shape):
    """Resized to cover its bin, then cut in the middle, as Pillow does it in two steps."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8))
    cut = cropped(noise, sizes.bins(512)).add(1).mul(127.5).movedim(0, -1).numpy()
    height, width = cut.shape[:2]
    ratio = shape[1] / shape[0]
    assert abs(height / width - ratio) <= min(abs(h / w - ratio) for w, h in sizes.bins(512)) + 0.01
    factor = max(width / shape[0], height / shape[1])
    box = ((shape[0] - width / factor) / 2, (shape[1] - height / factor) / 2)
    box += (shape[0] - box[0], shape[1] - box[1])
    expected = noise.resize((width, height), Image.Resampling.LANCZOS, box=box)
    assert np.abs(cut - np.asarray(expected, np.float32)).max() <= 1


def test_the_middle_is_kept():
    wide = Image.new("RGB", (400, 64), WHITE)
    wide.paste(Image.new("RGB", (96, 64), RED), (152, 0))
    cut = cropped(wide, BINS)
    assert cut.shape == (3, 64, 96) and (cut[0] == 1).all() and (cut[1:] == -1).all()


def test_shards_hold_each_size_apart(cache, tmp_path):
    """And every image with its own caption, in the size of its ratio."""
    seen = {}
    for step in range(40):
        batch = cache.batch(SampleRandom(0, step, "test", range(4)))
        for latent, number in zip(batch.latents, numbers(batch.captions), strict=True):
            seen[number] = tuple(latent.shape[1:])
            assert torch.allclose(latent[0], torch.full(EXPECTED[number], 20 * number / 127.5 - 1), atol=1e-3)
    assert seen == EXPECTED
    from safetensors.torch import load_file

    first = load_file(tmp_path / "shard_00000.safetensors")
    assert {name: len(tensor) for name, tensor in first.items() if name.startswith("latents")} == {
        "latents 2x2": 2,
        "latents 2x3": 2,
        "latents 3x2": 1,
    }


def test_a_resumed_encoding_is_the_same(cache, tmp_path):
    again = encode_images(items(), tmp_path, Encoders(image, text, BINS), "f")
    for step in range(5):
        a, b = (one.batch(SampleRandom(0, step, "test", range(4))) for one in (cache, again))
        assert torch.equal(a.latents, b.latents) and numbers(a.captions) == numbers(b.captions)


def test_every_image_is_as_likely(cache):
    drawn = collections.Counter()
    for step in range(1500):
        rows = numbers(cache.batch(SampleRandom(0, step, "test", range(4))).captions)
        assert len({EXPECTED[number] for number in rows}) == 1
        drawn.update(rows)
    assert set(drawn) == set(SHAPES)  # 750 each, of 1500 draws of bins: +- 26 by bin, +- 25 in it
    assert all(abs(count - 750) < 150 for count in drawn.values()), drawn


def test_micro_batches_and_processes_share_a_bin(cache):
    """Each takes its part of what one process draws at once."""
    drawn = ProcessGroup(draws_on_device=True)
    for step in range(20):
        whole = cache.batch(SampleRandom(0, step, "test", range(6)))
        parts = [cache.batch(drawn.random(0, step, "test", range(i, i + 2))) for i in (0, 2, 4)]
        assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
        assert [n for part in parts for n in numbers(part.captions)] == numbers(whole.captions)


def test_what_is_watched_is_of_the_size_that_most_have(cache):
    """Here two sizes have three images each, and one has two."""
    common = cache.of_one_size()
    assert len(common) == 3 and len(cache) == 8
    shapes = {common.batch(SampleRandom(0, step, "watch", range(4))).latents.shape for step in range(20)}
    assert len(shapes) == 1


def test_control_images_are_cropped_alike_and_half_are_scribbles(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 4)
    were_scribbles = []

    def control(pixels: torch.Tensor, scribbles: torch.Tensor) -> torch.Tensor:
        were_scribbles.extend(scribbles.tolist())
        return pixels + 1

    made = encode_images(items(), tmp_path, Encoders(image, text, BINS, control), "f")
    assert sorted(were_scribbles) == [False] * 4 + [True] * 4
    for step in range(10):
        batch = made.batch(SampleRandom(0, step, "test", range(4)))
        torch.testing.assert_close(batch.hints, batch.latents + 1, rtol=0, atol=2e-3)


def one_of_two(out: Path) -> None:
    """What each process of the next test runs."""
    processes = launched_processes("cpu")
    made = latent_cache(out / f"cache{processes.rank}")
    batches = [made.batch(processes.random(0, step, "test", processes.share(4))).latents for step in range(12)]
    torch.save(batches, out / f"{processes.rank}.pt")


def test_two_processes_take_their_shares_of_one_bin(tmp_path):
    run_two(__file__, tmp_path)
    made = latent_cache(tmp_path / "cache")
    shapes = set()
    for step, (first, second) in enumerate(zip(*(torch.load(tmp_path / f"{n}.pt") for n in (0, 1)), strict=True)):
        whole = made.batch(SampleRandom(0, step, "test", range(4))).latents
        assert len(first) == len(second) == 2 and torch.equal(torch.cat([first, second]), whole)
        shapes.add(tuple(whole.shape[2:]))
    assert shapes == set(SIZES)


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
