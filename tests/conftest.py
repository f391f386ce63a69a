"""What all groups of tests share: the import path, the ComfyUI under test, one server for server/ and browser/."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import hypothesis
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

# ComfyUI has a top-level module `nodes` and this folder a package of that name: the folder comes last,
# wherever pytest was started, so that `import nodes` finds ComfyUI's once that is on the path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT), str(ROOT / "tests")]

from launcher.client import Server  # noqa: E402
from launcher.setup import prepare_base  # noqa: E402

# The same examples on every machine and in every run; a test may take its time on a busy one.
# Busy machines are slow, and a host's fixtures are the same for all examples.
UNCHECKED = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile(
    "repository", derandomize=True, database=None, deadline=None, suppress_health_check=UNCHECKED
)
hypothesis.settings.load_profile("repository")


collect_ignore = [] if importlib.util.find_spec("ray") else ["cluster"]  # what `run.py test --ray` runs


def pytest_configure():
    # Fixtures end as after Ctrl-C, and with them the ComfyUI they started.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", 143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored by what it runs behind it


SERVED = ("tests/browser/", "tests/server/")  # what needs a running ComfyUI, which holds 1.5 GB
SERVER = pytest.StashKey()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """By files, but all that needs a running ComfyUI to one process: two of them, and two browsers, take too much."""
    from xdist.scheduler import LoadFileScheduling

    class OneServer(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "served" if nodeid.startswith(SERVED) else super()._split_scope(nodeid)

    return OneServer(config, log) if config.option.dist == "loadfile" else None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["served at once"] = node.config.option.dist == "loadfile"


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Then ComfyUI ends with the last of its tests, and others have its memory."""
    is_last = item.nodeid.startswith(SERVED) and nextitem and not nextitem.nodeid.startswith(SERVED)
    at_once = getattr(item.config, "workerinput", {}).get("served at once")
    if is_last and at_once and SERVER in item.config.stash:
        item.config.stash[SERVER].stop()


def pytest_generate_tests(metafunc):
    """A test with the argument `workflow` runs once for each shipped workflow file."""
    if "workflow" in metafunc.fixturenames:
        files = sorted((ROOT / "workflows").glob("*.json"))
        assert files, "workflows/ holds no workflow"
        metafunc.parametrize("workflow", files, ids=[file.stem for file in files])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Show the end of ComfyUI's own output below a failed test."""
    report = (yield).get_result()
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and server:
        report.sections.append(("ComfyUI", server.log_tail(60)))


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    path = os.environ.get("SPRINT_COMFYUI")
    if not path:
        pytest.fail("SPRINT_COMFYUI names no ComfyUI: run `python run.py test`", pytrace=False)
    return Path(path)


@pytest.fixture(scope="session")
def server(comfyui_path, tmp_path_factory, pytestconfig):
    """A running `main.py --cpu` with this pack among its custom nodes; `server.base` is its base directory.

    Its models are small stand-ins under the names of the files that the workflows name.
    """
    import standin

    base = tmp_path_factory.mktemp("comfyui")
    prepare_base(base, comfyui_path, ROOT)
    standin.fill(base / "models")
    with Server(sys.executable, comfyui_path, base, base / "comfyui.log", ("--cpu",)) as running:
        pytestconfig.stash[SERVER] = running
        yield running
        private = names_of_this_machine(running)
    assert not private, private


# Stock Load Image logs the path of a broken image, and the oldest ComfyUI the query that its database in memory fails.
STOCK = ("cannot identify image file", "Invalid data found when processing input", "[parameters: ('")


def names_of_this_machine(server: Server) -> list[str]:
    """Saved images, and lines of the log since the server runs, that name a folder of this machine."""
    base = str(server.base)
    log = server.log_text().partition("To see the GUI go to")[2]
    images = [file for kind in ("output", "temp") for file in (server.base / kind).rglob("*.png")]
    texts = [line for line in log.splitlines() if base in line and not any(words in line for words in STOCK)]
    return texts + [file.name for file in images if base in json.dumps(Image.open(file).info, default=str)]


@pytest.fixture(scope="session")
def workflow_names() -> list[str]:
    return [file.stem for file in sorted((ROOT / "workflows").glob("*.json"))]
