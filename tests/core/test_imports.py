"""Imports go one way, the core knows no host, and importing it does nothing."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE, NODES = ROOT / "sprint_core", ROOT / "nodes"

# Each package, or module at the root, may import those of the lines before its own. A new one finds its place here.
LADDER = (
    ("messages",),
    (
        "config",
        "trigflow",
        "latent",
        "devices",
        "thread_count",
        "fastest",
        "cli",
        "disk",
        "shapes",
        "emoji",
        "kernels",
        "freed_memory",
    ),
    ("models", "sampler"),
    ("weights",),
    ("text", "images"),
    ("pipeline", "convert"),
    ("__main__", "evaluate", "batch", "live"),
    ("distill",),
)
# Below distill.
DISTILL = (
    ("methods",),
    ("recipes",),
    ("engine",),
    ("losses", "dataset"),
    ("stages",),
    ("runs",),
    ("__main__", "prepare"),
)
# What ComfyUI installs, so that the core runs wherever it does.
ALLOWED = {"torch", "safetensors", "einops", "transformers", "sentencepiece", "tokenizers", "numpy", "scipy", "PIL"}
ALLOWED |= {"tqdm", "huggingface_hub", "triton"} | set(sys.stdlib_module_names)
# Groups of pyproject.toml.
FOR_TRAINING = {"accelerate", "datasets", "pyarrow", "matplotlib", "resvg_py"}
FOR_BATCH = {"pyarrow", "ray"}
LAZY = (
    "transformers",
    "sentencepiece",
    "tokenizers",
    "diffusers",
    "huggingface_hub",
    "datasets",
    "pyarrow",
    "matplotlib",
    "resvg_py",
    "ray",
)


def parse(folder: Path) -> dict[str, ast.Module]:
    """Syntax trees by dotted name, such as 'trigflow' or 'adapters.model'; packages end in '.__init__'."""
    files = {".".join(file.relative_to(folder).with_suffix("").parts): file for file in sorted(folder.rglob("*.py"))}
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}


MODULES, NODE_MODULES = parse(CORE), parse(NODES)


def absolute_imports(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return names


def relative_imports(tree: ast.Module) -> list[tuple[int, str, list[str]]]:
    """(dots, module, names) of each; `from . import a` has the module ''."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return [(node.level, node.module or "", [alias.name for alias in node.names]) for node in found]


def core_imports(name: str) -> set[str]:
    """The core's modules that one of them imports, inside functions too."""
    package, found = name.split(".")[:-1], set()
    for level, module, names in relative_imports(MODULES[name]):
        assert level <= len(package) + 1, f"{name} imports something above the core"
        base = (
            [*package[: len(package) + 1 - level], *module.split(".")]
            if module
            else package[: len(package) + 1 - level]
        )
        targets = {".".join([*base, imported]) for imported in names} | {".".join(base)}
        found |= {other for other in MODULES if other in targets}
    return found


def place(name: str) -> tuple[int, int]:
    """The rung of a module on the ladder, and below distill its rung there."""
    package, *rest = name.split(".")
    inner = next((i for i, rung in enumerate(DISTILL) if package == "distill" and rest and rest[0] in rung), -1)
    return next(i for i, rung in enumerate(LADDER) if package in rung), inner


NAMED = [name for name in MODULES if name.split(".")[-1] != "__init__" and name != "kernels.source"]  # needs Triton


def room(name: str) -> tuple[str, ...]:
    """The package that a module lies in, below distill the one there; a module at a root is a room of its own."""
    return tuple(name.split(".")[: 2 if name.startswith("distill.") else 1])


@pytest.mark.parametrize("name", NAMED)
def test_imports_go_one_way(name):
    """A module imports its own room, and those on the rungs below."""
    for other in core_imports(name) & set(NAMED):
        assert room(other) == room(name) or place(other) < place(name), f"{name} imports {other}"


def test_no_module_imports_itself_in_a_circle():
    graph = {name: core_imports(name) for name in MODULES}
    assert {"models.layers", "models.autoencoder_config"} <= graph["models.autoencoder"] and "trigflow" in graph[
        "pipeline"
    ]
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_the_core_needs_only_what_comfyui_ships(name):
    allowed = ALLOWED | {"distill": FOR_TRAINING, "batch": FOR_BATCH}.get(name.split(".")[0], set())
    assert {module.split(".")[0] for module in absolute_imports(MODULES[name])} <= allowed


@pytest.mark.parametrize("name", MODULES)
def test_modules_only_define(name):
    """No call stands alone at the top of a module, where importing would run it."""
    for node in MODULES[name].body:
        main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        defines = isinstance(
            node,
            ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.AugAssign | ast.FunctionDef | ast.ClassDef,
        )
        threads = name == "__init__" and "WAIT_PASSIVELY" in ast.unparse(node)  # before anything imports torch
        assert main or docstring or defines or threads, ast.unparse(node)


def test_modules_open_with_their_idea():
    for name, tree in MODULES.items():
        assert ast.get_docstring(tree), name


@pytest.mark.parametrize("name", NODE_MODULES)
def test_nodes_import_the_core_but_not_each_other(name):
    """Nodes and adapters may use the core and the adapters; only `__init__` lists the nodes."""
    depth = len(name.split("."))  # dots that reach nodes/; one more leads out of it, to the core
    nodes = {other for other in NODE_MODULES if "." not in other and other != "__init__"}
    for level, module, names in relative_imports(NODE_MODULES[name]):
        first = {target.split(".")[0] for target in ([module] if module else names)}
        if level > depth:
            assert level == depth + 1 and first == {"sprint_core"}
        elif level == depth and name != "__init__":
            assert not first & nodes


def run_python(code: str, folder: Path) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r})\n{code}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_importing_is_quiet_and_lazy(tmp_path):
    """All of the core, in a fresh process: no output, no files, no logging set up, no slow libraries."""
    code = f"""
import importlib, logging, torch
threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
state = torch.get_rng_state()
for name in {sorted(NAMED)!r}:
    if not name.endswith("__main__"):
        importlib.import_module("sprint_core." + name)
assert not set({LAZY!r}) & set(sys.modules), set({LAZY!r}) & set(sys.modules)
assert "sprint_core.kernels.source" not in sys.modules  # Triton, which takes a second
assert not [name for name in sys.modules if name.split(".")[0] in ("comfy", "folder_paths", "nodes")]
assert not logging.root.handlers
assert (threads, grad) == (torch.get_num_threads(), torch.is_grad_enabled())
assert torch.equal(state, torch.get_rng_state())
"""
    assert run_python(code, tmp_path) == ""
    assert not list(tmp_path.iterdir())


def test_the_root_imports_nothing_of_a_host():
    """Bare pytest, and ComfyUI's search for nodes, import the pack before they know what it needs."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not at_import
