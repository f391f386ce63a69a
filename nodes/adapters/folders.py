"""ComfyUI's model folders: what the loaders list, and where a listed name lies.

A folder with a description, such as a sharded encoder or a whole diffusers pipeline, is one entry, and so are shards
that lie straight in a folder of ComfyUI's; their files are not listed. All other files are, at any depth.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import folder_paths

from ...sprint_core import disk, messages
from ...sprint_core.images import preview
from ...sprint_core.weights import layouts, presets
from ...sprint_core.weights.folder_files import WEIGHT_SUFFIXES, files_of, is_shard, is_standard, shards_of
from ...sprint_core.weights.tensorfile import CheckpointError
from . import screen

log = messages.logger(__name__)

PIPELINES = "diffusers"
APPROXIMATE = "vae_approx"  # tiny decoders of all families lie there; names tell them apart
TINY_DECODER = "taesana_decoder"
BUNDLED = {presets.BUNDLED_NAME: presets.BUNDLED, presets.BUNDLED_CONTROL_NAME: presets.BUNDLED_CONTROL}


def _entries(root: Path, around: frozenset[str] = frozenset()) -> dict[str, Path]:
    """Files and model folders below root: {name relative to root, with /: path}. As deep as ComfyUI's own lists.

    around: the real paths of the folders that this one lies in, so that links in a circle end.
    """
    entries: dict[str, Path] = {}
    real = os.path.realpath(root)
    try:
        children = sorted(os.scandir(root), key=lambda entry: entry.name.lower())
    except OSError:
        return entries
    if real in around:
        return entries
    for child in children:
        path = Path(child.path)
        if path.is_dir() and child.name != ".git":  # unlike DirEntry's, quiet about links that lead in a circle
            if _is_model(path):
                entries[child.name] = path
            inner = _entries(path, around | {real})
            if (path / "model_index.json").is_file():  # whose components are no entries
                inner = {name: file for name, file in inner.items() if file.parent == path and file.is_file()}
            entries |= {f"{child.name}/{name}": file for name, file in inner.items() if not _belongs(file, entries)}
        elif path.suffix.lower() in WEIGHT_SUFFIXES and not is_shard(child.name):
            entries[child.name] = path
    return entries


def _is_model(folder: Path) -> bool:
    """Whether a folder is one entry: a pipeline, a component with its description, or shards that belong together."""
    if (folder / "model_index.json").is_file() or shards_of(folder):
        return True
    try:
        described = disk.read_json(folder / "config.json")
        return bool({"_class_name", "model_type", "architectures"} & set(described)) and bool(files_of(folder))
    except (OSError, ValueError, TypeError):
        return False


def _belongs(file: Path, entries: dict[str, Path]) -> bool:
    """Whether a file is the only one, or one of the usual names, of a folder that is an entry itself."""
    if file.parent not in entries.values() or file.is_dir() or (file.parent / "model_index.json").is_file():
        return False
    return is_standard(file.name) or file in files_of(file.parent)


def _listed(keys: Iterable[str]) -> Iterator[tuple[Path, dict[str, Path]]]:
    """Each of these model folders, and those of the pipelines, with its entries: {name: path}."""
    for key in (*keys, PIPELINES):
        if key not in folder_paths.folder_names_and_paths:
            continue
        for root in folder_paths.get_folder_paths(key):
            entries = _entries(Path(root))
            if shards_of(Path(root)):  # a model put straight into ComfyUI's folder
                entries = {f"{Path(root).name}/": Path(root)} | entries
            if key == PIPELINES:
                entries = {name: path for name, path in entries.items() if path.is_dir()}
            if key == APPROXIMATE:
                entries = {name: path for name, path in entries.items() if name.startswith(TINY_DECODER)}
            yield Path(root), entries


def models(*keys: str) -> dict[str, Path]:
    """What lies in these model folders, and the pipelines: {name: path}. The first of equal names counts."""
    listed: dict[str, Path] = {}
    for _, entries in _listed(keys):
        listed = entries | listed
    return listed


def choices(*keys: str, bundled: str = presets.BUNDLED_NAME) -> list[str]:
    """The names for a drop-down; what is bundled first."""
    names = sorted(models(*keys), key=str.lower)
    return [bundled, *(name for name in names if name != bundled)]


def find(name: str, *keys: str) -> Path:
    """Path of a listed name. Raises CheckpointError."""
    namesakes = [(root, entries[name]) for root, entries in _listed(keys) if name in entries]
    if name in BUNDLED:
        namesakes.insert(0, (Path(screen.PACK), BUNDLED[name]))
    if namesakes:
        warn_of_namesakes(name, namesakes)
        return namesakes[0][1]
    raise CheckpointError(
        f"{name} is in none of the model folders {', '.join((*keys, PIPELINES))}; put it there and press R to refresh"
    )


def warn_of_namesakes(name: str, found: Iterable[tuple[Path, Path]]) -> None:
    """Say which file is read where other model folders have one of its name: (folder, path) of each, in their order."""
    folders: dict[str, str] = {}
    for root, path in found:
        folders.setdefault(os.path.realpath(path), "/".join(root.parts[-2:]))  # no more of it: paths are the user's
    if len(folders) > 1:
        read, *others = folders.values()
        text = f"{name}: read from {read}; {', '.join(others)} has another of this name, rename it to choose it"
        log.warning("%s", text)
        screen.hold(text)


def stamp(name: str, *keys: str) -> str:
    """Changes when the file or folder behind a name does, or what belongs to it, so that it is read again.

    A hash: ComfyUI stores it in every image, and paths are the user's own business.
    """
    path = BUNDLED.get(name) or models(*keys).get(name)
    if path is None:
        return name
    neighbours = (preview.fit_path(path), layouts.tiny_autoencoder.partner(path))
    return stamp_of(sorted(path.rglob("*")) if path.is_dir() else [path, *filter(None, neighbours)])


def stamp_of(files: Iterable[Path]) -> str:
    """Changes when one of these files does, appears or vanishes. Raises nothing: ComfyUI would log what it is."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with contextlib.suppress(OSError):
            digest.update(os.fsencode(file) + b"\0" + str(file.stat().st_mtime_ns).encode() + b"\0")
    return digest.hexdigest()
