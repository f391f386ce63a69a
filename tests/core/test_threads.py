"""How OpenMP's threads wait: passively in our command lines and servers, unless the user has said otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.client import Server
from launcher.prompt import ComfyError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="other OpenMP libraries do not show their settings")
@pytest.mark.parametrize("said", [None, "ACTIVE"])
@pytest.mark.parametrize("module", ["sprint_core", "benchmarks"])
def test_command_lines(module, said):
    """As OpenMP itself shows it."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "TRUE"} | ({"OMP_WAIT_POLICY": said} if said else {})
    command = [sys.executable, "-m", module, "--help"]
    shown = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    assert f"OMP_WAIT_POLICY = '{said or 'PASSIVE'}'" in shown


def test_as_a_library_nothing_is_set():
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import os, sprint_core; print(os.environ.get('OMP_WAIT_POLICY'))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True).stdout == "None\n"


@pytest.mark.parametrize("said", [None, "ACTIVE"])
def test_servers(tmp_path, monkeypatch, said):
    if said:
        monkeypatch.setenv("OMP_WAIT_POLICY", said)
    else:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    (tmp_path / "main.py").write_text("import os; print('policy', os.environ.get('OMP_WAIT_POLICY'))")
    with pytest.raises(ComfyError, match=f"policy {said or 'PASSIVE'}"):
        Server(sys.executable, tmp_path, tmp_path, tmp_path / "log").start()
