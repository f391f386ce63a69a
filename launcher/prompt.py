"""Turn a saved workflow into the prompt that ComfyUI executes, and put the command line's choices into it.

The editor saves a graph with positions, links and a flat list of widget values per node; `/prompt`
takes a dictionary of named inputs. Which value belongs to which input follows from `/object_info`.
A browser test compares the result with what the editor itself sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MUTED, BYPASSED = 2, 4
NOTES = {"Note", "MarkdownNote"}
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", DYNAMIC_COMBO}
SEEDS = {"seed", "noise_seed"}
SEED_CONTROLS = {"fixed", "increment", "decrement", "randomize", "increment-wrap"}

# What `edit` changes: the text of these nodes, the sampler's steps and seed, the model.
TEXT_NODES = {"SanaSprintTextEncode", "CLIPTextEncode"}
SAMPLER_NODE, LOADER_NODE = "SanaSprintSampler", "SanaSprintLoader"
NEGATIVE_NODE = "SanaSprintNegative"  # what `avoid` adds


class ComfyError(RuntimeError):
    """What ComfyUI refused or failed at; the message names the node where there is one."""


def api_prompt(ui: dict, object_info: dict) -> dict:
    """The API prompt of a saved workflow, as the editor would send it.

    Muted and bypassed nodes, reroutes, primitives and notes are resolved as the editor resolves
    them. Raises ComfyError for a node type that the server does not know, a count of widget values
    that does not match it, and for subgraphs, which are not supported.
    """
    graph = _Graph(ui)
    prompt = {}
    for node in graph.nodes.values():
        if graph.is_virtual(node) or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise ComfyError(f"{_name(node)}: the server knows no node of this type; is its pack installed?")
        inputs = {name: _wire(value) for name, value in _widget_values(node, object_info[node["type"]])}
        for slot in node.get("inputs") or []:
            if slot.get("link") is not None:
                source = graph.source(slot["link"])
                if source is not None:
                    inputs[slot["name"]] = source
        title = node.get("title") or object_info[node["type"]].get("display_name") or node["type"]
        prompt[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    return prompt


def edit(prompt: dict, text: str, steps: int | None, seed: int | None, model: str | None = None) -> tuple[int, int]:
    """Put the command line's choices into an API prompt; return the steps and the seed that it has now.

    Raises ComfyError unless it has one node that encodes text and one SANA-Sprint Sampler.
    """
    texts = [node["inputs"] for node in prompt.values() if node["class_type"] in TEXT_NODES]
    samplers = [node["inputs"] for node in prompt.values() if node["class_type"] == SAMPLER_NODE]
    if len(texts) != 1 or len(samplers) != 1:
        raise ComfyError(f"the workflow needs one of {sorted(TEXT_NODES)} and one {SAMPLER_NODE} to be run from here")
    texts[0]["text"] = text
    for node in prompt.values():
        if model and node["class_type"] == LOADER_NODE:
            node["inputs"]["model"] = model
    samplers[0].update({key: value for key, value in (("steps", steps), ("seed", seed)) if value is not None})
    return samplers[0]["steps"], samplers[0]["seed"]


def avoid(prompt: dict, text: str, object_info: dict) -> None:
    """Add a negative prompt, encoded as the prompt is, to an API prompt that `edit` takes."""
    encoder = next(node for node in prompt.values() if node["class_type"] in TEXT_NODES)
    sampler = next(node for node in prompt.values() if node["class_type"] == SAMPLER_NODE)
    encoded = {**encoder, "inputs": {**encoder["inputs"], "text": text}, "_meta": {"title": "Negative"}}
    widgets = {
        name: options[0]["default"]
        for name, (kind, *options) in object_info[NEGATIVE_NODE]["input"]["required"].items()
        if kind in WIDGET_TYPES
    }
    inputs = {"model": sampler["inputs"]["model"], "negative": ["negative-text", 0], **widgets}
    title = object_info[NEGATIVE_NODE]["display_name"]
    prompt["negative-text"] = encoded
    prompt["negative"] = {"inputs": inputs, "class_type": NEGATIVE_NODE, "_meta": {"title": title}}
    sampler["inputs"]["model"] = ["negative", 0]


class _Graph:
    """Nodes and links of a workflow, and where a link really starts."""

    def __init__(self, ui: dict) -> None:
        if (ui.get("definitions") or {}).get("subgraphs"):
            raise ComfyError("the workflow has subgraphs, which cannot be converted: unpack them in the editor")
        self.nodes = {node["id"]: node for node in ui["nodes"]}
        self.links = {}
        for link in ui["links"]:  # a list up to schema 0.4, a dictionary from 1 on
            if isinstance(link, dict):
                self.links[link["id"]] = (link["origin_id"], link["origin_slot"])
            else:
                self.links[link[0]] = (link[1], link[2])

    def is_virtual(self, node: dict) -> bool:
        return node["type"] in NOTES or node["type"] in ("Reroute", "PrimitiveNode")

    def source(self, link: int | None) -> Any:
        """What feeds a link: [node id, slot], the value of a primitive, or None where nothing does."""
        while link in self.links:
            origin, slot = self.links[link]
            node = self.nodes[origin]
            if node.get("mode", 0) == MUTED:
                return None
            if node["type"] == "PrimitiveNode":
                return _wire(node["widgets_values"][0])
            if node["type"] == "Reroute":
                link = node["inputs"][0].get("link")
            elif node.get("mode", 0) == BYPASSED:
                link = _bypass(node, slot)
            else:
                return [str(origin), slot]
        return None


def _bypass(node: dict, slot: int) -> int | None:
    """The link that a bypassed node passes on: of the input beside the output if its type fits, else of the first."""
    kind, inputs = node["outputs"][slot]["type"], node.get("inputs") or []
    for candidate in inputs[slot : slot + 1] + inputs:
        if candidate["type"] == kind or "*" in (candidate["type"], kind):
            return candidate.get("link")
    return None


def _widget_values(node: dict, info: dict) -> Iterator[tuple[str, Any]]:
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        yield from saved.items()
        return
    rest = list(saved)
    with_widget = {slot["name"] for slot in node.get("inputs") or [] if slot.get("widget")}
    try:
        yield from _pop_widgets(info["input"], info.get("input_order") or {}, with_widget, rest)
    except IndexError:
        raise ComfyError(f"{_name(node)}: its {len(saved)} saved widget values are fewer than it has widgets") from None
    if rest:
        raise ComfyError(f"{_name(node)}: {len(rest)} of its {len(saved)} saved widget values belong to no widget")


def _pop_widgets(inputs: dict, order: dict, with_widget: set, rest: list, prefix: str = "") -> Iterator[tuple]:
    """Take the values of one level of inputs off the front of `rest`, in the order in which the editor saved them.

    An input that is linked keeps its value, and some widgets save one more: the control of a seed,
    the button of an image upload. Optional inputs that a graph was saved without have their defaults.
    """
    for section in ("required", "optional"):
        upload = False
        for name in order.get(section) or inputs.get(section) or {}:
            kind, options = (*inputs[section][name], {})[:2]
            kind = "COMBO" if isinstance(kind, list) else options.get("widgetType", kind)
            has_widget = kind in WIDGET_TYPES or prefix + name in with_widget or options.get("socketless")
            if options.get("forceInput") or not has_widget:
                continue
            if not rest and section == "optional":  # the graph is older than this input
                if "default" in options:
                    yield prefix + name, options["default"]
                continue
            value = rest.pop(0)
            yield prefix + name, value
            upload |= bool(options.get("image_upload"))
            if kind == DYNAMIC_COMBO:
                chosen = next((o["inputs"] for o in options["options"] if o["key"] == value), {})
                yield from _pop_widgets(chosen, {}, with_widget, rest, f"{prefix}{name}.")
            elif options.get("control_after_generate", name in SEEDS) and _next_in(rest, SEED_CONTROLS):
                rest.pop(0)
        if upload and _next_in(rest, {"image"}):
            rest.pop(0)


def _next_in(rest: list, values: set) -> bool:
    return bool(rest) and isinstance(rest[0], str) and rest[0] in values


def _wire(value: Any) -> Any:
    # A bare list of two would read as a link.
    return {"__value__": value} if isinstance(value, list) else value


def _name(node: dict) -> str:
    return f"node {node['id']} ({node['type']})"
