"""Files of the emoji world's art that are damaged: one sentence with the file's name, never a traceback."""

import io
import json
import zipfile

import pytest
from PIL import Image

from sprint_core.emoji import art, templates
from sprint_core.emoji.concepts import concepts

LABELS = json.dumps([concept.label for concept in concepts()])


def drawing(size_px: int = art.SPRITE_PX) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (size_px, size_px), (10, 20, 30, 255)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def sprites(path, entries: dict[str, str | bytes]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)


def test_whole_sprites_are_read(tmp_path):
    sprites(tmp_path / "sprites.zip", {"concepts.json": LABELS, "flat/3.webp": drawing()})
    read = art.load(tmp_path / "sprites.zip")
    assert read.has.nonzero().tolist() == [[1, 3]] and read.sprites[1, 3, :, 0, 0].tolist() == [10, 20, 30, 255]


@pytest.mark.parametrize(
    "entries, says",
    [
        ({"3d/0.webp": drawing()}, "not sprites.zip, or damaged"),
        ({"concepts.json": "{"}, "not sprites.zip, or damaged"),
        ({"concepts.json": "[" * 100_000}, "not sprites.zip, or damaged"),
        ({"concepts.json": b"\xff\xfe\x00"}, "not sprites.zip, or damaged"),
        ({"concepts.json": "[]"}, "holds sprites of other concepts"),
        ({"concepts.json": LABELS, "3d.webp": drawing()}, "its 3d.webp is no drawing"),
        ({"concepts.json": LABELS, "3d/9999.webp": drawing()}, "its 3d/9999.webp is no drawing"),
        ({"concepts.json": LABELS, "3d/-1.webp": drawing()}, "its 3d/-1.webp is no drawing"),
        ({"concepts.json": LABELS, "4d/0.webp": drawing()}, "its 4d/0.webp is no drawing"),
        ({"concepts.json": LABELS, "3d/0.webp": b"hello"}, "its 3d/0.webp is no drawing"),
        ({"concepts.json": LABELS, "3d/0.webp": drawing()[:40]}, "its 3d/0.webp is no drawing"),
        ({"concepts.json": LABELS, "3d/0.webp": drawing(100)}, "its 3d/0.webp is no drawing of 224 pixels"),
    ],
)
def test_damaged_sprites(tmp_path, entries, says):
    path = tmp_path / "sprites.zip"
    sprites(path, entries)
    with pytest.raises(ValueError, match=rf"sprites\.zip:? {says}.*; prepare it anew") as error:
        art.load(path)
    assert "\n" not in str(error.value)


def test_a_folder_where_thumbnails_should_be(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}: no such file"):
        templates.load(tmp_path)
