"""Reading captioned images in every layout, and what becomes of their pixels."""

import io
import json
import operator
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from picture_files import BLUE, RED, WHITE, encoded_bytes, own_cache, parquet, plain, square, tar, write  # noqa: F401
from PIL import Image

from sprint_core.distill.dataset.captioned import captioned

ROOT = Path(__file__).resolve().parents[4]


def captions(path: Path) -> dict[str, str]:
    return {item.name: item.caption for item in captioned(path)}


# --- folders ----------------------------------------------------------------------------------------


def test_captions_beside_the_images(tmp_path):
    files = {
        "b.PNG": plain(),
        "b.txt": "\ufeff a bee \n",
        "deep/er/a.jpg": encoded_bytes(Image.new("RGB", (8, 8)), "JPEG"),
        "deep/er/a.json": json.dumps({"prompt": "an ant", "width": 8}),
        "c.webp": encoded_bytes(Image.new("RGB", (8, 8)), "WEBP"),
        "c.json": json.dumps({"text": ["a cat", "a kitten"]}),
        "d.bmp": encoded_bytes(Image.new("RGB", (8, 8)), "BMP"),
        "d.json": json.dumps({"caption": "a dog"}),
        "e.jpeg": encoded_bytes(Image.new("RGB", (8, 8)), "JPEG"),
        "e.txt": "an eel",
        ".hidden/f.png": plain(),
        ".hidden/f.txt": "not ours",
    }
    expected = {"b.PNG": "a bee", "c.webp": "a cat", "d.bmp": "a dog", "deep/er/a.jpg": "an ant", "e.jpeg": "an eel"}
    by_file = captions(write(tmp_path, files))
    assert by_file == expected and list(by_file) == sorted(expected)
    assert all(square(item.load(), 4).shape == (3, 4, 4) for item in captioned(tmp_path))
    assert operator.length_hint(captioned(tmp_path)) == 5


TABLES = {
    "captions.json": json.dumps({"a.png": "one", "./sub/b.png": {"caption": "two"}}),
    "metadata.jsonl": '{"file_name": "a.png", "text": "one"}\n\n{"file_name": "sub/b.png", "prompt": "two"}\n',
    "captions.jsonl": '{"file_name": "a.png", "caption": "one"}\n{"file_name": "sub\\\\b.png", "caption": "two"}',
}


@pytest.mark.parametrize("name", TABLES)
def test_captions_in_one_table(tmp_path, name):
    write(tmp_path, {"a.png": plain(), "sub/b.png": plain(), name: TABLES[name]})
    assert captions(tmp_path) == {"a.png": "one", "sub/b.png": "two"}


def test_an_images_own_caption_comes_first(tmp_path):
    write(tmp_path, {"a.png": plain(), "sub/b.png": plain(), "a.txt": "own", "captions.json": TABLES["captions.json"]})
    assert captions(tmp_path) == {"a.png": "own", "sub/b.png": "two"}


def test_images_without_caption_are_left_out_and_named(tmp_path, caplog):
    files = {f"{i}.png": plain() for i in range(9)}
    write(tmp_path, files | {"1.txt": "one", "2.txt": " \n", "3.json": "{half", "4.json": "[]", "8.txt": "eight"})
    assert captions(tmp_path) == {"1.png": "one", "8.png": "eight"}
    assert "7 of 9 images have no caption: 0.png, 2.png, 3.png, 4.png, 5.png, ..." in caplog.text


def test_what_cannot_be_read_at_all_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        captioned(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no images \(jpg, jpeg, .*tiff.*\), parquet files or \.tar"):
        captioned(write(tmp_path, {"a.txt": "words"}))
    with pytest.raises(ValueError, match=r"2 images, but not one has a caption: .*NAME\.txt.*captions\.json.*column"):
        captioned(write(tmp_path, {"b.png": plain(), "c.png": plain(), "c.txt": ""}))
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: expected"):
        captioned(write(tmp_path, {"metadata.jsonl": '{"file_name": "b.png", "text": "b"}\n{"text": "c"}'}))
    with pytest.raises(ValueError, match=r"captions\.json: not readable as JSON"):
        captioned(write(tmp_path, {"captions.json": "{half"}))


# --- parquet and webdataset -------------------------------------------------------------------------


def test_parquet(tmp_path, caplog):
    """The library's own image column, and plain bytes; over several files; rows without an image do not count."""
    folder = tmp_path / "odd [1]*"  # the library takes names for patterns
    folder.mkdir()
    image, rows = datasets.Image(), [{"bytes": plain(colour), "path": None} for colour in (RED, BLUE)]
    parquet(
        folder / "b.parquet", {"image": image, "text": "string", "n": "int32"}, image=rows, text=["r", ""], n=[1, 2]
    )
    described = [json.dumps({"prompt": "one"}), None, json.dumps({"caption": "three"})]
    parquet(folder / "a.parquet", {"jpg": "binary", "json": "string"}, jpg=[plain(), plain(), None], json=described)
    items = captioned(folder)
    assert operator.length_hint(items) == 5
    items = list(items)
    assert [(item.name, item.caption) for item in items] == [("a.parquet/row 0", "one"), ("b.parquet/row 0", "r")]
    assert square(items[1].load(), 2)[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert "2 of 4 images have no caption: a.parquet/row 1, b.parquet/row 1" in caplog.text
    assert captions(folder / "b.parquet") == {"b.parquet/row 0": "r"}


def test_webdataset(tmp_path, caplog):
    """Samples that differ in their files from the first on, which the library alone refuses."""
    jpg = encoded_bytes(Image.new("RGB", (8, 8), BLUE), "JPEG")
    first = {"x/0.jpg": jpg, "x/1.jpg": jpg, "x/1.json": json.dumps({"caption": "one", "width": 8})}
    first |= {"x/2.png": plain(), "x/2.txt": "two", "x/2.cls": "7", "x/3.txt": "no image"}
    tar(tmp_path / "00000.tar", first)
    tar(tmp_path / "00001.tar", {"0.webp": plain(), "0.txt": "zero", "0.json": json.dumps({"text": "other", "x": []})})
    parquet(tmp_path / "00000.parquet", {"url": "string"}, url=["of img2dataset, beside its shards"])
    expected = {"00000.tar/x/1": "one", "00000.tar/x/2": "two", "00001.tar/0": "zero"}
    items = list(captioned(tmp_path))
    assert {item.name: item.caption for item in items} == expected
    assert square(items[1].load(), 2)[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert "1 of 4 images have no caption: 00000.tar/x/0" in caplog.text
    assert operator.length_hint(items.__iter__()) == 3 and operator.length_hint(captioned(tmp_path)) == 0


def test_bad_parquet_and_shards_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.parquet: .*[Pp]arquet"):
        captioned(write(tmp_path / "p", {"a.parquet": b"nonsense"}))
    text = parquet(tmp_path / "t.parquet", {"text": "string"}, text=["a"])
    with pytest.raises(ValueError, match=r"t\.parquet: no column of the images .* among text"):
        captioned(text)
    image = parquet(tmp_path / "i.parquet", {"image": "binary", "n": "int32"}, image=[plain()], n=[1])
    with pytest.raises(ValueError, match=r"i\.parquet: no column of the captions .* among image, n"):
        captioned(image)
    with pytest.raises(ValueError, match="no images in it"):
        captioned(tar(tmp_path / "a.tar", {"0.txt": "words"}))
    shard = tar(tmp_path / "b.tar", {"0.png": plain(), "0.txt": "a", "1.png": plain(BLUE, (512, 512)), "1.txt": "b"})
    shard.write_bytes(shard.read_bytes()[:3000])
    items = captioned(shard)
    assert next(items).caption == "a"
    with pytest.raises(ValueError, match=r"b\.tar: "):
        next(items)


def test_the_library_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    parquet(tmp_path / "a.parquet", {"image": "binary", "text": "string"}, image=[plain()], text=["a"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        captioned(tmp_path)
    assert captions(write(tmp_path / "folder", {"a.png": plain(), "a.txt": "a"})) == {"a.png": "a"}


def test_the_library_is_imported_only_where_it_is_needed():
    code = f"import sys; sys.path.append({str(ROOT)!r}); import sprint_core.distill.dataset.captioned\n"
    code += "assert not {'datasets', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- pixels -----------------------------------------------------------------------------------------


def colours(image: Image.Image, px: int) -> list[list[tuple[int, ...]]]:
    """Rows of 8-bit pixels after `square`."""
    pixels = square(image, px)
    assert pixels.shape == (3, px, px) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    return [[tuple(p) for p in row] for row in pixels.add(1).mul(127.5).round().int().movedim(0, -1).tolist()]


def test_square_keeps_the_middle():
    wide = Image.new("RGB", (40, 20), WHITE)
    wide.paste(Image.new("RGB", (20, 20), BLUE), (10, 0))
    assert colours(wide, 20) == [[BLUE] * 20] * 20
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert colours(tall, 20) == [[BLUE] * 20] * 20
    assert colours(Image.new("L", (3, 7), 0), 5) == [[(0, 0, 0)] * 5] * 5


def test_square_scales_as_resize_then_crop():
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    reference = Image.fromarray(noise).resize((32, 24), Image.Resampling.LANCZOS).crop((4, 0, 28, 24))
    assert np.abs(np.array(colours(Image.fromarray(noise), 24)) - np.asarray(reference).astype(int)).max() <= 1


def test_square_turns_by_exif():
    image = Image.new("RGB", (16, 16), BLUE)
    image.paste(Image.new("RGB", (16, 8), RED), (0, 0))  # red above
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: red on the right
    turned = colours(Image.open(io.BytesIO(encoded_bytes(image, "PNG", exif=exif))), 16)
    assert turned == [[BLUE] * 8 + [RED] * 8] * 16


def test_square_puts_transparency_over_white():
    clear = Image.new("RGBA", (4, 4), (*RED, 0))
    clear.putpixel((0, 0), (*RED, 255))
    assert colours(clear, 4)[0] == [RED, WHITE, WHITE, WHITE]
    half = Image.new("LA", (4, 4), (0, 128))
    assert colours(half, 4)[0][0] == (127, 127, 127)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([*RED, *BLUE])
    assert colours(palette, 4)[0][0] == BLUE
    palette.info["transparency"] = 1
    assert colours(palette, 4)[0][0] == WHITE


def test_square_scales_16_bits():
    grey = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert colours(Image.open(io.BytesIO(encoded_bytes(grey))), 4)[0][0] == (128, 128, 128)
