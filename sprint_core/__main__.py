"""The command line: python -m sprint_core "a cat" --steps 2. The last line of output is one JSON document."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from . import cli, messages, trigflow
from .devices import DTYPES, usable_device
from .images import edges, sizes
from .images import files as image_files
from .models import controlnet, hed
from .models.nag import NAG
from .pipeline import NAG_DEFAULT, Control, Pipeline
from .weights import checkpoint, layouts, presets

log = messages.logger(__name__)

SPRINTS = [name for name, preset in presets.PRESETS.items() if preset.transformer.guidance_embed]
EDGES = ("soft", "scribble", "none")  # how the command line makes a control image
STRENGTH = 0.6  # of --image
DEFAULT_OUT = Path("output", "sana_sprint.png")  # in the working directory


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sprint_core", description="SANA-Sprint, text to image.")
    add = parser.add_argument
    add("prompt")
    add("--model", help="pipeline folder, file, or preset (default: the bundled tiny one): " + ", ".join(SPRINTS))
    add("--average", action="store_true", help="of a training save, the moving average of its weights (state_dict_ema)")
    add("--vae", help="DC-AE, when --model holds none")
    add("--text-encoder", help="Gemma-2, when --model holds none")
    add("--steps", type=int, default=2)
    add("--schedule", default="auto", help="paper (1-4 steps), app (1-40), auto (whichever fits), or angles: 1.5,1")
    add("--guidance", type=float, default=presets.GUIDANCE)
    add("--negative", help="what to avoid in the image, as a prompt: 'a red car'")
    add("--negative-scale", type=float, help=f"how strongly (default: {NAG_DEFAULT.scale:g}; 1: not at all)")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=1, help="images, from seed, seed + 1, ...")
    add("--size", help="WxH in pixels (default: the image's, or the model's own)")
    add("--image", help="start from this image")
    add("--strength", type=float, help=f"with --image (default: {STRENGTH}): 1 keeps nothing of it")
    add("--control", help="steer by the edges of this image")
    add("--control-model", help="ControlNet file or folder (default: the bundled model's own)")
    add("--control-strength", type=float, default=1.0)
    add("--control-range", default="0,1", metavar="START,END", help="the part of the way in which it acts")
    add("--edges", choices=EDGES, default=EDGES[0], help="of --control; none: it already is white edges on black")
    add("--hed", help="make the edges with this ControlNetHED.pth, rather than without weights")
    add("--dtype", choices=DTYPES, help="default: each file's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help=f"further images of a batch get -1, -2, ... (default: a new {DEFAULT_OUT})")
    return parser.parse_args(argv)


def _size(args: argparse.Namespace, image: Image.Image | None, native_px: int) -> tuple[int, int]:
    """(width, height) of --size, else the image's, else the model's own, rounded to whole cells with a warning.

    Raises ValueError.
    """
    requested = image.size if image else (native_px, native_px)
    if args.size:
        try:
            width, height = (int(n) for n in args.size.lower().split("x"))
        except ValueError:
            raise ValueError(f"--size {args.size}: write it as 1024x1024") from None
        requested = (width, height)
    size = sizes.round_size(*requested)
    if size != tuple(requested):
        log.warning("size %dx%d rounded to %dx%d: multiples of 32", *requested, *size)
    return size


def _strength(args: argparse.Namespace) -> float:
    """Of image-to-image; 1 without --image. Raises ValueError where nothing would read --strength."""
    if args.image is None and args.strength is not None:
        raise ValueError("--strength: of no use without --image IMAGE")
    if args.image is None:
        return 1.0
    return STRENGTH if args.strength is None else args.strength


def _nag(args: argparse.Namespace) -> NAG:
    """Of the negative prompt. Raises ValueError where nothing would read --negative-scale."""
    if args.negative is None and args.negative_scale is not None:
        raise ValueError("--negative-scale: of no use without --negative TEXT")
    return NAG_DEFAULT if args.negative_scale is None else NAG(scale=args.negative_scale)


def _load_pipeline(args: argparse.Namespace) -> Pipeline:
    if args.model is None:
        log.info("no --model: the bundled one, which paints common things as emoji, as in 'a cat on a blue background'")
    device = usable_device(args.device)
    path = presets.BUNDLED if args.model is None else presets.find_model(args.model)
    dtype = DTYPES[args.dtype] if args.dtype else None
    return Pipeline.load(
        path,
        autoencoder=args.vae,
        text_encoder=args.text_encoder,
        dtype=dtype,
        device=device,
        average=args.average,
    )


@dataclass(frozen=True)
class _ControlRequest:
    """The control options, read and checked before the model is loaded."""

    image: Image.Image
    weights: checkpoint.Weights
    strength: float
    start: float
    end: float
    edges: str  # one of EDGES
    hed: hed.HED | None

    def build(self, pipeline: Pipeline, size: tuple[int, int]) -> Control:
        """The Control; its image is cropped to the proportions of size (width, height), as in ComfyUI, and resized."""
        first = next(pipeline.transformer.parameters())
        net = checkpoint.build(self.weights, dtype=first.dtype, device=first.device)
        pixels = image_files.pixels(ImageOps.fit(self.image, size, Image.Resampling.LANCZOS))
        if self.edges != "none":
            pixels = edges.detect(pixels, self.hed, scribble=self.edges == "scribble")
        return Control(net, pixels, self.strength, self.start, self.end)


def _control_request(args: argparse.Namespace) -> _ControlRequest | None:
    """None without --control. Raises ValueError, CheckpointError."""
    if args.control is None:
        defaults = {
            "control_model": None,
            "control_strength": 1.0,
            "control_range": "0,1",
            "hed": None,
            "edges": EDGES[0],
        }
        unused = [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(args, name) != value]
        if unused:
            raise ValueError(f"{', '.join(unused)}: of no use without --control IMAGE")
        return None
    if args.model is not None and args.control_model is None:
        raise ValueError("--control: name the ControlNet of this --model with --control-model")
    if args.hed and args.edges == "none":
        raise ValueError("--hed makes edges, and --edges none takes the image as it is: choose one")
    try:
        start, end = (float(n) for n in args.control_range.split(","))
    except ValueError:
        raise ValueError(f"--control-range {args.control_range}: write it as 0,1") from None
    controlnet.check_strength_and_range(args.control_strength, start, end)
    image = image_files.read(args.control, "--control", "black")  # lines on nothing are lines on black
    weights = checkpoint.load(args.control_model or presets.BUNDLED_CONTROL, layouts.CONTROLNET)
    hed = edges.load_hed(args.hed) if args.hed else None
    return _ControlRequest(image, weights, args.control_strength, start, end, args.edges, hed)


def run(args: argparse.Namespace) -> dict:
    """Do what one command line says, and return the JSON document that it ends with. Raises ValueError, OSError."""
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; it must be at least 1")
    image_files.check_image_name(args.out or DEFAULT_OUT, "--out")
    source = image_files.read(args.image, "--image") if args.image is not None else None
    request = _control_request(args)
    strength, nag = _strength(args), _nag(args)
    steps = len(trigflow.sigmas(args.schedule, args.steps, strength)) - 1
    started = time.perf_counter()
    pipeline = _load_pipeline(args)
    loaded = time.perf_counter()
    size = _size(args, source, pipeline.size_px)
    image = image_files.pixels(source.resize(size, Image.Resampling.LANCZOS)) if source else None
    controls = [request.build(pipeline, size)] if request else []
    seeds = [args.seed + i for i in range(args.batch)]
    with tqdm(total=steps, desc="steps") as bar:
        images = pipeline.generate(
            [args.prompt] * args.batch,
            seeds=seeds,
            size=size,
            steps=args.steps,
            schedule=args.schedule,
            guidance=args.guidance,
            image=image,
            strength=strength,
            controls=controls,
            negative=args.negative,
            nag=nag,
            on_step=lambda *_: bar.update(),
        )
    names = image_files.image_paths(args.out or DEFAULT_OUT, args.batch, new=args.out is None)
    image_files.save(images, names)
    seconds = {"load": round(loaded - started, 3), "generate": round(time.perf_counter() - loaded, 3)}
    paths = [str(name.resolve()) for name in names]
    return {"images": paths, "seconds": seconds, "steps": steps, "seeds": seeds, "size": size, "device": args.device}


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    return cli.run(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
