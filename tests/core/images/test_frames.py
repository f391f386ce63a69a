"""Frames of a live drawing as they travel: what is read, what stands in, and what is refused."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from sprint_core.images import frames
from sprint_core.images.frames import Frame

BASE = Frame(64, 96, "a red circle", seed=5, steps=1, guidance=4.0, strength=0.5, denoise=0.25)
HEADER = {"seq": 3, "width": 64, "height": 96}
LINES = np.arange(64 * 96, dtype=np.uint8).tobytes()
PAINT = np.arange(64 * 96 * 3, dtype=np.uint8)[::-1].tobytes()


def read(header: dict, *pixels: bytes) -> frames.Incoming:
    return frames.read(frames.pack(HEADER | header, *pixels), BASE, 2)


def test_a_frame_says_everything():
    header = {"lines": True, "paint": True, "text": "é", "seed": 2**64 - 1, "steps": 4, "guidance": 5, "strength": 2}
    incoming = read(header | {"denoise": 1, "final": True, "drawing": "{}"}, LINES, PAINT)
    expected = Frame(64, 96, "é", 2**64 - 1, 4, 5, 2, 1, LINES, PAINT)
    assert incoming == frames.Incoming(expected, 3, True, "{}")


def test_what_a_header_lacks_is_the_runs():
    assert read({"lines": True}, LINES) == frames.Incoming(replace(BASE, lines=LINES), 3, False, None)
    assert read({"paint": True, "final": True}, PAINT).frame == replace(BASE, paint=PAINT, steps=2)
    assert read({}).frame == BASE


def test_pixels_are_levels_of_grey_and_rgb():
    frame = replace(BASE, lines=LINES, paint=PAINT)
    control, sheet = frame.control_image(), frame.sheet()
    assert control.shape == sheet.shape == (1, 96, 64, 3)
    assert torch.equal(control[0, 1, 2], torch.full((3,), 66 / 255))
    assert torch.equal((sheet * 255).round().byte().flatten(), torch.frombuffer(bytearray(PAINT), dtype=torch.uint8))
    assert not frame.empty and replace(frame, lines=bytes(64 * 96)).empty and not replace(frame, lines=None).empty


def test_the_layout_of_a_message():
    """As docs say: four bytes, big-endian, the length of the JSON; the JSON; the rest."""
    assert frames.pack({"a": 1}, b"xy", b"z") == struct.pack(">I", 8) + b'{"a": 1}xyz'


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "longer than the message"),
        (struct.pack(">I", 9) + b"{}", "longer than the message"),
        (struct.pack(">I", 2**31), "longer than the message"),
        (struct.pack(">I", 2) + b"{]", "is not JSON"),
        (struct.pack(">I", 1) + b"\xff", "is not JSON"),
        (struct.pack(">I", 9000) + b"[" * 9000, "is not JSON"),
        (frames.pack([]), "not an object"),  # type: ignore[arg-type]
        (frames.pack({}), "has no number width"),
        (frames.pack(HEADER | {"width": True}), "has no number width"),
        (frames.pack(HEADER | {"width": 64.5}), "its width is 64.5, not a whole number"),
        (frames.pack(HEADER | {"width": 70}), "its size is 70 x 96"),
        (frames.pack(HEADER | {"width": 8192, "height": 8192}), "its size is 8192 x 8192"),
        (frames.pack(HEADER | {"width": 1e999}), "its width is inf"),
        (frames.pack(HEADER | {"lines": True}, LINES[1:]), "6143 bytes of pixels; 64 x 96 takes 6144"),
        (frames.pack(HEADER, b"1"), "1 bytes of pixels; 64 x 96 takes 0"),
        (frames.pack(HEADER | {"text": 1}), "its text is none"),
        (frames.pack(HEADER | {"steps": 5}), "its steps is 5; it lies in 1 to 4"),
        (frames.pack(HEADER | {"seed": -1}), "its seed is -1"),
        (frames.pack(HEADER | {"denoise": 0}), "its denoise is 0"),
        (frames.pack(HEADER | {"strength": float("nan")}), "its strength is nan"),
        (frames.pack(HEADER | {"guidance": "4"}), "has no number guidance"),
    ],
)
def test_what_is_no_frame_is_refused(message, words):
    with pytest.raises(ValueError, match=r"^frame: ") as caught:
        frames.read(message, BASE, 2)
    assert words in str(caught.value)
