"""The documents hold together: links lead somewhere, commands name what exists, the README is short."""

import importlib.util
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "sprint_core" / "demo" / "README.md"]
README_WORDS = 1500


def prose(page: Path) -> str:
    """A page without its blocks of code, in which `#` begins a comment."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of headings: lower case, hyphens for spaces, without signs."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose(page)) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / unquote(path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"-m ((?:sprint_core|benchmarks|tools)[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    for script in re.findall(r"python ((?:tools|benchmarks)/\w+\.py|run\.py)", text):
        assert (ROOT / script).is_file(), script
    for tests in re.findall(r"`(tests/[\w./]+)`", text):
        assert (ROOT / tests).exists(), tests


def test_the_readme_is_short_and_shows_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= README_WORDS
    assert '\npython run.py "' in text and "\npython run.py test" in text
