"""Images of more than 8 bits a channel: scaled by their type or refused, everywhere that an image file is read."""

import io
import struct
import zlib

import numpy as np
import pytest
from picture_files import square
from PIL import Image, ImageCms

from sprint_core.images.files import read, rgb

WHITE = (255, 255, 255)
BLACK_IS_ZERO, WHITE_IS_ZERO, COLOUR = 1, 0, 2
UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def tiff(data: bytes, width: int, bits: int, kind: int = UNSIGNED, photometric: int = BLACK_IS_ZERO, turned=1, n=1):
    """One row of an uncompressed TIFF of n numbers a pixel, made by hand: Pillow writes few of its kinds."""
    short, long = 3, 4
    tags = {256: (long, width), 257: (long, 1), 258: (short, bits), 259: (short, 1), 262: (short, photometric)}
    tags |= {273: (long, None), 274: (short, turned), 277: (short, n), 278: (long, 1), 279: (long, len(data))}
    tags |= {339: (short, kind)}
    start, several = 8 + 2 + 12 * len(tags) + 4, b""
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, (size, value) in sorted(tags.items()):
        value = start + (4 * n if n > 1 else 0) if value is None else value
        if n > 1 and tag in (258, 339):
            header += struct.pack("<HHII", tag, size, n, start + len(several))
            several += struct.pack(f"<{n}H", *[value] * n)
        else:
            header += struct.pack("<HHI", tag, size, 1) + struct.pack("<I" if size == long else "<H2x", value)
    return header + struct.pack("<I", 0) + several + data


def png(numbers: list[int], colour: int, clear: bytes = b"") -> bytes:
    """One row of a 16-bit PNG. colour: 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA; clear: the transparent colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width = len(numbers) // {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    pixels = zlib.compress(b"\0" + struct.pack(f">{len(numbers)}H", *numbers))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, 16, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + (chunk(b"tRNS", clear) if clear else b"") + chunk(b"IDAT", pixels) + END


END = b"\0\0\0\0IEND\xaeB`\x82"


def shown(data: bytes) -> list[int]:
    """The levels of a grey image as it is shown, in reading order."""
    image = rgb(Image.open(io.BytesIO(data)))
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels == pixels[..., :1]).all()
    return pixels[..., 0].flatten().tolist()


SIXTEEN = np.array([0, 0x1234, 0x8000, 0xFFFF], "<u2").tobytes()
UNIT = np.array([0, 0.25, 0.5, 1], "<f4").tobytes()
GREY = {
    "16 bits": (tiff(SIXTEEN, 4, 16), [0, 18, 128, 255]),
    "16 bits, white is 0": (tiff(SIXTEEN, 4, 16, photometric=WHITE_IS_ZERO), [255, 237, 127, 0]),
    "12 bits": (tiff(bytes([0x00, 0x08, 0x00, 0xFF, 0xF1, 0x23]), 4, 12), [0, 128, 255, 18]),
    "floats": (tiff(UNIT, 4, 32, FLOAT), [0, 64, 128, 255]),
    "floats, white is 0": (tiff(UNIT, 4, 32, FLOAT, WHITE_IS_ZERO), [255, 191, 128, 0]),
    "floats that overshoot": (tiff(np.array([-0.005, 1.008], "<f4").tobytes(), 2, 32, FLOAT), [0, 255]),
    "PNG": (png([0, 0x1234, 0x8000, 0xFFFF], 0), [0, 18, 128, 255]),
    "PNG with a transparent grey": (png([0, 0x1234, 0x8000], 0, b"\x12\x34"), [0, 255, 128]),
    "PNG with alpha": (png([0x8000, 0xFFFF, 0, 0], 4), [128, 255]),
}


@pytest.mark.parametrize("name", GREY)
def test_grey(name):
    data, levels = GREY[name]
    assert shown(data) == pytest.approx(levels, abs=1)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_as_pillow_writes_them(format):
    levels = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, format)
    assert np.abs(np.array(shown(file.getvalue())) - levels.flatten() / 257).max() <= 0.51


def test_colour():
    """Each channel's high byte; its transparent colour has 16 bits, too."""
    sixteen = np.array([0x1234, 0x8000, 0xFFFF], "<u2").tobytes()
    for data in (tiff(sixteen, 1, 16, photometric=COLOUR, n=3), png([0x1234, 0x8000, 0xFFFF], 2)):
        assert rgb(Image.open(io.BytesIO(data))).getpixel((0, 0)) == (0x12, 0x80, 0xFF)
    clear = png([0x1234, 0, 0, 0x8000, 0x8001, 0x8002], 2, struct.pack(">3H", 0x8000, 0x8001, 0x8002))
    image = rgb(Image.open(io.BytesIO(clear)))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(0x12, 0, 0), WHITE]
    image = rgb(Image.open(io.BytesIO(clear)), "black")
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(0x12, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize("kind, bits, data", [(UNSIGNED, 16, SIXTEEN), (FLOAT, 32, UNIT)], ids=["16", "float"])
def test_turned_as_tiff_says(kind, bits, data):
    """A row that is shown as a column (6: its left end up) or the other way round (3)."""
    levels = [0, 18, 128, 255] if kind == UNSIGNED else [0, 64, 128, 255]
    image = rgb(Image.open(io.BytesIO(tiff(data, 4, bits, kind, turned=6))))
    assert image.size == (1, 4) and [image.getpixel((0, y))[0] for y in range(4)] == pytest.approx(levels, abs=1)
    assert shown(tiff(data, 4, bits, kind, turned=3)) == pytest.approx(levels[::-1], abs=1)


def test_turned_as_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16)).save(file, "PNG", exif=exif)
    image = rgb(Image.open(file))
    assert image.size == (1, 3) and [image.getpixel((0, y))[0] for y in range(3)] == [0, 128, 255]


REFUSED = {
    "32 bits": (tiff(np.array([0, 2**31], "<u4").tobytes(), 2, 32), "32-bit integers"),
    "32 bits, signed": (tiff(np.array([0, 65535], "<i4").tobytes(), 2, 32, SIGNED), "signed"),
    "16 bits, signed": (tiff(np.array([-1, 9], "<i2").tobytes(), 2, 16, SIGNED), "signed"),
    "8 bits, signed": (tiff(np.array([-1, 9], "i1").tobytes(), 2, 8, SIGNED), "signed"),
    "floats to 255": (tiff(np.array([0, 255], "<f4").tobytes(), 2, 32, FLOAT), "from 0 to 255, not from 0"),
    "NaN": (tiff(np.array([0, np.nan], "<f4").tobytes(), 2, 32, FLOAT), "from nan to nan"),
    "colour in floats": (tiff(UNIT[:12], 1, 32, FLOAT, COLOUR, n=3), "of an unknown kind"),
    "64-bit floats": (tiff(np.array([0, 1.0]).tobytes(), 2, 64, FLOAT), "of an unknown kind"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_white_is_refused(tmp_path, name):
    """Never shown clipped; the sentence names the file, and the number that does not fit."""
    data, reason = REFUSED[name]
    file = tmp_path / "a.tiff"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"--image .*a\.tiff: .*{reason}"):
        read(file, "--image")
    with pytest.raises((ValueError, OSError)):
        square(Image.open(file), 4)


def test_other_colour_spaces():
    """CMYK, YCbCr and Lab, in which some files are, mean the same colour."""
    red = Image.new("RGB", (8, 8), (200, 30, 60))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(red, *profiles, outputMode="LAB")
    for image, format in [
        (red.convert("CMYK"), "TIFF"), (red.convert("CMYK"), "JPEG"), (red.convert("YCbCr"), "JPEG"), (lab, "TIFF"),
    ]:  # fmt: skip
        file = io.BytesIO()
        image.save(file, format)
        pixel = rgb(Image.open(file)).getpixel((4, 4))
        assert pixel == pytest.approx((200, 30, 60), abs=2), (image.mode, format)


def test_transparency_of_palettes():
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    for format in ("PNG", "GIF"):
        file = io.BytesIO()
        palette.save(file, format, transparency=1)
        image = rgb(Image.open(file))
        assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), WHITE]


@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_no_damage_ends_in_a_traceback(tmp_path):
    """Every truncation of a file is an image, or ValueError."""
    file = tmp_path / "a.tiff"
    for data in (tiff(SIXTEEN, 4, 16), png([1, 2, 3, 4], 0)):
        for size in range(len(data)):
            file.write_bytes(data[:size])
            try:
                assert read(file, "--image").mode == "RGB"
            except ValueError as error:
                assert str(error).startswith(f"--image {file}: ")
