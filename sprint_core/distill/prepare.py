"""Fetch and prepare what the bundled model is trained on: the art of the emoji world.

    python -m sprint_core.distill.prepare --out DIR [--cache DIR]     sprites.zip, and sheet.png to look at

Three archives (24 MB) come from the npm registry, each checked against its sha512; what lies in the cache is not
fetched again. The last line is one JSON document.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from einops import rearrange
from PIL import Image

from .. import cli
from ..emoji import art, captions, scenes
from ..images import files
from .dataset import emoji_art

SHEET = (6, 8)  # rows and columns of scenes


def sheet(sprites: art.Art, path: Path) -> None:
    """Write scenes of the test split as one image."""
    rng = random.Random(0)
    drawn = [scenes.compose(prompt.requirement, rng) for prompt in captions.prompts(SHEET[0] * SHEET[1])]
    images = scenes.paint(scenes.pack(drawn), sprites)
    grid = rearrange(images, "(rows columns) c h w -> (rows h) (columns w) c", rows=SHEET[0])
    files.write(Image.fromarray(grid.cpu().numpy()), path)


def run(out: Path, cache: Path) -> dict:
    """Both files, from the archives in the cache: the JSON document. Raises OSError, ValueError."""
    path = out / "sprites.zip"
    counts = emoji_art.prepare(cache, path)
    sheet(art.load(path), out / "sheet.png")
    return {"file": str(path), "drawings": counts}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sprint_core.distill.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--cache", type=Path, help="folder of the archives (default: --out)")
    args = parser.parse_args(argv)
    return cli.run(lambda: run(args.out, args.cache or args.out))


if __name__ == "__main__":
    raise SystemExit(main())
