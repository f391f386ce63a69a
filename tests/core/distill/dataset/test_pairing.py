"""Captions in people's files: every encoding that says what it is, every ending, in folders as in shards.

What cannot be used is left out, counted, and named once.
"""

import io
import json
import logging
import os
import sys
import tarfile
import unicodedata
from pathlib import Path

import datasets
import pyarrow
import pytest
from picture_files import BLUE, RED, own_cache, parquet, plain, square, tar, write  # noqa: F401
from pyarrow import parquet as arrow

from sprint_core.distill.dataset.captioned import captioned

BEETLE = "ein Käfer 🐞, größer"
LATIN = "ein Käfer".encode("latin-1")
ENCODED = {
    "utf-8": BEETLE.encode(),
    "utf-8 with its mark": BEETLE.encode("utf-8-sig"),
    "utf-16 of Windows": BEETLE.encode("utf-16"),
    "utf-16, big end first": ("\ufeff" + BEETLE).encode("utf-16-be"),
    "utf-32": BEETLE.encode("utf-32"),
    "with the ends of Windows' lines": f"{BEETLE}\r\n".encode(),
}
NO_TEXT = {
    "latin-1": LATIN,
    "latin-1 with its first byte": b"\xff" + LATIN,
    "utf-16 without its mark": "a beetle".encode("utf-16-le"),
    "utf-16 with half a character": BEETLE.encode("utf-16") + b"\x00",
    "cut utf-8": BEETLE.encode()[:6],
}


def captions(path: Path) -> dict[str, str]:
    return {item.name: item.caption for item in captioned(path)}


def named_once(text: str, *names: str) -> bool:
    return all(text.count(name) == 1 for name in names)


@pytest.fixture(params=["folder", "shard"])
def place(request, tmp_path):
    """Writes files into a folder or a shard; captions by name without an ending, from there."""

    def make(files: dict[str, bytes | str]) -> dict[str, str]:
        if request.param == "folder":
            by_file = captions(write(tmp_path / "data", files))
            return {name.rsplit(".", 1)[0]: caption for name, caption in by_file.items()}
        by_file = captions(tar(tmp_path / "0.tar", files))
        return {name.removeprefix("0.tar/"): caption for name, caption in by_file.items()}

    return make


# --- encodings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ENCODED)
def test_text_says_its_encoding(place, how):
    files = {"a.png": plain(), "a.txt": ENCODED[how], "b.png": plain(), "b.caption": ENCODED[how]}
    assert place(files) == {"a": BEETLE, "b": BEETLE}


@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_says_its_encoding(place, mark):
    """Beside the image, and in tables, whose lines end at \\n alone."""
    strange = "one\u2028two\u2029three\x85four\x0bfive"
    rows = [{"file_name": "b.png", "text": strange}, {"file_name": "sub/c.png", "caption": BEETLE}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    files = {"a.png": plain(), "a.json": json.dumps({"caption": BEETLE}, ensure_ascii=False).encode(mark)}
    files |= {"b.png": plain(), "sub/c.png": plain(), "metadata.jsonl": lines.encode(mark)}
    files |= {"d.png": plain(), "captions.json": json.dumps({"d.png": strange}, ensure_ascii=False).encode(mark)}
    assert place(files) == {"a": BEETLE, "b": strange, "sub/c": BEETLE, "d": strange}


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
def test_spreadsheets_save_csv(place, mark):
    rows = f'file_name,text\r\na.png,"{BEETLE},\r\nand ""more"""\r\nsub/b.png,two\r\n'
    files = {"a.png": plain(), "sub/b.png": plain(), "metadata.csv": rows.encode(mark)}
    assert place(files) == {"a": f'{BEETLE},\r\nand "more"', "sub/b": "two"}


@pytest.mark.parametrize("how", NO_TEXT)
def test_other_text_is_left_out_and_named_once(place, how, caplog):
    files = {"a.png": plain(), "a.txt": "good", "beetle.png": plain(), "beetle.txt": NO_TEXT[how], "none.png": plain()}
    files |= {"c.png": plain(), "c.json": b'{"caption": "' + NO_TEXT[how] + b'"}'}
    assert place(files) == {"a": "good"}
    assert "2 of 4 images are left out" in caplog.text
    assert "its .txt is neither UTF-8 nor text with a byte order mark" in caplog.text
    assert named_once(caplog.text, "beetle", "none") and "�" not in caplog.text


def test_half_a_character_in_json_is_no_caption(place, caplog):
    """JSON can say half of a surrogate pair, which no tokenizer reads."""
    table = {"b.png": "half \ud83d", "c.png": "whole \U0001f41e"}
    files = {"a.png": plain(), "a.json": json.dumps({"text": "half \ud83d"}), "b.png": plain(), "c.png": plain()}
    assert place(files | {"captions.json": json.dumps(table)}) == {"c": "whole \U0001f41e"}
    assert "2 of 3 images are left out" in caplog.text and named_once(caplog.text, "its .json", "its row in a table")


def test_wrong_bytes_in_a_table_cost_only_their_rows(place, caplog):
    lines = b'{"file_name": "a.png", "text": "good"}\n{"file_name": "b.png", "text": "' + LATIN + b'"}\n'
    table = b'{"c.png": "' + LATIN + b'", "d.png": "good"}'
    images = {f"{name}.png": plain() for name in "abcd"}
    assert place(images | {"metadata.jsonl": lines, "captions.json": table}) == {"a": "good", "d": "good"}
    assert "2 of 4 images are left out" in caplog.text


def test_a_table_that_is_no_text_is_left_out_and_named(place, caplog):
    files = {"a.png": plain(), "a.txt": "good", "b.png": plain()}
    assert place(files | {"metadata.jsonl": '{"file_name": "b.png", "text": "b"}'.encode("utf-16-le")}) == {"a": "good"}
    assert "metadata.jsonl: left out: it is neither UTF-8" in caplog.text
    assert "1 of 2 images have no caption" in caplog.text


def test_none_that_can_be_used_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"none of 2 images can be used: a\.png \(its \.txt is neither UTF-8.*b\.png"):
        captioned(write(tmp_path, {"a.png": plain(), "a.txt": LATIN, "b.png": plain()}))


# --- names ------------------------------------------------------------------------------------------


def test_endings_in_any_case_and_dotted_names(place):
    files = {"a.JPG": plain(), "a.TXT": "a", "b.jpeg": plain(), "b.Caption": "b", "photo.v1.2.PNG": plain()}
    files |= {
        "photo.v1.2.txt": "dotted",
        "photo.v1.txt": "other",
        "photo.v1.3.webp": plain(),
        "photo.v1.3.JSON": '"json"',
    }
    files |= {"d.tiff": plain(), "d.caption": "d", "e.TIF": plain(), "e.png.txt": "no", "e.TIF.txt": "whole name"}
    files |= {
        "sub/f.Png": plain(),
        "sub/f.prompt": "f",
        "g.JPEG": plain(),
        "METADATA.JSONL": '{"file_name": "g.JPEG", "text": "g"}',
    }
    expected = {"a": "a", "b": "b", "photo.v1.2": "dotted", "photo.v1.3": "json", "d": "d", "e": "whole name"}
    assert place(files) == expected | {"sub/f": "f", "g": "g"}


def test_images_that_share_a_caption_are_told_apart(tmp_path):
    files = {"a.png": plain(RED), "a.webp": plain(BLUE), "a.txt": "both", "b.png": plain(), "b.txt": "b"}
    assert captions(write(tmp_path / "f", files)) == {"a.png": "both", "a.webp": "both", "b.png": "b"}
    items = list(captioned(tar(tmp_path / "0.tar", files)))
    assert {item.name: item.caption for item in items} == {
        "0.tar/a.png": "both",
        "0.tar/a.webp": "both",
        "0.tar/b": "b",
    }
    assert square(items[1].load(), 2)[:, 0, 0].tolist() == [-1.0, -1.0, 1.0]


def test_tables_spell_names_their_own_way(place):
    """An umlaut in one character or two, and names that are no UTF-8 at all."""
    whole, parts = (unicodedata.normalize(form, "kä.png") for form in ("NFC", "NFD"))
    assert place({parts: plain(), "captions.json": json.dumps({f"./{whole}": "k"})}) == {parts[:-4]: "k"}


def test_a_table_further_down_is_of_its_folder(place):
    lines = '{"file_name": "a.png", "text": "%s"}\n{"file_name": "sub/a.png", "text": "above"}'
    files = {"a.png": plain(), "sub/a.png": plain(), "metadata.jsonl": lines % "top"}
    assert place(files) == {"a": "top", "sub/a": "above"}
    assert place(files | {"sub/metadata.jsonl": lines % "own"}) == {"a": "top", "sub/a": "own"}


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="names are text there")
def test_names_that_are_no_text(tmp_path, caplog):
    for name in (b"k\xe4fer.png", b"none\xe4.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(plain())
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "k\xe4fer.png", "text": "a beetle"}\n')
    assert list(captions(tmp_path).values()) == ["a beetle"]
    assert "1 of 2 images have no caption: none\\xe4.png" in caplog.text


def test_what_is_not_read_is_named_once(place, caplog):
    """Of unread kinds, without captions, and more of these than fit into the warning."""
    caplog.set_level(logging.INFO)
    files = {
        "a.png": plain(),
        "a.txt": "good",
        "b.heic": b"",
        "b.txt": "b",
        "c.JXL": b"",
        "._d.png": b"",
        "sub/.e/f.png": b"",
    }
    assert place(files | {f"without_{i:02d}.png": plain() for i in range(99)}) == {"a": "good"}
    assert "2 of 102 images are left out" in caplog.text and "99 of 102 images have no caption" in caplog.text
    assert named_once(caplog.text, "kind that is not read: heic", "kind that is not read: jxl")
    assert named_once(caplog.text, *(f"without_{i:02d}" for i in range(99)))
    assert "_d" not in caplog.text and ".e" not in caplog.text


# --- shards, images and tables side by side ---------------------------------------------------------


def test_a_shard_hides_nothing_beside_it(tmp_path, caplog):
    tar(
        tmp_path / "sub" / "0.tar" if (tmp_path / "sub").mkdir() else tmp_path / "0.tar",
        {"a.png": plain(), "a.txt": "a"},
    )
    write(tmp_path, {"b.png": plain(), "b.txt": "b", "sub/0.png": plain(), "sub/0.txt": "zero", "c.png": plain()})
    parquet(tmp_path / "d.parquet", {"image": "binary", "text": "string"}, image=[plain()], text=["d"])
    parquet(tmp_path / "urls.parquet", {"url": "string", "text": "string"}, url=["http"], text=["of img2dataset"])
    expected = {"0.tar/a": "a", "b.png": "b", "sub/0.png": "zero", "d.parquet/row 0": "d"}
    assert captions(tmp_path) == expected
    assert "1 of 5 images have no caption: c.png" in caplog.text


def test_shards_need_no_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert captions(tar(tmp_path / "0.tar", {"a.png": plain(), "a.txt": "a"})) == {"0.tar/a": "a"}


def test_what_a_shard_may_hold(tmp_path):
    """Captions far from their images, ./ before names, links to earlier files, names and folders that end in .png."""
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in (("./x/ä.png", plain(RED)), ("b.png", plain(BLUE)), ("./x/ä.txt", b"far")):
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
        for name, kind, target in (("c.png", tarfile.LNKTYPE, "b.png"), ("d.png", tarfile.DIRTYPE, "")):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, target
            archive.addfile(about)
        about = tarfile.TarInfo("metadata.jsonl")
        text = b'{"file_name": "b.png", "text": "b"}\n{"file_name": "c.png", "text": "c"}\n'
        about.size = len(text)
        archive.addfile(about, io.BytesIO(text))
    items = list(captioned(tmp_path))
    assert {item.name: item.caption for item in items} == {"0.tar/x/ä": "far", "0.tar/b": "b", "0.tar/c": "c"}
    assert square(items[2].load(), 2)[:, 0, 0].tolist() == [-1.0, -1.0, 1.0]


def test_a_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"0\.tar: compressed; unpack it"):
        captioned(tmp_path)


def test_wrong_bytes_in_parquet_cost_only_their_rows(tmp_path, caplog):
    texts = pyarrow.array([b"good", LATIN, BEETLE.encode()], pyarrow.binary()).view(pyarrow.string())
    images = pyarrow.array([plain()] * 3, pyarrow.binary())
    arrow.write_table(pyarrow.table({"image": images, "text": texts}), tmp_path / "a.parquet")
    assert captions(tmp_path) == {"a.parquet/row 0": "good", "a.parquet/row 2": BEETLE}
    assert "1 of 3 images are left out: a.parquet/row 1 (its caption is neither UTF-8" in caplog.text
    binary = {"image": datasets.Value("binary"), "caption": datasets.Value("binary")}
    parquet(tmp_path / "b.parquet", binary, image=[plain()], caption=[BEETLE.encode("utf-16")])
    assert captions(tmp_path / "b.parquet") == {"b.parquet/row 0": BEETLE}


def test_a_parquet_file_may_be_the_table(place, tmp_path):
    """metadata.parquet, as Hugging Face's image folders have it: names and captions, no images."""
    text = {"file_name": "string", "text": "string"}
    table = parquet(tmp_path / "t.parquet", text, file_name=["a.png", "sub/b.png"], text=[BEETLE, "two"]).read_bytes()
    files = {"a.png": plain(), "sub/b.png": plain(), "metadata.parquet": table}
    assert place(files) == {"a": BEETLE, "sub/b": "two"}
    with pytest.raises(ValueError, match=r"metadata\.parquet: .*[Pp]arquet"):
        place({"a.png": plain(), "metadata.parquet": b"nonsense"})


def test_a_caption_that_cannot_be_read_costs_only_its_image(tmp_path, caplog):
    write(tmp_path, {"a.png": plain(), "a.txt": "good", "b.png": plain()})
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    assert captions(tmp_path) == {"a.png": "good"}
    assert "1 of 2 images are left out: b.png (its .txt cannot be read: No such file or directory)" in caplog.text
