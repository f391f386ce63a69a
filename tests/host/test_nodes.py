"""What the nodes say about themselves, and that loading them leaves ComfyUI as it was."""

import subprocess
import sys
from pathlib import Path

import pytest


def schemas(host):
    return [node.GET_SCHEMA() for node in host.pack("nodes").NODES]


def test_every_node_explains_itself(host):
    for schema in schemas(host):
        assert schema.node_id.startswith("SanaSprint")
        assert schema.display_name and schema.description and schema.search_aliases
        assert schema.category.startswith("SANA-Sprint/")
        for socket in (*schema.inputs, *schema.outputs):
            assert socket.tooltip, f"{schema.node_id} {socket.id}"


def test_every_node_is_registered_under_its_id(host):
    import nodes

    ids = [schema.node_id for schema in schemas(host)]
    assert len(set(ids)) == len(ids)
    for id in ids:
        assert nodes.NODE_CLASS_MAPPINGS[id].RELATIVE_PYTHON_MODULE == "custom_nodes.sana-sprint"


@pytest.mark.parametrize("what", ["members", "samplers", "schedulers", "models", "folders"])
def test_loading_the_pack_changes_nothing_of_comfyui(host, what):
    assert host.before[what]
    assert host.after[what] == host.before[what]


def test_loading_the_pack_adds_its_nodes_and_replaces_none(host):
    before, after = host.before["nodes"], host.after["nodes"]
    assert {id: after[id] for id in before} == before
    assert set(after) - set(before) == {schema.node_id for schema in schemas(host)}


def test_importing_the_folder_imports_no_part_of_it():
    """Tools import it outside ComfyUI: only the entry point may reach into it."""
    file = Path(__file__).resolve().parents[2] / "__init__.py"
    code = (
        f"import importlib.util as u, sys; spec = u.spec_from_file_location('pack', {str(file)!r}); "
        "spec.loader.exec_module(u.module_from_spec(spec)); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
