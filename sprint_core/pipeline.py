"""SANA-Sprint from a prompt to an image, without ComfyUI: the file to read first.

    prompt -> Gemma-2 -> caption --.
    seed   -> noise x_s ------------+-> transformer, 1 to 4 steps -> x0 -> DC-AE -> image
    edges  -> DC-AE -> ControlNet --'

Command line: python -m sprint_core.pipeline "a cat" --steps 2
"""

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from . import cli as command
from . import sampler, trigflow
from .config import usable_device
from .images import edges, sizes
from .images import files as images_of_files
from .models import controlnet
from .models.autoencoder import Autoencoder
from .models.autoencoder_config import DOWNSCALE, SCALE
from .models.controlnet import SanaControlNet
from .models.layers import to_device
from .models.transformer import LATENT_CHANNELS, SanaTransformer
from .text import encoder as text
from .text import loading as companions
from .weights import checkpoint, presets
from .weights.checkpoint import CheckpointError

log = logging.getLogger(__name__)

SPRINTS = [name for name, preset in presets.PRESETS.items() if preset.transformer.guidance_embed]
MAX_GUIDANCE = 100.0
EDGES = ("soft", "scribble", "none")  # how the command line makes a control image of a picture
DEFAULT_OUT = Path("output", "sana_sprint.png")  # in the working directory
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Control:
    """A ControlNet at work. image: edges [b or 1, h, w, 3] in [0, 1], of the pictures' size, white on black.

    It takes part from `start` to `end` of the way from noise to picture, both in [0, 1], as ComfyUI counts it:
    by the angle, so that 2 steps lie at 0 and 0.17, and 4 at 0, 0.17, 0.3 and 0.62.
    """

    net: SanaControlNet
    image: Tensor
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        controlnet.check_use(self.strength, self.start, self.end)

    def acts_at(self, s: Tensor) -> bool:
        """Whether it takes part at a flow time."""
        last, first = torch.tensor([trigflow.percent_to_s(self.end), trigflow.percent_to_s(self.start)]).tolist()
        return last <= s.item() <= first  # all rounded to fp32, as ComfyUI compares them


class Caption(NamedTuple):
    """Prompts, encoded: [b, n, c], and a mask [b, n] unless all have the same length."""

    rows: Tensor
    mask: Tensor | None


@dataclass
class Pipeline:
    """The three networks of a SANA-Sprint. `load` makes one; `generate` uses it."""

    transformer: SanaTransformer
    autoencoder: Autoencoder
    text_encoder: text.TextEncoder
    size_px: int = 1024

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        autoencoder: str | Path | None = None,
        text_encoder: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "Pipeline":
        """From a diffusers pipeline folder or a file with all parts, or a transformer and the other parts' paths.

        dtype: of every part; None keeps each file's, but never fp16. Raises CheckpointError.
        """
        given = {"transformer": None, "autoencoder": autoencoder, "text_encoder": text_encoder}
        weights = {kind: _part(kind, path, own) for kind, own in given.items()}
        if not weights["transformer"].config.guidance_embed:
            raise CheckpointError(f"{path}: a multi-step model; sample it in ComfyUI with KSampler")
        models = {
            kind: checkpoint.build(w, dtype=_dtype(w, dtype, device), device=device) for kind, w in weights.items()
        }
        encoder = weights["text_encoder"]
        tokenizer, preset = companions.load_tokenizer(encoder), companions.text_preset(encoder)
        text_encoder = text.TextEncoder(models["text_encoder"], tokenizer, preset)
        size_px = weights["transformer"].settings["size_px"]
        return cls(models["transformer"], models["autoencoder"], text_encoder, size_px)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str] | Caption,
        *,
        seeds: Sequence[int],
        size: tuple[int, int] | None = None,
        steps: int = 2,
        schedule: str | Sequence[float] = "paper",
        guidance: float = presets.GUIDANCE,
        image: Tensor | None = None,
        strength: float = 1.0,
        controls: Sequence[Control] = (),
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Images [b, h, w, 3] in [0, 1], fp32, one per prompt and seed.

        prompts: as text, or as `encode_text` gave them, which needs no text encoder any more;
        size: (width, height), multiples of 32, else of `image` or the model's own; image: start of
        image-to-image, [b or 1, h, w, 3] in [0, 1]; strength: in (0, 1], 1 keeps nothing of it.
        Raises ValueError on bad arguments and on NaN.
        """
        count = len(prompts.rows if isinstance(prompts, Caption) else prompts)
        if count != len(seeds):
            raise ValueError(f"{count} prompts but {len(seeds)} seeds")
        if not 0 < guidance <= MAX_GUIDANCE:
            raise ValueError(f"guidance is {guidance:g}; it must lie in (0, {MAX_GUIDANCE:g}], and 4.5 is usual")
        sigmas = torch.tensor(trigflow.sigmas(schedule, steps, strength))
        width, height = size or ((self.size_px,) * 2 if image is None else (image.shape[2], image.shape[1]))
        if sizes.round_size(width, height) != (width, height):
            raise ValueError(f"size {width}x{height}: both must be multiples of {DOWNSCALE}")
        if image is not None and tuple(image.shape[1:]) != (height, width, 3):
            raise ValueError(f"image is {list(image.shape)}; it must be [b, {height}, {width}, 3]")
        for control in controls:
            _require_fit(self.transformer, control, (len(seeds), height, width))
        device = next(self.transformer.parameters()).device
        caption, mask = prompts if isinstance(prompts, Caption) else self.encode_text(prompts)

        shape = (LATENT_CHANNELS, height // DOWNSCALE, width // DOWNSCALE)
        x_s = to_device(sampler.initial_noise(seeds, shape), device)
        start = torch.zeros_like(x_s) if image is None else self.encode_image(image)
        x_s = trigflow.flow_add_noise(start, x_s, sigmas[0])
        denoise = self.denoiser(caption, mask, guidance, controls)
        step_noise = sampler.StepNoise(seeds, shape, device)
        x0 = sampler.sample(denoise, x_s, sigmas, step_noise, on_step=on_step)
        if not torch.isfinite(x0).all():
            raise ValueError(f"the sampler returned NaN in {self._dtype_of(self.transformer)}; try fp32")
        return self.decode(x0)

    def encode_text(self, prompts: Sequence[str]) -> Caption:
        """One row per prompt, in the transformer's dtype."""
        rows = self.text_encoder.encode(prompts)
        caption, mask = text.pad_embeddings(rows)
        caption = caption.to(self._dtype_of(self.transformer))
        return Caption(caption, None if len({len(row) for row in rows}) == 1 else mask)

    def encode_image(self, image: Tensor) -> Tensor:
        """image [b, h, w, 3] in [0, 1] -> scaled latent [b, 32, h/32, w/32] in fp32."""
        dtype, device = self._dtype_of(self.autoencoder), next(self.autoencoder.parameters()).device
        pixels = rearrange(image * 2.0 - 1.0, "b h w c -> b c h w")
        # Plain layout, as of a latent that came from anywhere else: kernels for another one round differently.
        return self.autoencoder.encode(pixels.to(device, dtype)).float().contiguous() * SCALE

    def decode(self, x0: Tensor) -> Tensor:
        """Scaled latent [b, 32, h/32, w/32] -> image [b, h, w, 3] in [0, 1], fp32. One image at a time."""
        dtype = self._dtype_of(self.autoencoder)
        images = torch.cat([self.autoencoder.decode(latent).float() for latent in (x0 / SCALE).to(dtype).split(1)])
        if not torch.isfinite(images).all():
            raise ValueError(f"the auto-encoder decoded NaN in {dtype}; try fp32")
        return rearrange(images.add_(1.0).div_(2.0).clamp_(0.0, 1.0), "b c h w -> b h w c")

    def denoiser(
        self, caption: Tensor, mask: Tensor | None, guidance: float, controls: Sequence[Control] = ()
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """denoise(x_s, s) -> x0 for the sampler, s on the CPU. Control images are encoded once, here."""
        dtype = self._dtype_of(self.transformer)
        hints = [self.encode_image(control.image).to(dtype) for control in controls]

        def denoise(x_s: Tensor, s: Tensor) -> Tensor:
            x, times, batch = x_s.to(dtype), *(x_s.new_full((len(x_s),), n) for n in (s.item(), guidance))
            acting = [pair for pair in zip(controls, hints) if pair[0].acts_at(s)]
            several = [
                [r if r is None else c.strength * r for r in c.net(x, times, caption, hint, batch, mask)]
                for c, hint in acting
            ]
            v = self.transformer(x, times, caption, batch, mask, controlnet.merged(several))
            return trigflow.flow_predict_x0(v.float(), x_s, s)

        return denoise

    @staticmethod
    def _dtype_of(model: torch.nn.Module) -> torch.dtype:
        return next(model.parameters()).dtype


def _part(kind: str, model: str | Path, own: str | Path | None) -> checkpoint.Weights:
    """From a file of its own, else from the model's. Raises CheckpointError."""
    try:
        return checkpoint.load(own or model, kind)
    except checkpoint.MissingPart as error:
        options = {"autoencoder": "autoencoder (--vae)", "text_encoder": "text_encoder (--text-encoder)"}
        if own or kind not in options:
            raise
        raise CheckpointError(f"{error}, or name that part's file as {options[kind]}") from None


def _require_fit(trunk: SanaTransformer, control: Control, size: tuple[int, int, int]) -> None:
    """size: (batch, height, width) of the pictures. Raises ValueError."""
    found, config = control.net.config, trunk.config
    if (found.width, found.caption_width) != (config.width, config.caption_width):
        raise ValueError(
            f"a ControlNet of width {found.width} for captions of {found.caption_width} numbers; this model has "
            f"{config.width} and {config.caption_width}: take the ControlNet of this model's size"
        )
    shape = tuple(control.image.shape)
    if len(shape) != 4 or shape[0] not in (1, size[0]) or shape[1:] != (*size[1:], 3):
        raise ValueError(f"the control image is {list(shape)}; it must be [1 or {size[0]}, {size[1]}, {size[2]}, 3]")
    if not torch.isfinite(control.image).all():
        raise ValueError("the control image holds NaN or infinity")


def _dtype(weights: checkpoint.Weights, asked: torch.dtype | None, device: torch.device | str) -> torch.dtype:
    """Never fp16, which Gemma and the DC-AE overflow: fp32 on the CPU, where it is exact and no slower."""
    found = asked or checkpoint.majority_dtype(weights.tensors)
    instead = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return instead if found == torch.float16 else found


# --- command line -----------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sprint_core.pipeline", description="SANA-Sprint, text to image.")
    add = parser.add_argument
    add("prompt")
    add("--model", help="pipeline folder, file, or preset (default: the bundled tiny one): " + ", ".join(SPRINTS))
    add("--vae", help="DC-AE, when --model holds none")
    add("--text-encoder", help="Gemma-2, when --model holds none")
    add("--steps", type=int, default=2)
    add("--schedule", default="paper", help="paper (1-4 steps), app (1-40), or angles: 1.5708,1.3")
    add("--guidance", type=float, default=presets.GUIDANCE)
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=1, help="images, from seed, seed + 1, ...")
    add("--size", help="WxH in pixels (default: the image's, or the model's own)")
    add("--image", help="start from this image")
    add("--strength", type=float, default=0.6, help="with --image: 1 keeps nothing of it")
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
    """Asked for, else the image's, else the model's own; rounded, which is said."""
    asked = image.size if image else (native_px, native_px)
    if args.size:
        try:
            width, height = (int(n) for n in args.size.lower().split("x"))
        except ValueError:
            raise ValueError(f"--size {args.size}: write it as 1024x1024") from None
        asked = (width, height)
    size = sizes.round_size(*asked)
    if size != tuple(asked):
        log.warning("size %dx%d rounded to %dx%d: multiples of 32", *asked, *size)
    return size


def _load_pipeline(args: argparse.Namespace) -> Pipeline:
    if args.model is None:
        log.info("no --model: the bundled one, which paints plain shapes, as in 'a red circle above a blue square'")
    device = usable_device(args.device)
    path = presets.BUNDLED if args.model is None else presets.find_model(args.model)
    dtype = DTYPES[args.dtype] if args.dtype else None
    return Pipeline.load(path, autoencoder=args.vae, text_encoder=args.text_encoder, dtype=dtype, device=device)


@dataclass(frozen=True)
class _Drawing:
    """What the control options ask for, read and checked before the model is loaded."""

    image: Image.Image
    weights: checkpoint.Weights
    strength: float
    start: float
    end: float
    kind: str  # of EDGES
    hed: edges.HED | None

    def of(self, pipeline: Pipeline, size: tuple[int, int]) -> Control:
        """Cropped to the picture's proportions, as ComfyUI does, and resized to (width, height)."""
        first = next(pipeline.transformer.parameters())
        net = checkpoint.build(self.weights, dtype=first.dtype, device=first.device)
        pixels = images_of_files.pixels(ImageOps.fit(self.image, size, Image.Resampling.LANCZOS))
        if self.kind != "none":
            pixels = edges.detect(pixels, self.hed, scribble=self.kind == "scribble")
        return Control(net, pixels, self.strength, self.start, self.end)


def _drawing(args: argparse.Namespace) -> _Drawing | None:
    """Raises ValueError, CheckpointError."""
    if args.control is None:
        defaults = {
            "control_model": None,
            "control_strength": 1.0,
            "control_range": "0,1",
            "hed": None,
            "edges": EDGES[0],
        }
        idle = [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(args, name) != value]
        if idle:
            raise ValueError(f"{', '.join(idle)}: of no use without --control IMAGE")
        return None
    if args.model is not None and args.control_model is None:
        raise ValueError("--control: name the ControlNet of this --model with --control-model")
    if args.hed and args.edges == "none":
        raise ValueError("--hed makes edges, and --edges none takes the image as it is: choose one")
    try:
        start, end = (float(n) for n in args.control_range.split(","))
    except ValueError:
        raise ValueError(f"--control-range {args.control_range}: write it as 0,1") from None
    controlnet.check_use(args.control_strength, start, end)
    image = images_of_files.read(args.control, "--control", "black")  # lines on nothing are lines on black
    weights = checkpoint.load(args.control_model or presets.BUNDLED_CONTROL, "controlnet")
    hed = edges.load_hed(args.hed) if args.hed else None
    return _Drawing(image, weights, args.control_strength, start, end, args.edges, hed)


def run(args: argparse.Namespace) -> dict:
    """One command line, done: the JSON document that it ends with."""
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; it must be at least 1")
    if args.out is not None:
        images_of_files.check_picture_name(args.out, "--out")
    source = images_of_files.read(args.image, "--image") if args.image is not None else None
    drawing = _drawing(args)
    strength = args.strength if source else 1.0
    steps = len(trigflow.sigmas(args.schedule, args.steps, strength)) - 1
    started = time.perf_counter()
    pipeline = _load_pipeline(args)
    loaded = time.perf_counter()
    size = _size(args, source, pipeline.size_px)
    image = images_of_files.pixels(source.resize(size, Image.Resampling.LANCZOS)) if source else None
    controls = [drawing.of(pipeline, size)] if drawing else []
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
            on_step=lambda *_: bar.update(),
        )
    names = images_of_files.names_of(args.out or DEFAULT_OUT, args.batch, new=args.out is None)
    images_of_files.save(images, names)
    seconds = {"load": round(loaded - started, 3), "generate": round(time.perf_counter() - loaded, 3)}
    paths = [str(name.resolve()) for name in names]
    return {"images": paths, "seconds": seconds, "steps": steps, "seeds": seeds, "size": size, "device": args.device}


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    return command.run(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
