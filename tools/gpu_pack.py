"""Pack what a bare GPU machine needs to run ComfyUI with this pack: sections host and nodes of tools/gpu_check.py.

    python run.py python -m tools.gpu_pack [--python 3.12] [--out DIR] [--comfyui DIR]

The machine has torch, torchvision, torchaudio, transformers, safetensors, einops, numpy, scipy and Pillow, with what
they need, and no network. The pack is a folder of two files: what it is (pack.json), and all else (files.tar.xz), which
is ComfyUI without what only its server, its users or its own tests need, and packages in the versions of the Python
that runs this, for Linux on x86-64. PyAV and kornia, of 43 MB, are stubs: ComfyUI imports them, and nothing here uses
them. comfy-kitchen comes without its CUDA kernels: layers of 8 bits are computed by what it has in Python.
Together with the repository it has to fit into what such a machine takes.
"""

import argparse
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / ".gpu" / "pack"
DESCRIPTION, FILES = "pack.json", "files.tar.xz"
MIB = 2**20
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync"  # with which ComfyUI starts on NVIDIA's
LIMIT_MIB = 64
PACKAGES = (
    "comfy-aimdo", "comfy-kitchen", "torchsde", "trampoline", "sqlalchemy", "psutil", "sentencepiece",
    "pydantic", "pydantic-core", "pydantic-settings", "annotated-types", "typing-inspection", "python-dotenv",
    "aiohttp", "aiohappyeyeballs", "aiosignal", "attrs", "frozenlist", "multidict", "propcache", "yarl", "idna",
    "requests", "urllib3", "certifi", "charset-normalizer",
    "pytest", "pytest-xdist", "execnet", "iniconfig", "pluggy", "pygments", "hypothesis", "sortedcontainers",
    "diffusers", "peft", "accelerate",
)  # fmt: skip
# Modules that ComfyUI imports, by package.
STUBS = {
    "av": ("av", "av.container", "av.subtitles", "av.subtitles.stream", "av.video", "av.video.reformatter"),
    "kornia": ("kornia", "kornia.color", "kornia.filters", "kornia.morphology"),
}
STUB = '''"""Stands in for a package that is imported and not used: any name in it is an empty class."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
'''
# Native code that stays behind, as these packages have the same in Python: comfy-kitchen's alone is 160 MB.
NATIVE = re.compile(r"(aiohttp|comfy_kitchen|sqlalchemy)/.*\.so$")
# Of ComfyUI: folders at its root, and from how many bytes on data does.
FOLDERS = {"tests", "tests-unit", "blueprints", "comfy_api_nodes", "script_examples", "alembic_db"}
FOLDERS |= {"models", "input", "output", "custom_nodes", "temp", "user"}
LARGE = 100_000
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 35)]
PLATFORMS += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]


class Fault(Exception):
    """A failure that the user can do something about; the message says what."""


def of_comfyui(folder: Path) -> Iterator[Path]:
    """Files of ComfyUI that its nodes need, relative to its folder, sorted. Fault where there is none."""
    if not (folder / "comfyui_version.py").is_file():
        raise Fault(f"{folder}: holds no ComfyUI; run this by `python run.py python`, or name one with --comfyui")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        is_data = path.suffix != ".py" and path.is_file() and path.stat().st_size > LARGE
        if path.is_file() and not (hidden or is_data or name.parts[0] in FOLDERS):
            yield name


def download(names: Sequence[str], python: str, folder: Path) -> list[Path]:
    """Wheels of these packages for another Python, in this one's versions. Fault where there is none."""
    if not names:
        return []
    try:
        wanted = [f"{name}=={importlib.metadata.version(name)}" for name in names]
    except importlib.metadata.PackageNotFoundError as error:
        raise Fault(f"{sys.executable}: has no {error.name}; run this by `python run.py python`") from error
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    options += [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "--dest", str(folder), *wanted]
    if subprocess.run(command).returncode:
        raise Fault(f"pip has no wheels of all packages for Python {python}; what it said above names the one")
    return sorted(folder.glob("*.whl"))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """As a plain file whose date says nothing, so that equal content makes equal packs."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _add_wheel(tar: tarfile.TarFile, wheel: Path) -> tuple[str, dict]:
    """Puts a wheel's files into a folder of its own. Returns the package's name, and its version and modules."""
    package, version = wheel.name.split("-")[:2]
    modules = set()
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            top = PurePosixPath(name).parts[0]
            if name.endswith("/") or top.endswith(".data") or NATIVE.match(name):
                continue
            _add(tar, f"site/{package}/{name}", archive.read(name))
            if not top.endswith((".dist-info", ".libs")):
                modules.add(top.removesuffix(".py").partition(".")[0])
    return package, {"version": version, "modules": sorted(modules)}


def _add_stub(tar: tarfile.TarFile, package: str) -> tuple[str, dict]:
    for module in STUBS[package]:
        _add(tar, f"site/{package}/{module.replace('.', '/')}/__init__.py", STUB.encode())
    return package, {"version": "stub", "modules": [package]}


def write(folder: Path, comfyui: Path, wheels: Sequence[Path], python: str) -> None:
    """The pack's two files."""
    names = list(of_comfyui(comfyui))
    with tarfile.open(folder / FILES, "w:xz") as tar:
        for name in names:
            _add(tar, f"comfyui/{name.as_posix()}", (comfyui / name).read_bytes())
        packages = dict([_add_wheel(tar, wheel) for wheel in wheels] + [_add_stub(tar, package) for package in STUBS])
    version = re.search(r'"(.*)"', (comfyui / "comfyui_version.py").read_text(encoding="utf-8"))
    description = {"python": python, "comfyui": version and version[1], "packages": packages}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def repository_bytes(out: Path) -> int:
    """Of the files that git knows or would take, as a machine gets them, but for those of an earlier pack in `out`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        raise Fault(f"{ROOT}: git cannot list its files ({listed.stderr.strip()}); run this in a clone")
    files = [ROOT / name for name in set(listed.stdout.split("\0")) if name]
    return sum(file.lstat().st_size for file in files if file.is_file() and out not in file.parents)


def pack(
    out: Path, comfyui: Path, python: str, limit_mib: float = LIMIT_MIB, packages: Sequence[str] = PACKAGES
) -> dict[str, float]:
    """Make a pack in a folder, instead of the one that was there. Returns sizes in MiB; Fault above the limit."""
    repository = repository_bytes(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".pack.") as temporary:
        made, wheels = Path(temporary, "pack"), Path(temporary, "wheels")
        made.mkdir()
        write(made, comfyui, download(packages, python, wheels), python)
        sizes = {"repository": repository, "pack": sum(file.stat().st_size for file in made.iterdir())}
        sizes["both"] = sum(sizes.values())
        if sizes["both"] > limit_mib * MIB:
            words = ", ".join(f"{name} {size / MIB:.1f}" for name, size in sizes.items())
            raise Fault(
                f"{out}: above {limit_mib:g} MiB ({words}), so nothing was written; take packages out of PACKAGES"
            )
        out.mkdir(exist_ok=True)
        for file in made.iterdir():
            file.replace(out / file.name)
    return {name: round(size / MIB, 2) for name, size in sizes.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    this = ".".join(map(str, sys.version_info[:2]))
    parser.add_argument("--python", default=this, help="version of the machine's Python (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=PACK, help="folder to make (default: .gpu/pack)")
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("SPRINT_COMFYUI", "."), help="its folder")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_MIB, help="MiB, with the repository (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        sizes = pack(args.out.resolve(), args.comfyui.resolve(), args.python, args.limit)
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    print(json.dumps({"pack": str(args.out), "python": args.python, "mib": sizes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
