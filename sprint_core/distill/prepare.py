"""Fetch and prepare what the bundled model is trained on: the art of the emoji world.

    python -m sprint_core.distill.prepare --out DIR [--cache DIR]     sprites.zip, and sheet.png to look at

Three archives (24 MB) come from the npm registry, each checked against its sha512; what lies in the cache is not
fetched again. The last line is one JSON document.
"""

import argparse
import json
import logging
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from einops import rearrange
from PIL import Image

from ..emoji import art, captions, scenes
from .dataset import emoji_art

log = logging.getLogger(__name__)

SHEET = (6, 8)  # rows and columns of scenes


def sheet(sprites: art.Art, path: Path) -> None:
    """Write scenes of the test split as one image."""
    rng = random.Random(0)
    drawn = [scenes.compose(prompt.requirement, rng) for prompt in captions.prompts(SHEET[0] * SHEET[1])]
    images = scenes.paint(scenes.pack(drawn), sprites)
    grid = rearrange(images, "(rows columns) c h w -> (rows h) (columns w) c", rows=SHEET[0])
    Image.fromarray(grid.cpu().numpy()).save(path)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m sprint_core.distill.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--cache", type=Path, help="folder of the archives (default: --out)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "sprites.zip"
    try:
        counts = emoji_art.prepare(args.cache or args.out, path)
    except (OSError, ValueError, ImportError) as error:
        log.error("error: %s", error)
        return 1
    sheet(art.load(path), args.out / "sheet.png")
    print(json.dumps({"file": str(path), "drawings": counts}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
