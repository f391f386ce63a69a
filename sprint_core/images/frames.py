"""One frame of a live drawing: pixels and settings, and how it travels.

    uint32, big-endian: n; n bytes of JSON; the lines, h x w bytes; the paint, h x w x 3 bytes

The JSON says which of the two there are, the size and the settings.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..latent import DOWNSCALE
from . import sizes

MAX_HEADER_BYTES = 2**20  # a prompt and a drawing's strokes
MAX_PIXELS = 4096**2
MAX_MESSAGE_BYTES = 4 + MAX_HEADER_BYTES + 4 * MAX_PIXELS  # lines and paint of the largest sheet
MAX_STEPS = 4
MAX_SEED = 2**64 - 1
MAX_GUIDANCE, MAX_STRENGTH = 30.0, 2.0


@dataclass(frozen=True)
class Frame:
    """What a live canvas is to paint.

    width, height: multiples of 32; lines: h x w grey bytes, the control image; paint: h x w x 3 bytes, the sheet that
    image-to-image starts from; strength: of the ControlNet; denoise: how much of the paint is repainted, in (0, 1].
    """

    width: int
    height: int
    text: str = ""
    seed: int = 0
    steps: int = 1
    guidance: float = 4.5
    strength: float = 1.0
    denoise: float = 1.0
    lines: bytes | None = None
    paint: bytes | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def empty(self) -> bool:
        """Whether it has lines, and all of them are black."""
        return self.lines is not None and not any(self.lines)

    def control_image(self) -> Tensor:
        """Of frames with lines: [1, h, w, 3] in [0, 1]."""
        assert self.lines is not None
        return _levels(self.lines, self.height, self.width, 1).expand(-1, -1, -1, 3).contiguous()

    def sheet(self) -> Tensor:
        """Of frames with paint: [1, h, w, 3] in [0, 1]."""
        assert self.paint is not None
        return _levels(self.paint, self.height, self.width, 3)


def _levels(data: bytes, *shape: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.float32).reshape(1, *shape) / 255.0)


def pack(header: Mapping[str, Any], *pixels: bytes) -> bytes:
    """A binary message: a JSON header and what follows it."""
    text = json.dumps(header).encode()
    return b"".join((struct.pack(">I", len(text)), text, *pixels))


def unpack(message: bytes) -> tuple[dict[str, Any], memoryview]:
    """(header, what follows it) of a binary message. Raises ValueError."""
    length = struct.unpack(">I", message[:4])[0] if len(message) >= 4 else None
    if length is None or length > min(MAX_HEADER_BYTES, len(message) - 4):
        raise ValueError("frame: its header is longer than the message")
    try:
        header = json.loads(message[4 : 4 + length])
    except (ValueError, RecursionError):
        raise ValueError("frame: its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("frame: its header is not an object of JSON")
    return header, memoryview(message)[4 + length :]


@dataclass(frozen=True)
class Incoming:
    """A frame as a page sent it.

    number: the page's; final: whether the pen is up; drawing: the text of the strokes that it shows, where it has them.
    """

    frame: Frame
    number: int
    final: bool
    drawing: str | None


def read(message: bytes, base: Frame, final_steps: int) -> Incoming:
    """A message's frame, which has the base's values where its header has none. Raises ValueError."""
    header, pixels = unpack(message)
    width, height = (_whole(header, side, sizes.MIN_PX, sizes.MAX_PX) for side in ("width", "height"))
    if (width, height) != sizes.round_size(width, height) or width * height > MAX_PIXELS:
        raise ValueError(
            f"frame: its size is {width} x {height}; sides are multiples of {DOWNSCALE}, of {MAX_PIXELS} pixels at most"
        )
    of_lines, of_paint = (width * height * n * bool(header.get(name)) for name, n in (("lines", 1), ("paint", 3)))
    if len(pixels) != of_lines + of_paint:
        raise ValueError(f"frame: {len(pixels)} bytes of pixels; {width} x {height} takes {of_lines + of_paint}")
    final, drawing = header.get("final") is True, header.get("drawing")
    values = {"text": base.text, "steps": final_steps if final else base.steps} | header
    if not isinstance(values["text"], str) or not isinstance(drawing, str | None):
        raise ValueError("frame: its text is none")
    frame = Frame(
        width,
        height,
        values["text"],
        _whole({"seed": base.seed} | header, "seed", 0, MAX_SEED),
        _whole(values, "steps", 1, MAX_STEPS),
        _number({"guidance": base.guidance} | header, "guidance", 0.1, MAX_GUIDANCE),
        _number({"strength": base.strength} | header, "strength", 0.0, MAX_STRENGTH),
        _number({"denoise": base.denoise} | header, "denoise", 0.01, 1.0),
        bytes(pixels[:of_lines]) if header.get("lines") else None,
        bytes(pixels[of_lines:]) if header.get("paint") else None,
    )
    return Incoming(frame, _whole(header, "seq", 0, 2**53), final, drawing)


def _whole(header: Mapping[str, Any], name: str, least: int, most: int) -> int:
    number = _number(header, name, least, most)
    if number != int(header[name]):
        raise ValueError(f"frame: its {name} is {number:g}, not a whole number")
    return int(header[name])


def _number(header: Mapping[str, Any], name: str, least: float, most: float) -> float:
    value = header.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"frame: its header has no number {name}")
    if not (least <= value <= most and math.isfinite(value)):
        raise ValueError(f"frame: its {name} is {value:g}; it lies in {least:g} to {most:g}")
    return value
