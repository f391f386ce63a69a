"""Publish this pack in the Comfy Registry: one command for whoever owns the publisher's account.

    python run.py python -m tools.publish [https://github.com/OWNER/NAME] [--write-only]

Writes into pyproject.toml where the repository, its documents, its issues, the icon and the banner are found on GitHub,
which is known where the pack is published and not before: the address given, else that of the remote `origin`. Then
`comfy node publish` checks, packs and uploads; it asks for the account's token, or takes REGISTRY_ACCESS_TOKEN.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GITHUB = re.compile(r"(?:https://|ssh://)?(?:[^@/]+@)?github\.com[:/]([\w.-]+)/([\w.-]+?)(?:\.git)?/?")


class Fault(Exception):
    """A failure that the user can do something about; the message says what."""


def repository_of(address: str) -> str:
    """https://github.com/OWNER/NAME of any address of a repository there; Fault of any other."""
    if match := GITHUB.fullmatch(address.strip()):
        return "https://github.com/{}/{}".format(*match.groups())
    raise Fault(f"{address.strip() or 'origin'} is no repository on GitHub; give its address as the argument")


def addressed(project: str, repository: str) -> str:
    """The text of pyproject.toml with the addresses that the registry asks for, instead of any that it had."""
    files = repository.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/HEAD/assets"
    tables = {
        "project.urls": {
            "Repository": repository,
            "Documentation": f"{repository}/blob/HEAD/docs/nodes.md",
            "Issues": f"{repository}/issues",
        },
        "tool.comfy": {"Icon": f"{files}/icon.png", "Banner": f"{files}/banner.png"},
    }
    for table, entries in tables.items():
        names = "|".join(entries)
        head, name, tail = project.partition(f"[{table}]\n")
        body, gap, rest = tail.partition("\n[")
        body = re.sub(rf"^#? ?(?:{names}) = .*\n", "", body + "\n", flags=re.MULTILINE).rstrip("\n") + "\n"
        body += "".join(f'{key} = "{address}"\n' for key, address in entries.items())
        project = head + name + body + gap + rest
    return project


def origin() -> str:
    """The address of the remote `origin`; empty where there is none."""
    git = ["git", "remote", "get-url", "origin"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.publish", description="Publish in the Comfy Registry.")
    parser.add_argument("repository", nargs="?", help="address on GitHub (default: that of the remote origin)")
    parser.add_argument("--write-only", action="store_true", help="write the addresses and publish nothing")
    options = parser.parse_args(argv)
    try:
        repository = repository_of(options.repository or origin())
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    project = ROOT / "pyproject.toml"
    project.write_text(addressed(project.read_text(encoding="utf-8"), repository), "utf-8", newline="\n")
    print(f"{project.name}: the addresses of {repository}")
    comfy = Path(sys.executable).with_name("comfy.exe" if os.name == "nt" else "comfy")
    return 0 if options.write_only else subprocess.call([comfy, "node", "publish"], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
