"""A Chromium for the tests: the one that SPRINT_CHROMIUM names, one that is installed, or one that is installed now."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher.setup import Fault, command, lock, say, timed

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge"]
ELSEWHERE = [
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
]
PLAYWRIGHTS = "from playwright.sync_api import sync_playwright as p\nwith p() as p: print(p.chromium.executable_path)"
ADVICE = "install Chromium or Chrome (on Debian and Ubuntu: apt-get install chromium), or let SPRINT_CHROMIUM name one"


def chromium() -> str | None:
    """The browser that SPRINT_CHROMIUM names, or one that is installed and starts."""
    installed = filter(None, map(shutil.which, [*NAMES, *ELSEWHERE]))
    return os.environ.get("SPRINT_CHROMIUM") or next(filter(starts, installed), None)


def wanted(argv: Sequence[str]) -> bool:
    """Whether pytest's arguments may run tests of the browser: all do but those that name other tests only."""
    paths = [word for word in argv if word.startswith("tests/")]
    return not paths or any(word.startswith("tests/browser") for word in paths)


def starts(browser: str | Path) -> bool:
    """Whether a browser is more than a file: Ubuntu's package is a script that asks for a snap."""
    if os.name == "nt":
        return Path(browser).is_file()  # --version opens a window there
    try:
        return not subprocess.run([browser, "--version"], capture_output=True, timeout=60).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def install_chromium(python: Path) -> str | None:
    """Install Chromium by apt-get where that may be, else by Playwright's own command; None, and said, if neither can.

    Args:
        python: one that has Playwright, which the tests need anyway
    """
    with lock():
        try:
            return by_apt_get() or by_playwright(python)
        except Fault as fault:
            say(f"{fault}\n  no Chromium or Chrome found: tests/browser will fail; {ADVICE}")
            return None


def root() -> list[str] | None:
    """What to write before a command of the administrator: nothing, or sudo without a password; None if neither may."""
    if not hasattr(os, "geteuid"):
        return None
    if os.geteuid() == 0:
        return []
    sudo = shutil.which("sudo")
    return [sudo, "-n"] if sudo and not subprocess.run([sudo, "-n", "true"], capture_output=True).returncode else None


def by_apt_get() -> str | None:
    """Debian's package, where apt-get is and may; None if that gives no browser that starts."""
    apt_get, before = shutil.which("apt-get"), root()
    if not apt_get or before is None:
        return None
    install = [*before, "env", "DEBIAN_FRONTEND=noninteractive", apt_get, "install", "-y", "--no-install-recommends"]
    try:
        with timed("no Chromium or Chrome found: apt-get install chromium"):
            command([*before, apt_get, "update"], ADVICE)
            command([*install, "chromium"], ADVICE)
    except Fault:  # no such package: Playwright's may do
        return None
    return chromium()


def by_playwright(python: Path) -> str | None:
    """The Chromium that Playwright keeps in its cache, downloaded if need be; Fault if that fails.

    Its libraries are the system's, which only an administrator can add.
    """
    browser = subprocess.check_output([python, "-c", PLAYWRIGHTS], text=True).strip()
    if not starts(browser):
        with timed("no Chromium or Chrome found: playwright install chromium"):
            libraries = ["--with-deps"] if shutil.which("apt-get") and root() is not None else []
            command([python, "-m", "playwright", "install", *libraries, "chromium"], ADVICE)
        if not starts(browser):
            raise Fault(f"{browser} does not start, as libraries of the system are missing")
    return browser
