"""Small files of captioned pictures, in every layout that training reads."""

import io
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from sprint_core.distill.dataset.captioned import cropped

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """The library leaves a lock for each file that it reads. For every test of a module that imports this."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def encoded_bytes(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def square(image: Image.Image, px: int) -> torch.Tensor:
    """[3, px, px] in [-1, 1] of an image, as training reads it without buckets."""
    return cropped(image, [(px, px)])


def plain(colour=RED, size=(8, 8)) -> bytes:
    return encoded_bytes(Image.new("RGB", size, colour))


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def tar(path: Path, files: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def parquet(path: Path, features: dict, **columns) -> Path:
    types = {name: datasets.Value(kind) if isinstance(kind, str) else kind for name, kind in features.items()}
    datasets.Dataset.from_dict(columns, datasets.Features(types)).to_parquet(path)
    return path
