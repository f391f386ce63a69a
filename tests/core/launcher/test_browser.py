"""How a browser for the tests is found and installed, with stand-ins for the programs that do it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import browser, setup

BROWSER = "#!/bin/sh\necho Chromium 150\n"
APT_GET = '#!/bin/sh\necho "apt-get $@" >> "{log}"\n[ "$1" = update ] || {{ {installs}; }}\n'
SUDO = '#!/bin/sh\n[ "$1" = -n ] && shift && exec "$@"\n'
# Playwright's Python: what it prints as its browser's place, and its command that fills it.
PYTHON = '#!/bin/sh\nif [ "$1" = -c ]; then echo "{place}"; else echo "$@" >> "{log}"; {installs}; fi\n'
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder that is the whole PATH but for the shell's own tools, and a function that puts a program there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("env", "cp", "true"):
        (folder / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("SPRINT_CHROMIUM", raising=False)
    monkeypatch.setattr(browser, "ELSEWHERE", [])
    for name in ("HOME", "LOG"):
        monkeypatch.setattr(setup, name, tmp_path / name.lower())
    (tmp_path / "ready").write_text(BROWSER)
    (tmp_path / "ready").chmod(0o755)

    def put(name: str, script: str) -> Path:
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
        return folder / name

    return put


def copies(source: Path, target: Path) -> str:
    return f'cp "{source}" "{target}"'


def commands(tmp_path: Path) -> list[str]:
    log = tmp_path / "commands"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("user", [0, 1000])
def test_apt_get_installs_one_as_root_or_by_sudo_without_a_password(machine, tmp_path, monkeypatch, capsys, user):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    installs = copies(tmp_path / "ready", tmp_path / "bin" / "chromium")
    machine("apt-get", APT_GET.format(log=tmp_path / "commands", installs=installs))
    if user:
        machine("sudo", SUDO)
    assert browser.chromium() is None
    assert browser.install_chromium(Path("/no/playwright")) == str(tmp_path / "bin" / "chromium")
    assert commands(tmp_path) == ["apt-get update", "apt-get install -y --no-install-recommends chromium"]
    assert "no Chromium or Chrome found: apt-get install chromium" in capsys.readouterr().err
    assert browser.chromium() == str(tmp_path / "bin" / "chromium")  # the next run finds it


@pytest.mark.parametrize("stub", [False, True])
def test_playwright_brings_one_where_apt_get_does_not(machine, tmp_path, monkeypatch, capsys, stub):
    """As on Ubuntu, whose package is a script that asks for a snap; and a second time the cache has it."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    place, log = tmp_path / "cache" / "chrome", tmp_path / "commands"
    place.parent.mkdir()
    (tmp_path / "stub").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "stub").chmod(0o755)
    installs = copies(tmp_path / "stub", tmp_path / "bin" / "chromium") if stub else "exit 100"
    machine("apt-get", APT_GET.format(log=log, installs=installs))
    python = machine("python", PYTHON.format(place=place, log=log, installs=copies(tmp_path / "ready", place)))
    assert browser.by_playwright(python) == str(place)
    assert commands(tmp_path) == ["-m playwright install --with-deps chromium"]
    assert browser.install_chromium(python) == str(place)
    assert len(commands(tmp_path)) == 3  # apt-get's two
    assert "playwright install chromium" in capsys.readouterr().err


def test_without_rights_playwright_installs_no_libraries(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    place, log = tmp_path / "chrome", tmp_path / "commands"
    machine("apt-get", APT_GET.format(log=log, installs="exit 1"))
    python = machine("python", PYTHON.format(place=place, log=log, installs=copies(tmp_path / "ready", place)))
    assert browser.install_chromium(python) == str(place)
    assert commands(tmp_path) == ["-m playwright install chromium"]


@pytest.mark.parametrize("installs", ["echo no network; exit 1", "true"])
def test_what_to_install_is_said_where_neither_can(machine, tmp_path, capsys, installs):
    python = machine("python", PYTHON.format(place=tmp_path / "chrome", log=tmp_path / "commands", installs=installs))
    assert browser.install_chromium(python) is None
    text = capsys.readouterr().err
    assert (
        "tests/browser will fail; install Chromium or Chrome (on Debian and Ubuntu: apt-get install chromium)" in text
    )
    assert ("no network" in text) == ("network" in installs) and ("does not start" in text) == (installs == "true")


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], True),
        (["-k", "help"], True),
        (["tests"], True),
        (["tests/core", "tests/browser/test_help.py"], True),
        (["tests/core/test_docs.py", "-x"], False),
    ],
)
def test_a_browser_is_wanted_unless_other_tests_are_named(argv, wanted):
    assert browser.wanted(argv) == wanted


def test_the_place_of_playwrights_browser_is_known():
    """Of the real one, whether or not it is there."""
    place = subprocess.check_output([sys.executable, "-c", browser.PLAYWRIGHTS], text=True).strip()
    assert "chrom" in Path(place).name.lower()
