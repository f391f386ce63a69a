"""A latent cache that was written by hand, for tests of what reads it."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from sprint_core.distill.dataset.latent_cache import LatentCache, Shard

WIDTH = 64  # of captions, as the stand-ins' transformers read them


def write_shard(path: Path, count: int, seed: int, hints: bool = False) -> Shard:
    """Captions have 1 to 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (count,), generator=generator, dtype=torch.int32)
    captions = torch.randn(int(lengths.sum()), WIDTH, generator=generator).bfloat16()
    tensors = {"captions": captions, "lengths": lengths}
    for name in ("latents", *["hints"] * hints):
        tensors[name] = torch.randn(count, 32, 2, 2, generator=generator).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return Shard(path)


def latent_cache(folder: Path, counts: tuple[int, ...] = (5, 3), hints: bool = False) -> LatentCache:
    """Of shards with as many images."""
    shards = [write_shard(folder / f"{i}.safetensors", count, i, hints) for i, count in enumerate(counts)]
    return LatentCache(shards, torch.full((1, WIDTH), 0.1).bfloat16(), "by hand")
