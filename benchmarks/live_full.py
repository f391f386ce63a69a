"""Milliseconds from the end of a stroke to its image on a live canvas, by the core alone and a full-size model.

    python -m benchmarks.live_full --model 0.6B --size 512 [--strokes 3] [--device cuda] [--dtype bf16]

Not a test. Weights are random, the ControlNet has seven blocks. Each stroke is MOVES frames of one step, then one of
two. What ComfyUI and a page add is in live.py. The last line is one JSON document.
"""

import argparse
import json
import statistics
import time

import torch

from benchmarks.arcs import MOVES, strokes
from benchmarks.networks import MODELS, Ours
from sprint_core.devices import DTYPES, usable_device
from sprint_core.fastest import TRIES
from sprint_core.images import drawing
from sprint_core.images.frames import Frame
from sprint_core.live import LiveSession, PipelinePainter

FINAL_STEPS = 2
UNCOUNTED = 4 * TRIES  # strokes, by which each way of painting has been tried


def measure(session: LiveSession, size_px: int, count: int) -> dict:
    moving: list[dict[str, float]] = []
    final: list[dict[str, float]] = []

    def paint(sheet: bytes, steps: int) -> dict[str, float]:
        """Milliseconds by stage, and of all until the image is on the CPU: a GPU's stages are only begun in theirs."""
        begun = time.perf_counter()
        frame = Frame(size_px, size_px, "a red apple", lines=sheet, seed=7, steps=steps)
        painted = session.paint(frame, hurried=True)
        painted.image.cpu()
        return painted.ms | {"total": 1000 * (time.perf_counter() - begun)}

    for i in range(UNCOUNTED + count):
        sheet = drawing.lines(drawing.parse(strokes(1 + i)), size_px, size_px).tobytes()
        bands = [size_px * (j + 1) for j in range(MOVES)]
        moved = [paint(bytes([255]) * band + sheet[band:], 1) for band in bands]
        ended = paint(sheet, FINAL_STEPS)
        if i >= UNCOUNTED:
            moving += moved
            final.append(ended)
    return {
        name: {stage: round(statistics.median(one[stage] for one in frames), 2) for stage in frames[0]}
        for name, frames in (("moving_ms", moving), ("stroke_ms", final))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="0.6B")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--strokes", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args()
    device = usable_device(args.device)
    ours = Ours(args.model, args.size, device, DTYPES[args.dtype])
    session = LiveSession(PipelinePainter(ours.pipeline, ours.net))
    result = measure(session, args.size, args.strokes)
    print(json.dumps({"model": args.model, "size_px": args.size, "device": str(device), "dtype": args.dtype} | result))


if __name__ == "__main__":
    main()
