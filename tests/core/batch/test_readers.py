"""What `batch` writes is read back by Hugging Face's datasets and by our own trainer, in all three formats."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import standin
from PIL import Image

from sprint_core.batch import __main__ as command_line
from sprint_core.distill.dataset import captioned

CAPTIONS = [f"a cat of {i} kilograms" for i in range(5)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with one job in each format; their rows are the same."""
    base = tmp_path_factory.mktemp("batch")
    model = standin.make(base / "model")
    (base / "prompts.txt").write_text("\n".join(CAPTIONS))
    words = [str(base / "prompts.txt"), "--model", str(model), "--size", "64x96", "--steps", "1", "--seed", "4"]
    words += ["--image-format", "png", "--shard-rows", "3", "--batch", "3"]
    for kind in ("tar", "parquet", "folder"):
        assert command_line.main([*words, "--format", kind, "--out", str(base / kind)]) == 0
    return base


@pytest.fixture(scope="module")
def images(made) -> list[np.ndarray]:
    files = sorted((made / "folder").glob("train-*/*.png"))
    return [np.asarray(Image.open(file)) for file in files]


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder"])
def test_datasets_reads_the_folder(made, images, kind, tmp_path):
    words = {"path": "imagefolder", "data_dir": str(made / kind)} if kind == "folder" else {"path": str(made / kind)}
    read = datasets.load_dataset(**words, split="train", cache_dir=str(tmp_path))
    assert len(read) == 5
    for i, row in enumerate(sorted(read, key=lambda row: row.get("json", row)["id"])):  # listed as the disk has them
        about = row["json"] if kind == "tar" else row
        image = row["png"] if kind == "tar" else row["image"]
        assert np.array_equal(np.asarray(image), images[i])
        wanted = {"id": f"{i:09d}", "prompt": CAPTIONS[i], "seed": 4 + i, "steps": 1, "guidance": 4.5}
        wanted |= {"width": 64, "height": 96, "version": "0.2.0"}
        assert {name: about[name] for name in wanted} == wanted and len(about["model"]) == 64


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder"])
def test_our_trainer_reads_the_folder(made, images, kind):
    items = list(captioned.captioned(made / kind))
    assert [item.caption for item in items] == CAPTIONS
    for item, image in zip(items, images, strict=True):
        assert np.array_equal(np.asarray(item.load()), image)


def test_rows_of_a_table_hold_all_that_a_row_may_say(tmp_path):
    """Files that it started from are named beside the image itself."""
    from pyarrow import parquet

    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    row = {"prompt": "a red circle", "negative": "blue", "image": "in.png", "control": "in.png"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + '\n{"prompt": "a blue square"}')
    words = [str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out"), "--format", "parquet", "--size", "64x64"]
    assert command_line.main(words) == 0
    (file,) = (tmp_path / "out").glob("*.parquet")
    first, second = parquet.read_table(file).to_pylist()
    assert (first["negative"], first["image_from"], first["control_from"]) == ("blue", "in.png", "in.png")
    assert second["negative"] is None and second["image_from"] is None
    assert Image.open(io.BytesIO(first["image"]["bytes"])).size == (64, 64)
    assert first["image"]["path"] == "000000000.jpg"
