"""What the registry ships: packed by comfy-cli, unzipped into a clean ComfyUI, it runs; and how long loading takes."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from launcher.client import Server
from launcher.setup import PACK_NAME, prepare_base

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 0.6  # an idle machine takes 0.2, and one heavy import more than 1
PEERS = (  # node ids of the packs that ran SANA before: ComfyUI_ExtraModels with its forks, and ComfyUI-SANA
    "SanaCheckpointLoader", "SanaResolutionSelect", "SanaTextEncode", "SanaResolutionCond", "EmptySanaLatentImage",
    "ScmModelSampling", "GemmaLoader", "GemmaTextEncode", "ExtraVAELoader", "EmptyDCAELatentImage",
    "SanaModelLoader", "SanaGenerate",
)  # fmt: skip
PEER = """
class Node:
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{}}}})
    RETURN_TYPES, FUNCTION, CATEGORY = (), "run", "peer"
    run = lambda self: ()
NODE_CLASS_MAPPINGS = dict.fromkeys({ids}, Node)
"""


def comfy_node(action: str, tree: Path) -> str:
    """What `comfy node ACTION` prints in a folder, with a home of its own."""
    home = tree.with_name("home")
    home.mkdir(exist_ok=True)
    quiet = {**os.environ, "HOME": str(home), "USERPROFILE": str(home), "DO_NOT_TRACK": "1"}
    comfy = Path(sys.executable).with_name("comfy.exe" if os.name == "nt" else "comfy")
    command = [comfy, "--skip-prompt", "node", action]
    done = subprocess.run(command, cwd=tree, env=quiet, text=True, capture_output=True, timeout=300)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of this working tree as git has it."""
    tree = tmp_path_factory.mktemp("package") / "tree"
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=tree, check=True)
    return tree


@pytest.fixture(scope="module")
def unzipped(tree) -> Path:
    """The archive that `comfy node pack` makes of it."""
    printed, target = comfy_node("pack", tree), tree.with_name("unzipped")
    assert (tree / "node.zip").is_file(), printed
    with zipfile.ZipFile(tree / "node.zip") as archive:
        archive.extractall(target / PACK_NAME)
    return target / PACK_NAME


def test_the_registrys_checks_pass(tree):
    """`comfy node validate`: what the registry reads, and the security rules that become errors there."""
    printed = comfy_node("validate", tree)
    assert "All validation checks passed successfully" in printed and "Warning" not in printed, printed


def test_archive_holds_what_users_need(unzipped):
    names = {path.name for path in unzipped.iterdir()}
    assert {"__init__.py", "nodes", "sprint_core", "workflows", "subgraphs", "locales", "README.md"} <= names
    assert not {"tests", "tools", "benchmarks", "launcher", "run.py", ".ci", ".github", "runs"} & names
    assert {path.name for path in (unzipped / "sprint_core" / "demo").glob("*.safetensors")} == {
        "sana_sprint_tiny.safetensors",
        "sana_controlnet_tiny.safetensors",
    }
    size = sum(path.stat().st_size for path in unzipped.rglob("*") if path.is_file())
    assert size < 32e6, f"{size / 1e6:.1f} MB"


def test_archive_starts_no_programs_and_runs_no_text(unzipped):
    """The registry's security standards: no packages by subprocess, no eval, no exec."""
    files = list(unzipped.rglob("*.py"))
    assert len(files) > 50
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"subprocess", "pip", "pty", "multiprocessing"} & {name.split(".")[0] for name in modules}, file
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec", "os.system", "os.popen", "__import__"), file


def test_archive_runs_in_a_clean_comfyui_beside_its_peers(unzipped, comfyui_path, tmp_path):
    prepare_base(tmp_path, comfyui_path, unzipped)
    (tmp_path / "custom_nodes" / "zz_peer.py").write_text(PEER.format(ids=PEERS))
    with Server(sys.executable, comfyui_path, tmp_path, tmp_path / "comfyui.log", ("--cpu",)) as server:
        prompt = server.prompt_of(unzipped / "workflows" / "SANA-Sprint 01 Text to Image.json")
        history = server.run(prompt, timeout=600)
        (saved,) = server.images(history)
        assert Image.open(io.BytesIO(server.view(saved))).size == (256, 256)
        assert "(IMPORT FAILED)" not in server.log_text()
        owners = {name: node["python_module"] for name, node in server.object_info().items()}
        assert {owners[name] for name in PEERS} == {"custom_nodes.zz_peer"}
        ours = [name for name, owner in owners.items() if owner == f"custom_nodes.{PACK_NAME}"]
        assert ours and all(name.startswith("SanaSprint") for name in ours)


def test_loading_the_pack_is_quick(server):
    """As ComfyUI's log has it; what is heavy is imported when it is used."""
    seconds = float(re.search(rf"([\d.]+) seconds: \S*{PACK_NAME}", server.log_text())[1])
    print(f"loading the pack takes ComfyUI {seconds} s")
    assert seconds <= START_LIMIT_S
