"""From any layout that the loaders know to any other, and to smaller files.

    python -m sprint_core.convert IN OUT [--to native|diffusers|nvlabs|comfy] [--part transformer|...]
                                         [--quantize fp8_e4m3fn|int8] [--force]
    python -m sprint_core.convert --fit-preview VAE IMAGES
        colours for live previews, fitted on a folder of images; they lie beside the VAE, where loaders find them

IN is a file or folder with one part or several. OUT is a file, or a folder for diffusers. Unless something is
quantised, every tensor comes out bit for bit. Tensors that only training needs are dropped; where a layout demands
them they are written as zeros. The last line is one JSON document.

    native      one safetensors file with its configuration: what the loaders read fastest
    comfy       the same under ComfyUI's prefixes, as Save Checkpoint writes it; several parts make one checkpoint
    diffusers   folders transformer, vae, text_encoder with config.json, and what makes the three a pipeline; of one
                part alone, that folder
    nvlabs      the authors' names, of a transformer or a DC-AE: .pth or .safetensors
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import cli, disk
from .images import preview
from .text.loading import find_tokenizer
from .text.tokenizers import tokenizer_state
from .weights import checkpoint, keymaps, layouts, part, quantise, tensorfile
from .weights.checkpoint import CheckpointError, Weights
from .weights.kinds import foreign_family, parts_in
from .weights.layouts import TEXT_ENCODER, TRANSFORMER

LAYOUTS = ("native", "diffusers", "nvlabs", "comfy")
PIPELINE = {"transformer", "autoencoder", "text_encoder"}  # the parts of diffusers' pipelines
MIB = 2**20


@dataclass(frozen=True)
class Output:
    """One file to be written: relative to OUT, '' for OUT itself."""

    name: str
    tensors: Mapping[str, Tensor]
    write: Callable[[Path], None]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def parts_of(path: Path, only: str | None, average: bool = False) -> list[Weights]:
    """Every part of a file or folder, or the one asked for; average: of a training save. Raises CheckpointError."""
    source = checkpoint.Source(path, average)
    if only:
        names = [only]
    elif not (names := [name for name, layout in layouts.PARTS.items() if (path / layout.folder).is_dir()]):
        tensors = source.read(path).tensors
        names = parts_in(tensors)
        if not names:
            family = foreign_family(tensors) or "something this pack does not know"
            raise CheckpointError(f"{path}: this is {family}; nothing in it can be converted")
    return [checkpoint.load(source, layouts.PARTS[name]) for name in names]


# --- the layouts --------------------------------------------------------------------------------------


def outputs(parts: Sequence[Weights], layout: str, provenance: Mapping[str, str]) -> list[Output]:
    """What a layout's files hold. Raises CheckpointError where it cannot hold a part."""
    if layout in ("native", "comfy"):
        return [_one_file(parts, layout, provenance)]
    if layout == "nvlabs":
        if len(parts) > 1:
            raise CheckpointError(f"{parts[0].path}: it has several parts, and --to nvlabs writes one: choose --part")
        return [_nvlabs(parts[0])]
    alone = len(parts) == 1
    files = [out for weights in parts for out in _diffusers(weights, "" if alone else weights.layout.folder)]
    return files + (_pipeline(parts) if {weights.layout.name for weights in parts} >= PIPELINE else [])


def _one_file(parts: Sequence[Weights], layout: str, provenance: Mapping[str, str]) -> Output:
    for weights in parts:
        if weights.layout is TEXT_ENCODER:  # a file by itself needs its tokenizer
            weights.extras |= tokenizer_state(find_tokenizer(weights))
    tensors, metadata = checkpoint.packed(parts, provenance, prefixed=layout == "comfy" or len(parts) > 1)
    return Output("", tensors, lambda path: tensorfile.write(path, tensors, metadata))


def _diffusers(weights: Weights, folder: str) -> list[Output]:
    layout = weights.layout
    if weights.is_quantised:
        raise CheckpointError(f"{weights.path}: diffusers cannot read quantised layers; choose --to native")
    try:
        config = layout.config_to_diffusers(weights.config)
    except ValueError as error:
        raise CheckpointError(f"{weights.path}: {error}") from None
    tensors = layout.to_diffusers(weights.tensors, weights.config)
    metadata = part.header({layout.name: {"settings": weights.settings}})  # no config.json has size and prompt format
    file = Path(folder) / f"{layout.file_stem}.safetensors"
    files = [
        Output(str(file), tensors, lambda path: tensorfile.write(path, tensors, metadata)),
        _json(Path(folder) / "config.json", config),
    ]
    return files + (_tokenizer(weights, folder) if layout is TEXT_ENCODER else [])


def _pipeline(parts: Sequence[Weights]) -> list[Output]:
    """What tells diffusers that these folders are one pipeline, with its scheduler, which has no weights."""
    transformer = next(weights for weights in parts if weights.layout is TRANSFORMER)
    if transformer.config.guidance_embed:
        pipeline = "SanaSprintPipeline"
        scheduler = "SCMScheduler"
        settings = {}
    else:
        pipeline, scheduler = "SanaPipeline", "DPMSolverMultistepScheduler"
        settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        settings |= {"flow_shift": transformer.settings["flow_shift"]}
    index = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }
    scheduler_config = Path("scheduler", "scheduler_config.json")
    return [_json(Path("model_index.json"), index), _json(scheduler_config, {"_class_name": scheduler} | settings)]


def _tokenizer(weights: Weights, folder: str) -> list[Output]:
    """The encoder's tokenizer, in a folder of its own beside the encoder's, or with an encoder alone."""
    tokenizer = find_tokenizer(weights)
    name = "tokenizer.json" if tokenizer.state_key == "tokenizer_json" else "tokenizer.model"
    place = Path(folder).parent / "tokenizer" if folder else Path()
    return [Output(str(place / name), {}, lambda path: _write_bytes(path, tokenizer.data))]


def _nvlabs(weights: Weights) -> Output:
    layout = weights.layout
    if layout.authors_naming is None or weights.is_quantised:
        reason = layout.noun if layout.authors_naming is None else "quantised"
        raise CheckpointError(f"{weights.path}: the authors have no layout for this ({reason}); choose --to native")
    dtype = next(iter(weights.tensors.values())).dtype
    zeros = layout.authors_zeros(weights.config).items()
    tensors = keymaps.from_native(weights.tensors, layout.authors_naming)
    return _named(tensors | {name: torch.zeros(shape, dtype=dtype) for name, shape in zeros})


def _named(tensors: Mapping[str, Tensor]) -> Output:
    """A file whose name says how it is written."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(path: Path) -> None:
        if path.suffix == ".pth":
            tensorfile.write_pickle(path, {"state_dict": tensors})
        else:
            tensorfile.write(path, tensors, {})

    return Output("", tensors, write)


def _json(name: Path, data: Mapping) -> Output:
    return Output(str(name), {}, lambda path: _write_bytes(path, json.dumps(data, indent=1).encode()))


def _write_bytes(path: Path, content: bytes) -> None:
    with disk.replacing(path) as temporary:
        temporary.write_bytes(content)


# --- writing ------------------------------------------------------------------------------------------


def convert(
    source: Path,
    target: Path,
    layout: str,
    only: str | None,
    form: str | None,
    force: bool,
    command_line: str,
    average: bool = False,
) -> dict:
    """Read, rewrite, write whole or not at all. Raises CheckpointError, OSError before anything is written."""
    _check_names(source, target, layout, force)
    disk.check_writable(target)
    parts = parts_of(source, only, average)
    if form:
        _quantise(parts, form)
    plan = outputs(parts, layout, {"source": source.name, "command": command_line})
    _check_space(target, plan)
    _write(target, plan)
    return {
        "files": [str(target / out.name) if out.name else str(target) for out in plan],
        "parts": [weights.layout.name for weights in parts],
        "bytes": sum(out.size_bytes for out in plan),
    }


def _check_names(source: Path, target: Path, layout: str, force: bool) -> None:
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists; choose another name, or overwrite it with --force")
    if target.exists() and source.exists() and target.resolve() in (source.resolve(), *source.resolve().parents):
        raise CheckpointError(f"{target}: writing over what is being read; choose another name")
    suffix = {"native": ".safetensors", "comfy": ".safetensors", "diffusers": "", "nvlabs": ".pth"}[layout]
    allowed = (suffix, ".safetensors") if layout == "nvlabs" else (suffix,)
    if target.suffix.lower() not in allowed and (suffix or target.suffix in tensorfile.WEIGHT_SUFFIXES):
        kind = f"a file ending in {' or '.join(allowed)}" if suffix else "a folder"
        raise CheckpointError(f"{target}: --to {layout} writes {kind}")
    if target.is_dir() != (layout == "diffusers") and target.exists():
        raise CheckpointError(
            f"{target}: --to {layout} writes {'a folder' if layout == 'diffusers' else 'a file'}; remove it first"
        )


def _quantise(parts: Sequence[Weights], form: str) -> None:
    able = [weights for weights in parts if weights.layout.name in quantise.LAYERS]
    if not able:
        raise CheckpointError(f"{parts[0].path}: only transformers and text encoders are quantised")
    for weights in able:
        if weights.is_quantised:
            raise CheckpointError(f"{weights.path}: its {weights.layout.name} is quantised already")
        weights.tensors = quantise.quantised(weights.tensors, weights.layout.name, form)


def _check_space(target: Path, plan: Sequence[Output]) -> None:
    folder = next(parent for parent in target.resolve().parents if parent.is_dir())
    needed, free = sum(out.size_bytes for out in plan), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: {needed / MIB:.0f} MiB are needed and {free / MIB:.0f} MiB free; make room")


def _write(target: Path, plan: Sequence[Output]) -> None:
    """Whole or not at all: an interruption leaves what was there before."""
    if plan[0].name == "":
        return plan[0].write(target)
    with disk.replacing_folder(target) as fresh:
        for out in plan:
            out.write(fresh / out.name)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sprint_core.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, metavar="IN", nargs="?")
    add("target", type=Path, metavar="OUT", nargs="?")
    add("--to", choices=LAYOUTS, default="native")
    add("--part", choices=list(layouts.PARTS), help="one part of several (default: all)")
    add(
        "--quantize", choices=list(quantise.FORMATS), help="the linear layers of transformer and text encoder in 8 bits"
    )
    add("--average", action="store_true", help="of a training save, the moving average of its weights (state_dict_ema)")
    add("--force", action="store_true", help="overwrite OUT")
    add(
        "--fit-preview", type=Path, nargs=2, metavar=("VAE", "IMAGES"), help="colours for live previews, beside the VAE"
    )
    args = parser.parse_args(argv)
    if bool(args.fit_preview) == bool(args.target) or (args.fit_preview and args.source):
        parser.error("name IN and OUT, or --fit-preview VAE IMAGES")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.fit_preview:
        vae, images = args.fit_preview
        return cli.run(lambda: preview.fit_file(vae, images, args.force))
    words = ["python", "-m", "sprint_core.convert", "--to", args.to]
    words += ["--quantize", args.quantize] if args.quantize else []
    words += ["--average"] if args.average else []
    return cli.run(
        lambda: convert(
            args.source, args.target, args.to, args.part, args.quantize, args.force, " ".join(words), args.average
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
