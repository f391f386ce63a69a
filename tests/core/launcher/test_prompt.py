"""Workflow JSON -> API prompt, on hand-written node definitions in the form of /object_info."""

import pytest

from launcher.prompt import LOADER_NODE, SAMPLER_NODE, ComfyError, api_prompt, avoid, edit

SAMPLER = {
    "required": {
        "model": ["MODEL", {}],
        "seed": ["INT", {"control_after_generate": True}],
        "steps": ["INT", {}],
        "mode": [
            "COMFY_DYNAMICCOMBO_V3",
            {
                "options": [
                    {"key": "paper", "inputs": {"required": {}}},
                    {"key": "list", "inputs": {"required": {"angles": ["STRING", {}], "image": ["IMAGE", {}]}}},
                ]
            },
        ],
        "name": [["a", "b"], {}],
    },
    "optional": {"size": ["INT", {"forceInput": True}], "note": ["STRING", {"default": ""}], "curve": ["CURVE", {}]},
}
SHEET = {"widgetType": "SHEET", "socketless": True}
OBJECT_INFO = {
    "Loader": {"display_name": "Load", "input": {"required": {"file": ["COMBO", {"options": ["m"]}]}}},
    "Sampler": {"input": SAMPLER, "input_order": {key: list(value) for key, value in SAMPLER.items()}},
    "Image": {"input": {"required": {"image": [["x.png"], {"image_upload": True}], "channel": [["red"]]}}},
    "Patch": {"input": {"required": {"model": ["MODEL"], "strength": ["FLOAT", {}]}}},
    "Canvas": {"input": {"required": {"text": ["STRING", {}], "drawing": ["STRING", SHEET], "live": ["BOOLEAN", {}]}}},
    "Plain": {"input": {"required": {"seed": ["INT", {"control_after_generate": False}], "values": ["STRING", {}]}}},
}


def node(number, kind, values=(), inputs=(), outputs=("MODEL",), **more):
    slots = [{"name": name, "type": type_, "link": link} for name, type_, link in inputs]
    outputs = [{"name": output, "type": output} for output in outputs]
    return {"id": number, "type": kind, "widgets_values": list(values), "inputs": slots, "outputs": outputs, **more}


def workflow(*nodes, links=()):
    return {"nodes": list(nodes), "links": [list(link) for link in links]}


def inputs_of(number, *nodes, links=()):
    return api_prompt(workflow(*nodes, links=links), OBJECT_INFO)[str(number)]["inputs"]


LOADER = node(1, "Loader", ["m"])
PAPER = [7, "randomize", 2, "paper", "b", "hello"]


def test_values_follow_the_order_of_the_inputs():
    inputs = inputs_of(2, LOADER, node(2, "Sampler", PAPER, [("model", "MODEL", 1)]), links=[(1, 1, 0, 2, 0, "MODEL")])
    assert inputs == {"model": ["1", 0], "seed": 7, "steps": 2, "mode": "paper", "name": "b", "note": "hello"}


def test_optional_inputs_that_are_newer_than_the_graph_have_their_defaults():
    assert inputs_of(2, node(2, "Sampler", PAPER[:-1]))["note"] == ""


def test_a_widget_without_a_socket_has_its_place_among_the_values():
    assert inputs_of(2, node(2, "Canvas", ["a", "{}", True])) == {"text": "a", "drawing": "{}", "live": True}


def test_links_may_be_dictionaries():
    ui = workflow(LOADER, node(2, "Sampler", PAPER, [("model", "MODEL", 1)]))
    ui["links"] = [{"id": 1, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "MODEL"}]
    assert api_prompt(ui, OBJECT_INFO)["2"]["inputs"]["model"] == ["1", 0]


def test_title_is_the_users_or_the_display_name():
    prompt = api_prompt(workflow(LOADER, node(2, "Loader", ["m"], title="Mine")), OBJECT_INFO)
    assert [entry["_meta"]["title"] for entry in prompt.values()] == ["Load", "Mine"]


def test_linked_widget_keeps_its_place_among_the_values():
    sampler = node(2, "Sampler", PAPER, [("steps", "INT", 1)])
    assert inputs_of(2, LOADER, sampler, links=[(1, 1, 0, 2, 0, "INT")]) == {
        **{"seed": 7, "steps": ["1", 0], "mode": "paper", "name": "b", "note": "hello"}
    }


def test_dynamic_combo_brings_its_own_inputs():
    values = [7, "fixed", 2, "list", "1.5, 0", "b", "hello"]
    sampler = node(2, "Sampler", values, [("mode.image", "IMAGE", 1)])
    inputs = inputs_of(2, LOADER, sampler, links=[(1, 1, 0, 2, 0, "IMAGE")])
    assert (inputs["mode"], inputs["mode.angles"], inputs["mode.image"], inputs["name"]) == (
        "list",
        "1.5, 0",
        ["1", 0],
        "b",
    )


def test_input_of_unknown_type_counts_as_widget_if_the_editor_says_so():
    sampler = node(2, "Sampler", [*PAPER, [1, 2]], [("curve", "CURVE", None)])
    sampler["inputs"][0]["widget"] = {"name": "curve"}
    assert inputs_of(2, sampler)["curve"] == {"__value__": [1, 2]}


def test_upload_button_and_seed_control_are_dropped():
    assert inputs_of(1, node(1, "Image", ["x.png", "red", "image"])) == {"image": "x.png", "channel": "red"}
    assert inputs_of(1, node(1, "Plain", [5, "fixed"])) == {"seed": 5, "values": "fixed"}


def test_bypassed_node_passes_the_input_of_the_same_type():
    patch = node(2, "Patch", [1.0], [("image", "IMAGE", None), ("model", "MODEL", 1)], mode=4)
    sampler = node(3, "Sampler", PAPER, [("model", "MODEL", 2)])
    links = [(1, 1, 0, 2, 1, "MODEL"), (2, 2, 0, 3, 0, "MODEL")]
    prompt = api_prompt(workflow(LOADER, patch, sampler, links=links), OBJECT_INFO)
    assert set(prompt) == {"1", "3"}
    assert prompt["3"]["inputs"]["model"] == ["1", 0]


def test_muted_node_leaves_its_outputs_unconnected():
    sampler = node(2, "Sampler", PAPER, [("model", "MODEL", 1)])
    assert "model" not in inputs_of(2, {**LOADER, "mode": 2}, sampler, links=[(1, 1, 0, 2, 0, "MODEL")])


def test_reroutes_primitives_and_notes_are_resolved():
    reroute = node(2, "Reroute", [], [("", "*", 1)], ("*",))
    primitive, note = node(4, "PrimitiveNode", [3, "fixed"], outputs=("INT",)), node(5, "Note", ["read me"])
    sampler = node(3, "Sampler", PAPER, [("model", "MODEL", 2), ("steps", "INT", 3)])
    links = [(1, 1, 0, 2, 0, "MODEL"), (2, 2, 0, 3, 0, "MODEL"), (3, 4, 0, 3, 1, "INT")]
    prompt = api_prompt(workflow(LOADER, reroute, sampler, primitive, note, links=links), OBJECT_INFO)
    assert set(prompt) == {"1", "3"}
    assert prompt["3"]["inputs"]["model"] == ["1", 0]
    assert prompt["3"]["inputs"]["steps"] == 3


@pytest.mark.parametrize(
    ("ui", "message"),
    [
        (workflow(node(9, "Nobody")), r"node 9 \(Nobody\): the server knows no node"),
        (workflow(node(9, "Sampler", PAPER[:-2])), r"node 9 \(Sampler\): its 4 saved widget values are fewer"),
        (workflow(node(9, "Sampler", [*PAPER, 1])), r"node 9 \(Sampler\): 1 of its 7 saved widget values belong"),
        ({**workflow(LOADER), "definitions": {"subgraphs": [{"id": "s"}]}}, "subgraphs"),
    ],
)
def test_what_cannot_be_converted_is_said(ui, message):
    with pytest.raises(ComfyError, match=message):
        api_prompt(ui, OBJECT_INFO)


def test_edit_changes_only_what_was_asked():
    prompt = {
        "1": {"class_type": "SanaSprintTextEncode", "inputs": {"text": "old"}},
        "2": {"class_type": "SanaSprintSampler", "inputs": {"steps": 2, "seed": 0, "denoise": 1.0}},
    }
    assert edit(prompt, "new", None, 5) == (2, 5)
    assert prompt["1"]["inputs"] == {"text": "new"}
    assert prompt["2"]["inputs"] == {"steps": 2, "seed": 5, "denoise": 1.0}
    with pytest.raises(ComfyError, match="one SanaSprintSampler"):
        edit({}, "new", None, None)


def test_the_model_can_be_chosen():
    prompt = {
        "1": {"class_type": LOADER_NODE, "inputs": {"model": "a", "dtype": "auto"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": ""}},
        "3": {"class_type": SAMPLER_NODE, "inputs": {"steps": 2, "seed": 0}},
    }
    edit(prompt, "a cat", None, None, "Sana_Sprint_0.6B")
    assert prompt["1"]["inputs"] == {"model": "Sana_Sprint_0.6B", "dtype": "auto"}


def test_a_negative_prompt_is_put_between_model_and_sampler():
    """Encoded as the prompt is; its node's widgets stand where they are at first."""
    encode = {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["1", 1]}}
    prompt = {
        "1": {"class_type": LOADER_NODE, "inputs": {"model": "a"}},
        "2": encode,
        "3": {"class_type": SAMPLER_NODE, "inputs": {"model": ["1", 0], "positive": ["2", 0]}},
    }
    inputs = {"model": ["MODEL", {}], "negative": ["CONDITIONING", {}], "scale": ["FLOAT", {"default": 3.0}]}
    avoid(prompt, "a dog", {"SanaSprintNegative": {"display_name": "Negative", "input": {"required": inputs}}})
    assert prompt["2"]["inputs"]["text"] == "a cat"
    assert prompt["negative-text"]["inputs"] == {"text": "a dog", "clip": ["1", 1]}
    assert prompt["negative"]["class_type"] == "SanaSprintNegative"
    assert prompt["negative"]["inputs"] == {"model": ["1", 0], "negative": ["negative-text", 0], "scale": 3.0}
    assert prompt["3"]["inputs"] == {"model": ["negative", 0], "positive": ["2", 0]}
