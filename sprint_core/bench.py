"""What each part of a picture costs on this machine.

    python -m sprint_core.bench [--model demo|0.6B|1.6B] [--size PX] [--runs 5]
                                [--parts step,control,hint,encode,decode]

Full-size models have random weights, made on the spot. Parts take turns, so that whatever else the machine does
meets all of them; medians of the runs. A table, then one JSON document on the last line.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint, command, controlnet, presets
from .autoencoder import Autoencoder
from .autoencoder_config import DOWNSCALE, SANA, SCALE
from .config import usable_device
from .pipeline import DTYPES
from .sizes import MAX_PX, MIN_PX
from .transformer import LATENT_CHANNELS, SanaTransformer

MODELS = {"demo": "", "0.6B": "sprint-0.6B", "1.6B": "sprint-1.6B"}
CAPTION_TOKENS = 20
SEED = 0
PARTS = {
    "step": "one pass of the transformer",
    "control": "the same with a ControlNet, its hint kept",
    "hint": "the same with the hint encoded anew",
    "encode": "a picture to its latent",
    "decode": "a latent to its picture",
}


class Bench:
    """The networks of a model, each made when a part first needs it, and one call of every part."""

    def __init__(self, model: str, size_px: int | None, device: torch.device, dtype: torch.dtype | None):
        self.preset = presets.PRESETS.get(MODELS[model])
        native = (
            self.preset.size_px if self.preset else checkpoint.load(presets.BUNDLED, "transformer").settings["size_px"]
        )
        self.size_px, self.device = size_px or native, device
        self.dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)

    @functools.cached_property
    def transformer(self) -> SanaTransformer:
        return self._made("transformer", lambda **how: SanaTransformer(self.preset.transformer, **how))

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        return self._made("autoencoder", lambda **how: Autoencoder(SANA, **how))

    @functools.cached_property
    def net(self) -> controlnet.SanaControlNet:
        if self.preset is None:
            return self._bundled(presets.BUNDLED_CONTROL, "controlnet")
        branch = controlnet.copy_of(self.transformer, controlnet.PUBLISHED_BLOCKS)
        return branch.eval().requires_grad_(False)

    def _made(self, kind: str, build: Callable[..., nn.Module]) -> nn.Module:
        """The bundled part, or one of random weights."""
        if self.preset is None:
            return self._bundled(presets.BUNDLED, kind)
        torch.manual_seed(SEED)
        return build(dtype=self.dtype, device=self.device).eval().requires_grad_(False)

    def _bundled(self, path, kind: str) -> nn.Module:
        return checkpoint.build(checkpoint.load(path, kind), dtype=self.dtype, device=self.device)

    @functools.cached_property
    def inputs(self) -> dict[str, Tensor]:
        side, width = self.size_px // DOWNSCALE, self.transformer.config.caption_width
        generator = torch.Generator().manual_seed(SEED)
        normal = lambda *shape: torch.randn(shape, generator=generator).to(self.device, self.dtype)  # noqa: E731
        one = torch.ones(1, device=self.device)
        return {
            "x_s": normal(1, LATENT_CHANNELS, side, side),
            "s": 0.7827 * one,
            "caption": normal(1, CAPTION_TOKENS, width),
            "guidance": presets.GUIDANCE * one,
        }

    @functools.cached_property
    def picture(self) -> Tensor:
        return torch.linspace(-1, 1, self.size_px, device=self.device).to(self.dtype).expand(1, 3, self.size_px, -1)

    @functools.cached_property
    def kept_hint(self) -> Tensor:
        return self.autoencoder.encode(self.picture) * SCALE

    def step(self) -> Tensor:
        return self.transformer(**self.inputs)

    def control(self, hint: Tensor | None = None) -> Tensor:
        residuals = self.net(hint=self.kept_hint if hint is None else hint, **self.inputs)
        return self.transformer(**self.inputs, control=residuals)

    def hint(self) -> Tensor:
        return self.control(self.autoencoder.encode(self.picture) * SCALE)

    def encode(self) -> Tensor:
        return self.autoencoder.encode(self.picture)

    def decode(self) -> Tensor:
        return self.autoencoder.decode(self.inputs["x_s"] / SCALE)


@torch.inference_mode()
def measure(bench: Bench, parts: Sequence[str], runs: int) -> dict[str, list[float]]:
    """Seconds of each part, one of each in turn; a first round is not counted."""
    taken: dict[str, list[float]] = {part: [] for part in parts}
    for counted in tqdm([False] + [True] * runs, desc="rounds", leave=False):
        for part in parts:
            call = getattr(bench, part)
            _wait(bench.device)
            started = time.perf_counter()
            call()
            _wait(bench.device)
            if counted:
                taken[part].append(time.perf_counter() - started)
    return taken


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(taken: dict[str, list[float]]) -> dict[str, dict]:
    """Medians, spreads, and the ratio to a plain step."""
    rows = {}
    for part, seconds in taken.items():
        rows[part] = {"median_sec": statistics.median(seconds), "min_sec": min(seconds), "max_sec": max(seconds)}
    if "step" in rows:
        for row in rows.values():
            row["steps"] = row["median_sec"] / rows["step"]["median_sec"]
    return {part: {name: round(value, 5) for name, value in row.items()} for part, row in rows.items()}


def table(rows: dict[str, dict]) -> str:
    """For people."""
    lines = [f"{'':10}{'seconds':>10}{'from':>10}{'to':>10}{'in steps':>10}"]
    for part, row in rows.items():
        numbers = [row[name] for name in ("median_sec", "min_sec", "max_sec", "steps") if name in row]
        lines.append(f"{part:10}" + "".join(f"{number:10.4g}" for number in numbers) + f"   {PARTS[part]}")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sprint_core.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="demo")
    add("--size", type=int, help="pixels of a side (default: the model's own)")
    add("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    add("--runs", type=int, default=5)
    add("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on the CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict:
    """One command line, done: the JSON document that it ends with. Raises ValueError."""
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--parts {','.join(unknown)}: there are {', '.join(PARTS)}")
    if args.runs < 1:
        raise ValueError(f"--runs is {args.runs}; it must be at least 1")
    if args.size is not None and (args.size % DOWNSCALE or not MIN_PX <= args.size <= MAX_PX):
        raise ValueError(f"--size {args.size}: a multiple of {DOWNSCALE} from {MIN_PX} to {MAX_PX}")
    dtype = DTYPES[args.dtype] if args.dtype else None
    bench = Bench(args.model, args.size, usable_device(args.device), dtype)
    rows = summary(measure(bench, parts, args.runs))
    tqdm.write(table(rows))
    about = {"model": args.model, "size_px": bench.size_px, "dtype": str(bench.dtype).removeprefix("torch.")}
    return {**about, "device": str(bench.device), "threads": torch.get_num_threads(), "runs": args.runs, "parts": rows}


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    return command.run(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
