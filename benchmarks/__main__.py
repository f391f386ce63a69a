"""What each part of an image costs on this machine, beside diffusers.

    python -m benchmarks [--model demo|0.6B|1.6B] [--size PX] [--against diffusers|openvino] [--runs 5] [--busy N]
                         [--parts text,step,negative,control,hint,encode,decode,total,batch,train,load]

Full-size models have random weights, made on the spot. Parts and sides take turns, so that whatever else the machine
does meets all of them; medians of the runs. A table, then one JSON document on the last line. `--plot FILE` draws
seconds against resolution and batch instead, up to 1024x1024 beside diffusers. `--compile` compiles transformer and
auto-encoder on both sides first; `--profile` adds what kinds of operations each of our parts consists of. `--busy N`
has N other processes spin meanwhile, as on a desktop that does something else.
"""

import argparse
import contextlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import alone, busy, converted, shares, sweep, theirs, training
from benchmarks.converted import ByOpenVINO
from benchmarks.measure import NETWORK_OF, Sides, Taken, difference, errors, exact, matmul_flops, measure
from benchmarks.networks import BATCH, LONG, MODELS, SHORT, Ours
from benchmarks.theirs import Theirs
from sprint_core import cli
from sprint_core.devices import DTYPES, usable_device
from sprint_core.images.files import check_image_name
from sprint_core.images.sizes import MAX_PX, MIN_PX
from sprint_core.latent import DOWNSCALE

PARTS = {
    "text": f"a new prompt of {SHORT} tokens",
    "long_text": f"a new prompt of {LONG} tokens",
    "same_text": "a prompt again",
    "step": "one pass of the transformer",
    "negative": "the same with a negative prompt as long (NAG)",
    "control": "a pass with a ControlNet of seven blocks, its hint kept",
    "hint": "the same with the hint encoded anew",
    "encode": "an image to its latent",
    "decode": "a latent to its image",
    "total": "a new prompt to its image, in one step",
    "batch": f"a new prompt to {BATCH} images",
    "train": "a batch for the student (sCM and LADD) and one for the critic, at the bundled model's size",
    "load": "all weights from files, in a process of its own",
    "alone": "and then an image there, the text encoder released before decoding",
}
RIVALS = {"diffusers": (Theirs, theirs.version), "openvino": (ByOpenVINO, converted.version)}
COMPILED = ("step", "negative", "control", "hint", "encode", "decode", "total", "batch")  # the parts behind --compile
GROUPS = {"text": ("text", "long_text", "same_text"), "load": ("load", "alone")}
USUAL = "text,step,negative,control,hint,encode,decode,total"


def rows(taken: Mapping[str, Mapping[str, Taken]], peak_flops: float | None) -> dict[str, dict]:
    """Of every part: both sides' numbers, their ratio, and how much of the machine ours makes use of."""
    measured = {}
    for part, sides in taken.items():
        row = {side: record.row() for side, record in sides.items()}
        ours = row["ours"]
        if peak_flops and "tflop" in ours:
            ours["of_peak"] = 1e12 * ours["tflop"] / ours["median_sec"] / peak_flops
        if "theirs" in row:
            row["ratio"] = row["theirs"]["median_sec"] / ours["median_sec"]
            if sides["ours"].outputs:
                row["difference"] = difference(sides["ours"].outputs, sides["theirs"].outputs)
        if part == "train":
            for side in sides:
                row[side]["images_per_sec"] = training.IMAGES / row[side]["median_sec"]
        measured[part] = row
    if "step" in measured:
        for row in (row for part, row in measured.items() if part != "train"):
            row["steps"] = row["ours"]["median_sec"] / measured["step"]["ours"]["median_sec"]
    return measured


@torch.inference_mode()
def prime(ours: Ours, parts: Sequence[str]) -> None:
    """What is computed once is there before anything is counted: the instruction's states, the kept hint."""
    if set(parts) & {"text", "long_text", "same_text", "total", "batch"}:
        ours.text(-1)
    if "control" in parts:
        ours.kept_hint  # noqa: B018


def add_errors(measured: dict[str, dict], taken: Mapping[str, Mapping[str, Taken]], ours: Ours) -> None:
    """Each side's error against fp32, where one network makes the part."""
    for part in tqdm([part for part in measured if part in NETWORK_OF], desc="errors", leave=False):
        seeds = range(1, 1 + len(taken[part]["ours"].outputs))
        right = exact(ours, part, seeds)
        for side, record in taken[part].items():
            measured[part][side]["error"] = errors(record.outputs, right)


COLUMNS = {
    "seconds": lambda row: row["ours"]["median_sec"],
    "theirs": lambda row: row["theirs"]["median_sec"],
    "speed-up": lambda row: row["ratio"],
    "images/s": lambda row: row["ours"]["images_per_sec"],
    "MiB": lambda row: row["ours"]["peak_mib"],
    "their MiB": lambda row: row["theirs"]["peak_mib"],
    "TFLOP": lambda row: row["ours"]["tflop"],
    "of peak": lambda row: row["ours"]["of_peak"],
    "in steps": lambda row: row["steps"],
    "error": lambda row: row["ours"]["error"],
    "their error": lambda row: row["theirs"]["error"],
    "difference": lambda row: row["difference"],
}


MEANINGS = {
    "seconds": "median of the runs, ours",
    "theirs": "median of the runs, the other side",
    "speed-up": "theirs / ours, in seconds",
    "MiB": "most memory beyond what was there before the call",
    "of peak": "operations per second / those of a large matrix product",
    "in steps": "seconds / those of one transformer step",
    "error": "relative to fp32, root mean square, median of the seeds",
    "difference": "largest between both sides / largest value",
}


def table(measured: Mapping[str, Mapping]) -> str:
    """For people: the columns for which there are figures, and below them what they say."""
    cells = {name: [_cell(read, row) for row in measured.values()] for name, read in COLUMNS.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    lines = [" " * 10 + "".join(f"{name:>13}" for name in cells)]
    for i, part in enumerate(measured):
        lines.append(f"{part:10}" + "".join(f"{column[i]:>13}" for column in cells.values()) + f"   {PARTS[part]}")
    return "\n".join([*lines, *(f"{name} = {meaning}" for name, meaning in MEANINGS.items() if name in cells)])


def _cell(read, row: Mapping) -> str:
    try:
        value = read(row)
    except KeyError:
        return ""
    return "" if value is None else f"{value:.4g}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="demo")
    add("--size", type=int, help="pixels of a side (default: the model's own)")
    add("--parts", default=USUAL, help=f"of {', '.join(PARTS)} (default: {USUAL})")
    add(
        "--against",
        choices=RIVALS,
        help="measure diffusers' pipeline, too, on the same weights (for demo, only --parts train); openvino: its "
        "networks converted, on a CPU",
    )
    add("--plot", type=Path, metavar="FILE", help="a chart of seconds against resolution and batch, instead of --parts")
    add("--plot-sizes", default=",".join(map(str, sweep.SIZES_PX)), help="sides in pixels (default: %(default)s)")
    add("--runs", type=int, default=5)
    add("--busy", type=int, default=0, metavar="N", help="other processes that spin meanwhile")
    add("--seeds", type=int, default=0, help="compare so many results of each part with those in fp32")
    add("--profile", action="store_true", help="where the time of each of our parts goes, by kind of operation")
    add("--compile", action="store_true", help="compile transformer and auto-encoder, on both sides")
    add("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on the CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def _parts(names: str) -> list[str]:
    parts = [name for part in names.split(",") for name in GROUPS.get(part, (part,))]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--parts {','.join(unknown)}: there are {', '.join(PARTS)}")
    return list(dict.fromkeys(parts))


def _check_options(args: argparse.Namespace, parts: Sequence[str]) -> None:
    """Raises ValueError."""
    if args.against:
        RIVALS[args.against][1]()
    if args.against == "openvino" and (args.plot or args.compile or set(parts) & {*GROUPS["load"], "train"}):
        raise ValueError("--against openvino goes without --plot, --compile and the parts load, alone and train")
    if not 0 <= args.busy <= 64:
        raise ValueError(f"--busy {args.busy}: a number of processes from 0 to 64")
    if args.runs < 1:
        raise ValueError(f"--runs is {args.runs}; it must be at least 1")
    if not 0 <= args.seeds <= args.runs:
        raise ValueError(f"--seeds is {args.seeds}; there are as many as --runs, {args.runs}")
    if args.size is not None:
        _size(args.size)
    if args.plot:
        check_image_name(args.plot, "--plot")
        sweep.require_matplotlib()
    if ((args.compile or args.profile) and args.plot) or (args.compile and args.profile):
        raise ValueError("--plot, --compile and --profile go one at a time")
    if args.compile and not set(parts) & set(COMPILED):
        raise ValueError(f"--compile: of these parts nothing is compiled; it is of {', '.join(COMPILED)}")


def run(args: argparse.Namespace) -> dict:
    """One command line, done: the JSON document that it ends with. Raises ValueError."""
    parts = _parts(args.parts)
    _check_options(args, parts)
    device = usable_device(args.device)
    ours = Ours(args.model, args.size, device, DTYPES[args.dtype] if args.dtype else None)
    if args.seeds and ours.dtype == torch.float32:
        raise ValueError("--seeds compares with fp32, which this is; add --dtype bf16")
    rival = RIVALS[args.against][0](ours) if args.against and (args.plot or set(parts) != {"train"}) else None
    if args.plot:
        return _about(args, ours) | {"plot": _plot(args, ours, rival)}
    sides = {"ours": ours} | ({"theirs": rival} if rival else {})
    calls: dict[str, Sides] = {
        part: {side: getattr(made, part) for side, made in sides.items() if hasattr(made, part)}
        for part in parts
        if part not in (*GROUPS["load"], "train")
    }
    if "train" in parts:
        names = ["ours", "theirs"] if args.against else ["ours"]
        calls["train"] = {side: training.Training(side, device, ours.dtype).turn for side in names}
    prime(ours, parts)
    compiled = [network for made in sides.values() for network in made.compilable(parts)] if args.compile else []
    with busy.spinning(args.busy):
        taken = measure(calls, args.runs, device, kept=max(1, args.seeds), compiled=compiled)
    measured = rows(taken, matmul_flops(device, ours.dtype) if calls else None)
    if args.seeds:
        add_errors(measured, taken, ours)
    if "load" in parts:
        measured |= rows(alone.measure(ours, bool(rival), args.runs), None)
    tqdm.write(table(measured))
    if args.profile:
        profiled = shares.shares(calls)
        tqdm.write(shares.table(profiled))
        for part, kinds in profiled.items():
            measured[part]["ours"]["shares"] = kinds
    return {**_about(args, ours), "parts": _rounded(measured)}


def _about(args: argparse.Namespace, ours: Ours) -> dict:
    device, dtype = ours.device, str(ours.dtype).removeprefix("torch.")
    gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if gpu else _cpu_name()
    against = {"against": f"{args.against} {RIVALS[args.against][1]()}"} if args.against else {}
    about = {"model": args.model, "size_px": ours.size_px, "dtype": dtype} | against
    about |= {"compiled": True} if args.compile else {}
    about |= {"busy": args.busy} if args.busy else {}
    return about | {"device": str(device), "machine": machine, "threads": torch.get_num_threads(), "runs": args.runs}


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line for line in file if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _plot(args: argparse.Namespace, ours: Ours, rival: Theirs | None) -> dict:
    sizes = [_size(px) for px in args.plot_sizes.split(",")]
    measured = sweep.sweep(ours, rival, args.runs, sizes)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    title = f"{args.model}, {str(ours.dtype).removeprefix('torch.')}, {ours.device}, {torch.get_num_threads()} threads"
    sweep.chart(measured, title, args.plot)
    return _rounded(measured) | {"file": str(args.plot.resolve())}


def _size(px: int | str) -> int:
    """Raises ValueError."""
    if not str(px).isdigit() or int(px) % DOWNSCALE or not MIN_PX <= int(px) <= MAX_PX:
        raise ValueError(f"--size {px}: a multiple of {DOWNSCALE} from {MIN_PX} to {MAX_PX}")
    return int(px)


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    return cli.run(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
