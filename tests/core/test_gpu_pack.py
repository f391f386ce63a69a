"""What a bare GPU machine gets: what stays behind, that too much is refused, and that what arrives is found."""

import json
import subprocess
import sys
import zipfile

import machines
import pytest

from tools import gpu_check, gpu_pack
from tools.gpu import host

KEPT = ["LICENSE", "comfy/config.json", "comfy/ops.py", "comfy_extras/nodes_mask.py", "comfyui_version.py"]
LEFT = ["tests/test_it.py", "blueprints/a.json", "comfy_api_nodes/nodes_bfl.py", "models/vae/put_vae_here", ".git/HEAD"]
LEFT += ["comfy/__pycache__/ops.pyc", "comfy/tokenizer.json"]
PYTHON = ".".join(map(str, sys.version_info[:2]))


@pytest.fixture
def comfyui(tmp_path):
    folder = tmp_path / "ComfyUI"
    for name in KEPT + LEFT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name != "comfy/tokenizer.json" else " " * (gpu_pack.LARGE + 1))
    (folder / "comfyui_version.py").write_text('__version__ = "0.30.0"\n')
    return folder


def wheel(folder, package, *files):
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*files, f"{package}-1.0.dist-info/METADATA"):
            archive.writestr(name, "there = 1\n")
    return path


@pytest.fixture
def packed(tmp_path, comfyui):
    """A pack with a package that this Python has, one that it has not, and comfy-kitchen."""
    wheels = [
        wheel(tmp_path, "einops", "einops/__init__.py"),
        wheel(tmp_path, "nobody_has_it", "nobody_has_it/__init__.py", "nobody_has_it/one.so"),
        wheel(tmp_path, "comfy_kitchen", "comfy_kitchen/__init__.py", "comfy_kitchen/backends/cuda/_C.so"),
    ]
    folder = tmp_path / "pack"
    folder.mkdir()
    gpu_pack.write(folder, comfyui, wheels, PYTHON)
    return folder


def test_what_of_comfyui_stays_behind(comfyui):
    assert [path.as_posix() for path in gpu_pack.of_comfyui(comfyui)] == KEPT


def test_a_folder_without_comfyui_is_named(tmp_path):
    with pytest.raises(gpu_pack.Fault, match=f"{tmp_path}: holds no ComfyUI; .* name one with --comfyui"):
        list(gpu_pack.of_comfyui(tmp_path))


def test_too_much_is_refused_and_what_was_there_stays(tmp_path, comfyui):
    out = tmp_path / "pack"
    sizes = gpu_pack.pack(out, comfyui, PYTHON, packages=())
    assert sizes["both"] == pytest.approx(sizes["repository"] + sizes["pack"], abs=0.02) and sizes["repository"] > 20
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert set(before) == {gpu_pack.DESCRIPTION, gpu_pack.FILES}
    (comfyui / "comfy" / "more.py").write_text("pass\n")
    with pytest.raises(gpu_pack.Fault, match=r"pack: above 20 MiB \(repository \d+\.\d, pack 0\.0, both .*nothing was"):
        gpu_pack.pack(out, comfyui, PYTHON, 20, ())
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert not list(tmp_path.glob(".pack.*"))


def test_equal_files_make_equal_packs(tmp_path, comfyui):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        gpu_pack.write(tmp_path / name, comfyui, [], PYTHON)
    a, b = ((tmp_path / name / gpu_pack.FILES).read_bytes() for name in ("a", "b"))
    assert a == b


def test_a_machine_takes_the_packages_that_it_has_not(packed):
    with host.unpacked(packed) as (folder, environment):
        paths = environment["PYTHONPATH"]
        assert str(folder / "site" / "nobody_has_it") in paths and str(folder / "site" / "einops") not in paths
        assert (folder / "site/nobody_has_it/nobody_has_it/one.so").is_file()
        assert (folder / "site/comfy_kitchen/comfy_kitchen/__init__.py").is_file()
        assert not list(folder.glob("site/comfy_kitchen/**/*.so"))
        assert (folder / "comfyui" / "comfy" / "ops.py").is_file()
        assert environment["SPRINT_COMFYUI"] == str(folder / "comfyui")
    assert not folder.exists()


def test_stubs_are_imported_as_comfyui_imports_them(packed):
    code = """
import av, kornia.color
from av.container import InputContainer
from av.subtitles.stream import SubtitleStream
from av.video.reformatter import ColorRange
from kornia.filters import canny
from kornia.morphology import dilation, erosion
print(InputContainer | av.VideoStream | None, hasattr(av, "__version__"))
"""
    with host.unpacked(packed) as (folder, _):
        path = f"import sys; sys.path[:0] = [{str(folder / 'site/av')!r}, {str(folder / 'site/kornia')!r}]"
        done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("None False"), done.stderr


def test_a_pack_of_another_python_is_refused(tmp_path, comfyui):
    gpu_pack.write(tmp_path, comfyui, [], "3.99")
    with (
        pytest.raises(ValueError, match=rf"is for Python 3\.99, and this is {PYTHON}: make it with --python {PYTHON}"),
        host.unpacked(tmp_path),
    ):
        pass


def test_sections_say_that_there_is_no_pack(tmp_path, capsys):
    assert gpu_check.main(["--device", "cpu", "--only", "host,nodes", "--pack", str(tmp_path)]) == 0
    *rows, everything = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [row["section"] for row in rows] == ["host", "nodes"] and everything["failed"] == []
    assert all(row["skipped"].startswith(f"no pack in {tmp_path}: make one with") for row in rows)


TESTS = """
import pytest

@pytest.fixture
def broken():
    raise ValueError("of a fixture")

def test_good(): pass
def test_bad(): assert 1 == 2
def test_set_up(broken): pass
@pytest.mark.skip(reason="asked for")
def test_left_out(): pass
def test_ends_the_process():
    import os
    os._exit(3)
"""


def test_outcomes_are_kept_when_the_process_ends(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(TESTS)
    file = tmp_path / "outcomes.jsonl"
    monkeypatch.setenv("SPRINT_OUTCOMES", str(file))
    command = [sys.executable, "-m", "pytest", "-p", "tools.gpu.outcomes", "-c", "/dev/null", str(tmp_path)]
    assert subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True).returncode == 3
    row = host.counted(file)
    assert (row["passed"], row["failed"], row["skipped"]) == (1, 2, 1)
    assert [failure.partition("::")[2] for failure in row["failures"]] == [
        "test_bad: assert 1 == 2",
        "test_set_up: ValueError: of a fixture",
    ]


@pytest.mark.parametrize("name", [*machines.ON_THE_CPU, *machines.ON_THE_SECOND])
def test_tests_that_no_gpu_runs_exist(name):
    file, _, test = name.partition("::")
    text = (machines.TESTS / "host" / file).read_text(encoding="utf-8")
    assert f"def {test.rstrip('[')}" in text
    assert machines.reason_to_skip(f"tests/host/{name}", "second-normal")
    assert not machines.reason_to_skip(f"tests/host/{name}", machines.CPU)
    assert bool(machines.reason_to_skip(f"tests/host/{name}", "cuda")) == (name in machines.ON_THE_CPU)
