"""The ablation tables, from a command to a chart, with runs of two steps; and what the numbers in them mean."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import shapes_model
import torch
from PIL import Image

from sprint_core.distill import __main__ as command
from sprint_core.distill import recipes
from sprint_core.distill.dataset import scene_latents
from sprint_core.distill.engine import trainer
from sprint_core.distill.engine.processes import ProcessGroup
from sprint_core.distill.engine.randomness import initialise
from sprint_core.distill.runs import ablation_measures as measures
from sprint_core.distill.runs import ablation_tables as tables
from sprint_core.distill.runs import ablations
from sprint_core.distill.stages.sprint import plan
from sprint_core.distill.stages.teacher import unchecked_student
from sprint_core.models.transformer import SanaTransformer, TransformerConfig

SETTINGS = [f"{stage}.{key}=2" for stage in recipes.SHAPES for key in ("steps", "batch")]
SETTINGS += ["distill.ladd_from=1", "teacher.precision=fp32", "distill.precision=fp32"]  # bf16 is slow on some CPUs
AUTOENCODER = shapes_model.MODEL
COMMAND = ["--ablations", "--pool", "6", "--device", "cpu", "--autoencoder", str(AUTOENCODER)]
COMMAND += [f"--set={setting}" for setting in SETTINGS]
TINY = recipes.override(ablations.SHORT, SETTINGS)
SMALL = dataclasses.replace(recipes.SHAPES_TRANSFORMER, width=64, depth=2, cross_heads=2)
PROMPTS, SEED = 2, 1  # one seed trains here; what becomes of several, `pooled` shows below


@pytest.fixture(autouse=True, scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_latents, "SHARD", 4)
        patch.setattr(recipes, "SHAPES_TRANSFORMER", SMALL)
        patch.setattr(ablations, "PROMPTS", PROMPTS)
        patch.setattr(ablations, "SEEDS", (SEED,))
        yield


@pytest.fixture
def steps(monkeypatch) -> list[str]:
    """The folders in which a student or a critic takes a step, one entry for each step."""
    taken, one_step = [], ablations.Watched._one_step

    def counted(self):
        taken.append(self.folder.parent.name)
        return one_step(self)

    monkeypatch.setattr(ablations.Watched, "_one_step", counted)
    return taken


def run(out: Path) -> dict:
    return ablations.run(out, TINY, 6, AUTOENCODER, ProcessGroup(), PROMPTS)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict]:
    """A whole run: its folder and its document."""
    out = tmp_path_factory.mktemp("demo")
    return out, run(out)


def test_every_table_has_its_rows(done):
    _, document = done
    assert {title: list(rows) for title, rows in document["ablations"].items()} == {
        **{title: [row.label for row in rows] for title, rows in tables.PAPER.items()},
        "Stabilisers": list(tables.STABILISERS),
    }
    text = Path(document["files"][0]).read_text(encoding="utf-8")
    assert all(f"## {title}" in text for title in tables.PAPER) and "| 12.20 " in text
    assert all(f"\n- {row.label}" in text for rows in tables.PAPER.values() for row in rows)
    with Image.open(document["files"][1]) as chart:
        assert chart.size[0] > 1000
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_rows_of_one_configuration_are_one_run(done):
    out, document = done
    rows = document["ablations"]
    assert rows["T3 Objective"]["both"] is rows["T6 Max-time share"]["50 %"]
    assert rows["T3 Objective"]["sCM alone"] is rows["Stabilisers"]["dense time, q/k norm"]
    trained = {path.parent.parent.name for path in (out / "ablations").glob("*/distill/state.pt")}
    assert trained == {f"{one.name}-{SEED}" for one in ablations.VARIANTS}
    configurations = [(str(one.objective), one.guidance_embed, str(one.teacher)) for one in ablations.VARIANTS]
    assert len(set(configurations)) == len(ablations.VARIANTS)
    used = {row.run for table in tables.PAPER.values() for row in table} | set(tables.STABILISERS.values())
    assert used == {one.name for one in ablations.VARIANTS} | set(ablations.SAMPLERS)


def test_results_say_what_was_measured(done):
    out, _ = done
    result = json.loads((out / "ablations" / "base-1" / "result.json").read_text())
    assert list(result["judge"]) == ["2", "1"] and result["frechet"] is None and result["seconds"] > 0
    assert result["judge"]["2"]["prompts"] == PROMPTS and result["judge"]["2"]["high"] > 0.3
    assert 0 < result["grad_norm"]["median"] <= result["grad_norm"]["max"] and result["tangent_norm"]["median"] > 0
    assert result["key"]["seed"] == SEED and result["key"]["tangent_warmup_steps"] == "0"
    plain = torch.load(out / "ablations" / "no-guidance-1" / "distill" / "state.pt", weights_only=True)
    assert not any("guidance_embedder" in name for name in plain["average"])
    normless = torch.load(out / "ablations" / "neither-1" / "distill" / "state.pt", weights_only=True)
    assert not any("norm_q" in name for name in normless["average"])


def test_the_teacher_is_the_same_in_flow_and_trigflow(done):
    _, document = done
    rows = document["ablations"]["T1 Parametrisation"]
    assert all(0 < row["largest_difference"] < 1e-4 for row in rows.values())


def test_the_same_command_again_trains_nothing(done, steps, capsys):
    out, document = done
    assert command.main([*COMMAND, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    again = json.loads(lines[-1])
    again.pop("seconds")
    assert again == document and not steps
    assert lines[0].startswith("[1/13] flow-1: judge 20 steps ") and "## T3 Objective" in lines


def test_a_damaged_result_is_named(done, tmp_path, caplog):
    out, _ = done
    folder = tmp_path / "demo"
    shutil.copytree(out, folder)
    (folder / "ablations" / "base-1" / "result.json").write_text('{"judge": ', encoding="utf-8")
    assert command.main([*COMMAND, "--out", str(folder)]) == 1
    assert "result.json: not readable as JSON" in caplog.text


def test_killed_runs_continue(done, steps, tmp_path, monkeypatch):
    """Killed in its second step, one run takes just that one again, to the same result; the rest takes none."""
    out, document = done
    folder = tmp_path / "demo"
    shutil.copytree(out, folder)
    path = folder / "ablations" / "ladd-1" / "result.json"
    before = json.loads(path.read_text())
    shutil.rmtree(path.parent)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(trainer, "SAVE_EVERY_SEC", 0)
    with monkeypatch.context() as patch:
        patch.setattr(recipes.Schedule, "rate", lambda self, step: killed() if step else self.lr * 0.05)
        with pytest.raises(Killed):
            run(folder)
    assert steps == ["ladd-1", "ladd-1"] and not path.is_file()
    steps.clear()
    assert run(folder)["ablations"]["T6 Max-time share"] == document["ablations"]["T6 Max-time share"]
    assert steps == ["ladd-1"] * 3
    after = json.loads(path.read_text())
    assert {**after, "seconds": 0} == {**before, "seconds": 0}


def test_other_settings_in_the_same_folder_are_refused(done, caplog):
    out, _ = done
    assert command.main([*COMMAND, "--out", str(out), "--set", "distill.lr=1"]) == 1
    assert "another run" in caplog.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "distill.ladd_weight=0.3"], "varies ladd_weight"),
        (["--recipe", "sprint-0.6B"], "without --recipe"),
        (["--stage", "teacher"], "without --recipe, --stage"),
        (["--resume-best"], "--resume-best: only distillations"),
    ],
)
def test_what_the_tables_cannot_say_is_refused(tmp_path, caplog, more, message):
    assert command.main(["--ablations", "--out", str(tmp_path), *more]) == 1
    assert message in caplog.text and not list(tmp_path.iterdir())


def test_several_processes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one process"):
        ablations.run(tmp_path, TINY, 6, None, ProcessGroup(world_size=2), PROMPTS)


@pytest.mark.parametrize("change", [{}, {"time_scale": 1000.0}, {"qk_norm": False}])
def test_a_student_without_guidance_embedding_is_the_teacher(change):
    config = TransformerConfig(width=64, depth=2, cross_heads=2, caption_width=64, guidance_embed=False, **change)
    teacher = SanaTransformer(config)
    initialise(teacher, 0)
    student = unchecked_student(teacher, guidance_embed=False)
    assert student.config == config
    x, s, caption = torch.randn(2, 32, 2, 2), torch.tensor([0.3, 0.9]), torch.randn(2, 4, 64)
    torch.testing.assert_close(student(x, s, caption, s), teacher(x, s, caption))
    assert unchecked_student(teacher).config == dataclasses.replace(config, guidance_embed=True)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals(right, count, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert measures.wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    mirrored = measures.wilson(count - right, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_distance_has_an_interval_or_is_left_out():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn((2, 400, 32), generator=generator, dtype=torch.float64)
    near, far = measures.distance(a, b), measures.distance(a + 1.0, b)
    assert near["low"] < near["value"] < near["high"] < far["low"]
    assert measures.distance(a[:300], b[:300]) is None


def test_every_student_trains_as_often():
    """With a critic in turn, from the start or from some step, or without."""
    for one in ablations.VARIANTS[:3]:
        schedule, objective = ablations.plan(one, ablations.SHORT)
        phases = plan(objective)
        taken = [phase.module for step in range(schedule.steps) for phase in phases if step in phase]
        critics = {"base": 60, "scm": 0, "ladd": 120}[one.name]
        assert (taken.count("student"), taken.count("critic")) == (120, critics)
        assert objective.tangent_warmup_steps == 40


def test_a_missing_matplotlib_is_named_before_any_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="drawn by matplotlib: pip install matplotlib"):
        ablations.run(tmp_path, TINY, 6, None, ProcessGroup(), PROMPTS)
    assert not list(tmp_path.iterdir())


def measure(value: float, half: float = 0.01) -> dict:
    return {"value": value, "low": value - half, "high": value + half}


def test_order():
    assert measures.order(measure(0.3), measure(0.4), 27.0, 28.0) == "agrees"
    assert measures.order(measure(0.4), measure(0.3), 27.0, 28.0) == "disagrees"
    assert measures.order(measure(0.4), measure(0.3), 28.0, 28.0).startswith("differs")
    assert measures.order(measure(0.4, 0.1), measure(0.3), 27.0, 28.0) == "within noise"


def test_seeds_that_differ_widen_the_interval():
    results = [
        {"judge": {"2": measures.judged(right, 400)}, "frechet": measure(right / 100, 0.1), "seconds": 1.0}
        for right in (100, 300)
    ]
    row = measures.pooled(results)
    assert row["judge"]["2"]["value"] == 0.5 and row["judge"]["2"]["seeds"] == [0.25, 0.75]
    assert (row["judge"]["2"]["low"], row["judge"]["2"]["high"]) == (0.25, 0.75)
    assert (row["frechet"]["value"], row["frechet"]["low"], row["frechet"]["high"]) == (2.0, 1.0, 3.0)
    alike = measures.pooled([results[0], results[0]])
    assert alike["judge"]["2"]["low"] == measures.wilson(200, 800)[0]
    assert alike["frechet"]["high"] == pytest.approx(1.0 + 0.1 / 2**0.5)


def test_norms_that_are_not_finite_are_counted():
    assert measures.spread([1.0, 3.0, float("inf"), float("nan")]) == {
        "median": 2.0,
        "low": 1.0,
        "high": 3.0,
        "max": 3.0,
        "not_finite": 2,
    }
    assert measures.spread([]) is None


def test_median_lies_between_two_ranks():
    """Of 75 values, the 29th and the 47th: a binomial of p = 1/2, as a normal, rounded outwards."""
    norms = measures.spread([float(n) for n in range(75, 0, -1)])
    assert (norms["low"], norms["median"], norms["high"]) == (29.0, 38.0, 47.0)
