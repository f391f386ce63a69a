"""A published model and its full-size recipe at a tiny size, and all that a run of it starts from."""

import dataclasses
from pathlib import Path

import pytest
import standin
from picture_files import plain, write

from sprint_core.distill import recipes
from sprint_core.distill.recipes import CAME_BETAS, Objective, Recipe, Schedule
from sprint_core.weights import presets
from sprint_core.weights.presets import Preset

SIZE_PX = 64
SANA = dataclasses.replace(standin.TEACHER, time_scale=1000.0, qk_norm=False)  # as SANA 1.0, without stabilisers
SCHEDULE = Schedule(2, 2, 1e-3, 1, 0.0, CAME_BETAS, 0.1, 0.9, "bf16", "came", True, 1)
COLOURS = {"red": (255, 0, 0), "a dark blue": (0, 0, 99), "grey": (128, 128, 128)}


@pytest.fixture
def tiny(monkeypatch):
    """Rows of the tables: the presets tiny and tiny-teacher, and the recipe tiny, two steps a stage."""
    for name, config in {"tiny": standin.TRANSFORMER, "tiny-teacher": standin.TEACHER}.items():
        monkeypatch.setitem(presets.PRESETS, name, Preset(name, "Tiny_diffusers", config, SIZE_PX))
    recipe = Recipe({"teacher": SCHEDULE, "distill": SCHEDULE}, Objective(teacher_precision="bf16"), "tiny")
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipe)


def write_pictures(folder: Path) -> Path:
    """A captioned picture of each colour."""
    for name, colour in COLOURS.items():
        write(folder, {f"{name}.png": plain(colour, (80, 64)), f"{name}.txt": name})
    return folder
