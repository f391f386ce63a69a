"""A latent cache that was written by hand, for tests of what reads it."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from sprint_core.distill.dataset.latent_cache import LatentCache, Shard

WIDTH = 64  # of captions, as the stand-ins' transformers read them
SIZES = {(2, 2): 3, (2, 3): 4}  # of latents, and how many of each shard's images are so


def write_shard(path: Path, seed: int, hints: bool = False) -> Shard:
    """Captions have 1 to 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (sum(SIZES.values()),), generator=generator, dtype=torch.int32)
    captions = torch.randn(int(lengths.sum()), WIDTH, generator=generator).bfloat16()
    tensors = {"captions": captions, "lengths": lengths}
    for name in ("latents", *["hints"] * hints):
        for size, count in SIZES.items():
            latents = torch.randn(count, 32, *size, generator=generator).half()
            tensors[f"{name} {size[0]}x{size[1]}"] = latents
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return Shard(path)


def latent_cache(folder: Path, hints: bool = False, kind: type[LatentCache] = LatentCache) -> LatentCache:
    """Of two shards, with images of two sizes."""
    shards = [write_shard(folder / f"{i}.safetensors", i, hints) for i in range(2)]
    return kind(shards, torch.full((1, WIDTH), 0.1).bfloat16(), "by hand")
