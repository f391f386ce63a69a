"""A real ComfyUI executes every shipped workflow."""

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from api_prompts import custom_size
from PIL import Image
from sight import ground, shows

from launcher.prompt import DYNAMIC_COMBO, avoid, edit
from sprint_core.weights import presets
from tools import make_templates
from tools.template_plans import PLANS, TITLE_PREFIX

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ("Sana_Sprint_1.6B_1024px.pth", "Sana_Sprint_0.6B_1024px.pth")


@pytest.mark.oldest
def test_pack_loads_without_a_complaint(server):
    log = server.log_text()
    assert "(IMPORT FAILED)" not in log
    assert any(name.startswith("SanaSprint") for name in server.object_info())


def runnable(prompt: dict) -> dict:
    """The prompt with the bundled model for another family's, which has no small stand-in; all else as it is.

    But published models paint half the side, through tiles of half the size: as many, and a quarter of the work.
    """
    published = any(node["inputs"].get("model") in PUBLISHED for node in prompt.values())
    for node in prompt.values():
        inputs = node["inputs"]
        if published and "size" in inputs:
            assert inputs["size"] == "1:1, 1024 x 1024"
            inputs |= custom_size(512, 512)
        if published and "tile_size" in inputs:
            inputs |= {name: inputs[name] // 2 for name in ("tile_size", "overlap")}
        if node["class_type"] == "CheckpointLoaderSimple":
            node |= {"class_type": "SanaSprintLoader", "inputs": {"model": presets.BUNDLED_NAME, "dtype": "auto"}}
    return prompt


def test_workflow_names_what_the_nodes_know(server, workflow):
    """Every value is one that its node offers today; files that no stand-in has are told by their link."""
    info, ui = server.object_info(), json.loads(workflow.read_text(encoding="utf-8"))
    linked = {link["name"] for node in ui["nodes"] for link in node["properties"].get("models", ())}
    for node in server.prompt_of(workflow).values():
        groups = info[node["class_type"]]["input"]
        slots = groups.get("required", {}) | groups.get("optional", {})
        required = {name for name, (kind, *_) in groups.get("required", {}).items()}
        assert required <= node["inputs"].keys(), node["class_type"]
        for name, value in node["inputs"].items():
            kind, *options = slots[name]
            choices = kind if isinstance(kind, list) else options[0].get("options") if options else None
            if kind == DYNAMIC_COMBO:
                choices = [option["key"] for option in choices]
            if choices and not isinstance(value, list):
                assert value in choices or value in linked, f"{node['class_type']}: {name} = {value}"


def test_links_are_such_as_the_editor_offers(workflow):
    """It takes a link only under the name that the node has chosen, and offers no download from GitHub.

    The note says which file that is. One whose published name could be anything's gets a telling name, and the note
    says so.
    """
    nodes = json.loads(workflow.read_text(encoding="utf-8"))["nodes"]
    note = "".join(node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    for node in nodes:
        for link in node["properties"].get("models", ()):
            published = link["url"].rsplit("/", 1)[1]
            assert link["name"] in node["widgets_values"]
            assert published == link["name"] or f"*{published}*: rename it to **{link['name']}**" in note
            assert not re.fullmatch(r"(model|diffusion_pytorch_model)\..*", link["name"])
            assert f"[{link['name']}]({link['url']})" in note and f"── {link['name']}" in note
            assert link["url"].startswith(("https://huggingface.co/", "https://github.com/madebyollin/taesd/"))
            by_hand = f"does not offer to download **{link['name']}**: save it by its link"
            assert (by_hand in note) == link["url"].startswith("https://github.com/")
            assert link["directory"] in {"diffusion_models", "text_encoders", "vae", "vae_approx", "checkpoints"}


@pytest.mark.oldest
def test_workflow_makes_an_image(server, workflow):
    images = server.images(server.run(runnable(server.prompt_of(workflow)), timeout=900))
    assert images
    for saved in images:
        image = Image.open(io.BytesIO(server.view(saved)))
        assert image.format == "PNG"
        assert any(low < high for low, high in image.convert("RGB").getextrema()), f"{saved['filename']} is one colour"


def test_command_line_edits_the_workflow(server):
    prompt = server.prompt_of(ROOT / "workflows" / "SANA-Sprint 01 Text to Image.json")
    assert edit(prompt, "a green square", steps=3, seed=99) == (3, 99)
    history = server.run(prompt)
    assert server.images(history)
    assert "a green square" in str(history["prompt"])


def test_workflow_can_be_shared(workflow):
    """Manager finds the pack by these properties, and the template browser shows the thumbnail."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    name, version = (re.search(rf'^{key} = "(.+)"$', project, re.M)[1] for key in ("name", "version"))
    nodes = json.loads(workflow.read_text(encoding="utf-8"))["nodes"]
    ours = [node for node in nodes if node["type"].startswith("SanaSprint")]
    assert ours
    for node in ours:
        assert (node["properties"].get("cnr_id"), node["properties"].get("ver")) == (name, version), node["type"]
    assert Image.open(workflow.with_suffix(".jpg")).format == "JPEG"


def boxes(ui: dict) -> dict:
    """Each node's left, top, right and bottom, title included."""
    title = 30
    nodes = {node["id"]: (*node["pos"][:2], *node["size"][:2]) for node in ui["nodes"]}
    return {i: (x, y - title, x + width, y + height) for i, (x, y, width, height) in nodes.items()}


def test_no_node_covers_another(workflow):
    for a, b in itertools.combinations(boxes(json.loads(workflow.read_text(encoding="utf-8"))).items(), 2):
        (left, top, right, bottom), (left2, top2, right2, bottom2) = a[1], b[1]
        assert left >= right2 or left2 >= right or top >= bottom2 or top2 >= bottom, f"nodes {a[0]} and {b[0]} overlap"


planned = pytest.mark.parametrize("name", list(PLANS))


def template(name: str) -> dict:
    return json.loads((ROOT / "workflows" / f"{TITLE_PREFIX}{name}.json").read_text(encoding="utf-8"))


@planned
def test_a_template_is_as_its_plan_says(name):
    ui = template(name)
    make_templates.lay_out(ui, PLANS[name])
    assert template(name) == ui, "run `python run.py python tools/make_templates.py`"


@planned
def test_graphs_go_from_left_to_right_through_numbered_groups(name):
    """Each link ends to the right of the node where it begins; each node but the note is in one group."""
    ui = template(name)
    places = boxes(ui)
    for _, source, _, target, _, kind in ui["links"]:
        assert places[source][2] < places[target][0], f"{kind} from node {source} to {target} goes back"
    groups = [(x, y, x + width, y + height) for x, y, width, height in (group["bounding"] for group in ui["groups"])]
    assert [group["title"][:2] for group in ui["groups"]] == [f"{n} " for n in range(1, len(groups) + 1)]
    assert all(a[2] < b[0] for a, b in itertools.pairwise(groups))
    for node in ui["nodes"]:
        left, top, right, bottom = places[node["id"]]
        inside = [g for g in groups if g[0] < left and g[1] < top and right < g[2] and bottom < g[3]]
        assert len(inside) == (node["type"] != "MarkdownNote"), node["id"]


def test_names_rank_alike_in_the_template_browser():
    """Its search puts shorter names first, and counts words: with as many each, they stay in order."""
    names = [TITLE_PREFIX + name for name in PLANS]
    assert {len(name.split()) for name in names} == {5}
    assert names == sorted(file.stem for file in (ROOT / "workflows").glob("*.json"))
    assert all(re.match(r"SANA-Sprint \d\d ", name) for name in names)


@planned
def test_thumbnails_are_square_and_small(name):
    """The browser shows them on square cards, 256 pixels high."""
    image = ROOT / "workflows" / f"{TITLE_PREFIX}{name}.jpg"
    width, height = Image.open(image).size
    assert width == height >= 512 and image.stat().st_size < 60_000


@pytest.mark.oldest
def test_a_negative_prompt_from_the_command_line(server):
    """As `run.py --negative TEXT`: some seed's apple stands on sky blue, until that is to be avoided.

    Not every seed's: docs/benchmarks.md says how many.
    """

    def paint(seed: int, negative: str | None = None) -> np.ndarray:
        prompt = server.prompt_of(ROOT / "workflows" / "SANA-Sprint 01 Text to Image.json")
        edit(prompt, "a red apple", 2, seed)
        if negative:
            avoid(prompt, negative, server.object_info())
        (image,) = server.images(server.run(prompt))
        return np.asarray(Image.open(io.BytesIO(server.view(image))).convert("RGB"))

    on_sky_blue = [seed for seed in range(16) if ground(paint(seed)) == "sky blue"]
    avoided = [paint(seed, "a sky blue background") for seed in on_sky_blue]
    on_white = [image for image in avoided if ground(image) == "white"]
    assert on_white and all(shows(image, "red apple", ground="white") for image in on_white)
