"""Which files of a folder are its weights: the first variant whose files are all there.

    model.safetensors.index.json, model.safetensors.index.fp16.json     an index of shards
    model-00001-of-00002.safetensors ...                                shards without one
    model.safetensors, model.fp16.safetensors                           one file
    pytorch_model.bin.index.json, pytorch_model.bin ...                 the same of pickles

Downloads of one variant leave the index of another behind, and hidden files, logs and states of a training lie beside.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from .. import disk, messages

SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
WEIGHT_SUFFIXES = SAFETENSORS + PICKLES
VARIANTS = ("", ".bf16", ".fp16", ".fp32")  # of diffusers file names, in order of preference, which is diffusers' own
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SHARD = re.compile(r"(?P<front>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<back>(?:\.\w+)?)\.(?P<suffix>\w+)\Z")
# What trainers save beside the weights, and no weights.
STATES = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state|random_states)[\w.-]*\Z")
LISTED = 10  # names in a message


def is_shard(name: str) -> bool:
    """Whether a file name is one part of a sharded model, which no list should show by itself."""
    return SHARD.match(name) is not None


def is_standard(name: str) -> bool:
    """Whether a file name is one under which libraries look for a folder's weights."""
    stems = [f"{stem}{variant}" for stem in STEMS for variant in VARIANTS]
    return any(name in (f"{stem}.safetensors", f"{stem}.bin") for stem in stems)


def files_of(folder: Path) -> list[Path]:
    """The weight files of a folder. Raises ValueError, whose message says what is missing of the first variant."""
    problems: list[str] = []
    for suffix in (".safetensors", ".bin"):
        for variant in VARIANTS:
            for found in (_indexed(folder, suffix, variant, problems), _unindexed(folder, suffix, variant, problems)):
                if found:
                    return found
            for stem in STEMS:
                if (file := folder / f"{stem}{variant}{suffix}").is_file():
                    return [file]
    if problems:
        raise ValueError(problems[0])
    files = [file for file in _listing(folder) if _may_be_weights(file)]
    if len(files) == 1:
        return files
    raise ValueError(f"expected one weight file or an index of shards, found {len(files)} files")


def shards_of(folder: Path) -> list[Path]:
    """The shards of a folder, if all are there; else nothing."""
    try:
        files = files_of(folder) if any(is_shard(file.name) for file in _listing(folder)) else []
    except (OSError, ValueError):
        return []
    return files if all(is_shard(file.name) for file in files) else []


def _listing(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.iterdir()))


def _may_be_weights(file: Path) -> bool:
    weights = file.suffix.lower() in WEIGHT_SUFFIXES and file.is_file()
    return weights and not is_shard(file.name) and not file.name.startswith(".") and not STATES.match(file.name)


def _indexed(folder: Path, suffix: str, variant: str, problems: list[str]) -> list[Path]:
    """The shards that an index lists, if all are there."""
    names = (f"*{suffix}.index{variant}.json", f"*{variant}{suffix}.index.json")
    indexes = [file for pattern in dict.fromkeys(names) for file in sorted(folder.glob(pattern))]
    for index in indexes:
        stem = index.name.removesuffix(f"{suffix}.index.json")
        if not variant and stem.endswith(VARIANTS[1:]):
            continue
        names = _names_in(index, problems)
        missing = [name for name in names if not disk.is_name(name) or not (folder / name).is_file()]
        if names and not missing:
            return [folder / name for name in names]
        if names:
            problems.append(f"{index.name} lists files that are not there: {messages.listed(missing, LISTED)}")
    return []


def _names_in(index: Path, problems: list[str]) -> list[str]:
    try:
        weight_map = disk.read_json(index)["weight_map"]
        names = sorted(set(map(str, weight_map.values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        problems.append(f"{index.name} is no index of shards; take another copy of it")
        return []
    if not names:
        problems.append(f"{index.name} lists no files; take another copy of it")
    return names


def _unindexed(folder: Path, suffix: str, variant: str, problems: list[str]) -> list[Path]:
    """Shards that belong together by their names, if all are there."""
    sets: dict[tuple[str, str, str], dict[int, Path]] = {}
    for file in _listing(folder):
        match = SHARD.match(file.name)
        if match and f".{match['suffix']}" == suffix and file.is_file():
            own = next((v for v in VARIANTS[1:] if match["front"].endswith(v) or match["back"] == v), "")
            if own == variant:
                key = (match["front"], match["count"], match["back"])
                sets.setdefault(key, {})[int(match["number"])] = file
    for (front, count, back), files in sets.items():
        missing = [number for number in range(1, int(count) + 1) if number not in files]
        if not missing:
            return [files[number] for number in sorted(files)]
        names = [f"{front}-{number:05}-of-{count}{back}{suffix}" for number in missing]
        problems.append(f"shards are missing: {messages.listed(names, LISTED)}; download them, too")
    return []
