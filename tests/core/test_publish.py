"""What the registry asks (docs.comfy.org/registry/specifications), read by comfy-cli as it reads it to publish."""

import re
from pathlib import Path

import pytest
from comfy_cli.registry.config_parser import extract_node_configuration
from PIL import Image

from tools import publish

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
HERE = "https://github.com/someone/a.pack"


@pytest.mark.parametrize(
    "address",
    [HERE, f"{HERE}.git", f"{HERE}/", "git@github.com:someone/a.pack.git", "ssh://git@github.com/someone/a.pack\n"],
)
def test_an_address_on_github_in_any_form(address):
    assert publish.repository_of(address) == HERE


@pytest.mark.parametrize("address", ["", "/home/someone/pack", "https://example.com/someone/pack", "github.com/one"])
def test_other_addresses_are_refused(address):
    with pytest.raises(publish.Fault, match="is no repository on GitHub; give its address"):
        publish.repository_of(address)


def test_what_the_registry_reads_once_the_addresses_are_written(tmp_path, capsys):
    file = tmp_path / "pyproject.toml"
    earlier = publish.addressed(PROJECT, "https://github.com/another/name")
    file.write_text(publish.addressed(earlier, HERE), encoding="utf-8")
    assert file.read_text(encoding="utf-8") == publish.addressed(PROJECT, HERE)
    read = extract_node_configuration(str(file))
    assert "Warning" not in capsys.readouterr().out
    raw = "https://raw.githubusercontent.com/someone/a.pack/HEAD/assets"
    urls, comfy = read.project.urls, read.tool_comfy
    assert (urls.repository, urls.issues) == (HERE, f"{HERE}/issues")
    assert urls.documentation == f"{HERE}/blob/HEAD/docs/nodes.md" and (ROOT / "docs" / "nodes.md").is_file()
    assert (comfy.icon, comfy.banner_url) == (f"{raw}/icon.png", f"{raw}/banner.png")
    assert (comfy.publisher_id, comfy.display_name) == ("sana-sprint", "SANA-Sprint")
    assert read.project.supported_os == ["OS Independent"]
    assert (read.project.supported_comfyui_version, read.project.supported_comfyui_frontend_version) == (
        ">=0.16.3",
        ">=1.39.19",
    )


def test_the_rest_of_the_project_stays(tmp_path):
    lines = publish.addressed(PROJECT, HERE).splitlines()
    assert [line for line in lines if HERE not in line and "raw.githubusercontent" not in line] == PROJECT.splitlines()


def test_the_id_and_the_version():
    project = extract_node_configuration(str(ROOT / "pyproject.toml")).project
    assert re.fullmatch(r"[a-z]([a-z0-9]|[-_.](?=[a-z0-9]))*", project.name) and len(project.name) < 100
    assert "comfyui" not in project.name
    assert re.fullmatch(r"\d+\.\d+\.\d+", project.version)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[(Unreleased\]: )?{re.escape(project.version)}\b", changes, re.MULTILINE)
    assert project.description and (ROOT / project.license.file).is_file()


def test_icon_and_banner_have_the_registrys_shapes():
    with Image.open(ROOT / "assets" / "icon.png") as icon, Image.open(ROOT / "assets" / "banner.png") as banner:
        assert icon.width == icon.height <= 400
        assert banner.width * 9 == banner.height * 21


def test_the_manager_finds_no_nodes_but_ours():
    """ComfyUI-Manager reads literals of node mappings in every file of a repository, tests and tools too."""
    literal = re.compile(r"_CLASS_MAPPINGS(?:\.update\(|\s*=)\s*\{[^}]|\A[^=]*_CLASS_MAPPINGS\[['\"]")
    files = [file for file in ROOT.rglob("*.py") if ".host" not in file.parts and ".venv" not in file.parts]
    assert len(files) > 100 and literal.search("_CLASS_MAPPINGS".join(("NODE", " = {'a': A}")))
    assert not [str(file) for file in files if literal.search(file.read_text(encoding="utf-8"))]
