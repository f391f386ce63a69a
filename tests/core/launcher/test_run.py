"""The command line, as far as it needs no ComfyUI, and that it needs nothing but Python."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import run

ROOT = Path(__file__).resolve().parents[3]
LAUNCHER = [ROOT / "run.py", *sorted((ROOT / "launcher").glob("*.py"))]
SHARED = ("sprint_core.threads", [ROOT / "sprint_core" / name for name in ("__init__.py", "threads.py")])


@pytest.mark.parametrize("file", [*LAUNCHER, *SHARED[1]], ids=lambda file: f"{file.parent.name}.{file.stem}")
def test_the_launcher_imports_the_standard_library_alone(file):
    """Also inside functions, and what it shares with the core: run.py starts on a Python that has nothing else."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = ["launcher" if node.level or node.module == SHARED[0] else node.module]
        else:
            continue
        assert {module.split(".")[0] for module in modules} <= {"launcher", *sys.stdlib_module_names}


def test_run_works_without_site_packages(tmp_path):
    """As in a Python that has nothing but its standard library (-S), started from somewhere else."""
    environment = {**os.environ, "SPRINT_HOST": str(tmp_path / "host")}
    command = [sys.executable, "-S", ROOT / "run.py", "--help"]
    usage = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert "run.py test --oldest" in usage
    assert not list(tmp_path.iterdir())


def test_an_earlier_image_is_kept(tmp_path):
    path = tmp_path / "image_.png"
    names = []
    for _ in range(3):
        names.append(run.unused(path).name)
        run.unused(path).touch()
    assert names == ["image_.png", "image_2.png", "image_3.png"]


@pytest.mark.parametrize(
    ("argv", "message"), [(["serv"], "did you mean the command serve"), (["cat", "--steps", "9"], "9")]
)
def test_mistyped_commands_and_steps_are_refused_at_once(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        run.main(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_linked_pack_uses_the_comfyui_that_links_it(tmp_path):
    """The script's own path says where; Python resolves the links of all that it imports."""
    for name in ("main.py", "comfyui_version.py"):
        (tmp_path / name).write_text("raise SystemExit('the ComfyUI around the pack')")
    link = tmp_path / "custom_nodes" / "linked"
    link.parent.mkdir()
    link.symlink_to(ROOT, target_is_directory=True)
    environment = {**os.environ, "SPRINT_HOST": str(tmp_path / "host"), "SPRINT_PYTHON": sys.executable}
    environment.pop("COMFYUI_PATH", None)
    (tmp_path / "host").mkdir()
    command = [sys.executable, link / "run.py", "a circle"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "error: ComfyUI ended with code 1" in done.stderr and "the ComfyUI around the pack" in done.stderr
