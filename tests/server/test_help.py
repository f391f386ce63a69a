"""Help pages, translations and tooltips: complete, current, and served."""

import copy
import io
import json
import re
import urllib.error
from pathlib import Path

import pytest
from PIL import Image

from launcher.setup import PACK_NAME
from tools import make_help
from tools.help_words import WORDS

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh", "zh-TW", "ja", "ko", "fr", "es", "ru")
RENEW = "run `python run.py python tools/make_help.py`"


@pytest.fixture(scope="module")
def ours(server) -> dict:
    return {name: node for name, node in server.object_info().items() if name.startswith(make_help.PREFIX)}


def locale(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_everything_has_a_tooltip_and_aliases(ours):
    for name, node in ours.items():
        assert node["description"] and node["search_aliases"], name
        for slot in (*make_help.inputs(node), *make_help.outputs(node)):
            assert slot.tip, f"{name}: {slot.name}"


def test_english_is_what_the_nodes_say(ours):
    assert locale("en") == {name: make_help.texts(node) for name, node in ours.items()}, RENEW


def test_the_manager_finds_every_node(ours):
    """ComfyUI-Manager knows by this file which pack a graph lacks."""
    assert json.loads(make_help.NODE_LIST.read_text(encoding="utf-8")) == make_help.node_list(ours), RENEW


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_translations_are_complete(language):
    """Every text is there, and every sentence is translated."""
    english, translated = make_help.leaves(locale("en")), make_help.leaves(locale(language))
    missing = english.keys() - translated.keys()
    assert not missing, f"{language} lacks {sorted(missing)}"
    assert not translated.keys() - english.keys(), f"{language} has texts of what there is no more"
    assert all(isinstance(text, str) and text.strip() for text in translated.values())
    sentences = [path for path in english if path.endswith(("/description", "/tooltip"))]
    same = [path for path in sentences if translated[path] == english[path]]
    assert not same, f"{language}: still English: {same}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_canvas_speaks_every_language(language):
    """Each text of the live canvas, with the places that it has to fill."""
    texts = [
        json.loads((ROOT / "locales" / each / "main.json").read_text(encoding="utf-8"))["sanaSprintCanvas"]
        for each in ("en", language)
    ]
    places = [{key: set(re.findall(r"\{\w+\}", text)) for key, text in each.items()} for each in texts]
    assert places[0] == places[1]
    assert all(text.strip() for text in texts[1].values())


def test_translations_are_of_todays_english():
    translated = json.loads(make_help.TRANSLATED.read_text(encoding="utf-8"))
    now = make_help.hashes(locale("en"))
    changed = sorted(path for path in now if translated.get(path) != now[path])
    assert not changed, f"translate these anew in every language, then run make_help.py --translated: {changed}"


def test_comfyui_serves_every_language(server):
    served = server.json("/i18n")
    for language in LANGUAGES:
        assert served[language]["nodeDefs"].items() >= locale(language).items()


def test_every_node_has_a_page(server, ours):
    """Where the editor looks for it, with a current reference, an image, and prose of its own."""
    for name, node in ours.items():
        path = f"/extensions/{PACK_NAME}/docs/{name}"
        text = server.request(f"{path}.md").decode()
        assert text == make_help.page(text, name, node), f"{name}.md: {RENEW}"
        assert text.startswith(f"# {node['display_name']}\n\n") and "## Example" in text
        assert len(text.split(make_help.BEGIN)[0]) > 150 and len(text.split("## Example")[1]) > 80
        data = server.request(f"{path}.png")
        assert len(data) <= 60_000, name
        assert Image.open(io.BytesIO(data)).text["shown"] == make_help.shown(node), f"{name}.png: {RENEW}"
    with pytest.raises(urllib.error.HTTPError):
        server.request(f"/extensions/{PACK_NAME}/docs/SanaSprintNothing.md")


@pytest.mark.parametrize("language", [language for language in WORDS if language != "en"])
def test_translated_pages_say_what_the_english_ones_do(server, ours, language):
    """The same inputs and outputs, by name, today's texts of that language, and the same code in the prose."""
    for name, node in ours.items():
        english = make_help.page_file(name, "en").read_text("utf-8")
        text = server.request(f"/extensions/{PACK_NAME}/docs/{name}/{language}.md").decode()
        assert text == make_help.page(text, name, node, language), f"{name}/{language}.md: {RENEW}"
        row = locale(language)[name]
        assert text.startswith(f"# {row['display_name']}\n\n")
        made, english_made = (page.split(make_help.BEGIN)[1].split(make_help.END)[0] for page in (text, english))
        listed = re.findall(r"^- \*\*(.+?)\*\*(?: `(.+?)`)?", made, re.M)
        assert [own or shown for shown, own in listed] == re.findall(r"^- \*\*(.+?)\*\*", english_made, re.M)
        assert [shown for shown, _ in listed] == [
            *(row["inputs"][slot.key]["name"] for slot in make_help.inputs(node)),
            *(row["outputs"][str(i)]["name"] for i, _ in enumerate(make_help.outputs(node))),
        ]
        prose, english_prose = (page.replace(made, "") for page, made in ((text, made), (english, english_made)))
        assert sorted(re.findall(r"`[^`]+`", prose)) == sorted(re.findall(r"`[^`]+`", english_prose)), name


KEPT = re.compile(r"(bf16|fp16|fp32|fp8_e4m3fn|int8|cpu|HED|diffusers|[\d.]+\.\.\d+|\d+:\d+, \d+ x \d+)")


@pytest.mark.parametrize("language", LANGUAGES)
def test_choices_are_translated(server, ours, language):
    """All but names of formats and files; each still shows the word that graphs and help pages have for it."""
    served = server.json("/i18n")[language]
    words = served.get("sanaSprint", {}).get("options", {})
    choices = set()
    for node in ours.values():
        for _, kind, options, *_ in make_help.specifications(node["input"]):
            if kind in ("COMBO", make_help.DYNAMIC_COMBO) and not make_help.is_file(options):
                choices |= set(make_help.keys(options))
    assert {"auto", "custom", "paper"} <= choices
    translatable = {choice for choice in choices if not KEPT.fullmatch(choice)}
    assert words.keys() == (set() if language == "en" else translatable)
    assert all(shown.endswith(f" ({choice})") for choice, shown in words.items())


def test_an_image_is_out_of_date_when_its_node_changes(ours):
    """Another title, socket, default or output is another image; other words about them, or another range, are not."""
    node = ours["SanaSprintSampler"]
    before = make_help.shown(node)
    reworded = copy.deepcopy(node)
    reworded["description"] = reworded["input"]["required"]["steps"][1]["tooltip"] = "other words"
    reworded["input"]["required"]["steps"][1]["max"] = 50
    assert make_help.shown(reworded) == before
    changes = (
        lambda node: node.update(display_name="Sampler"),
        lambda node: node["input"]["required"].pop("positive"),
        lambda node: node["input"]["required"]["steps"][1].update(default=3),
        lambda node: node["input"]["required"]["schedule"][1].update(default="app"),
        lambda node: node["output"].__setitem__(0, "IMAGE"),
    )
    for change in changes:
        changed = copy.deepcopy(node)
        change(changed)
        assert make_help.shown(changed) != before


def test_no_page_without_a_node(ours):
    assert {file.stem for file in make_help.DOCS.iterdir()} == set(ours)
