"""Comparing methods of distillation: what an evaluation is, that budgets are kept, and a comparison from end to end."""

import io
import json
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from by_hand import Model, Noise
from PIL import Image
from small_stages import flat

from sprint_core.distill import __main__ as command
from sprint_core.distill import recipes
from sprint_core.distill.dataset import emoji_art
from sprint_core.distill.engine import trainer
from sprint_core.distill.engine.processes import ProcessGroup
from sprint_core.distill.engine.randomness import initialise
from sprint_core.distill.recipes import Objective, with_method
from sprint_core.distill.runs import budget, compare, compare_tables, emoji, measures
from sprint_core.distill.stages.rivals import distill_stage
from sprint_core.distill.stages.teacher import student_of
from sprint_core.emoji import captions, scenes
from sprint_core.emoji.concepts import common, concepts
from sprint_core.models.transformer import SanaTransformer
from sprint_core.weights import checkpoint, layouts, presets

ENCODERS = presets.BUNDLED


def stage_with(**values):
    stage = distill_stage(Model(), Noise(), Objective(**{"tangent": "difference", **values}))
    for module in stage.modules.values():
        module.double()
    return stage


def stage_of(method: str):
    return stage_with(tangent_warmup_steps=0, **with_method(compare.METHODS[method]))


@pytest.mark.parametrize(
    ("method", "costs"),
    [
        # the guided teacher 2; the student forth and back 3, and once more for the difference
        ("scm", [2 + 3 + 1]),
        # beside that its sample 3, which the critic sends forth and back through the teacher 2; the critic's own turn:
        # a sample, and three looks
        ("scm+ladd", [6 + 3 + 2, 1 + 3]),
        # the sample of one step 3, the guided teacher 2, the fake network 1; that one's turns: a sample of one step,
        # and forth and back
        ("dmd", [3 + 2 + 1, 1 + 3]),
    ],
)
def test_evaluations_of_one_sample(method, costs):
    """A forward pass of any of the networks is one, a backward pass two more, or one where no weight learns."""
    stage = stage_of(method)
    assert [budget.cost_of(stage, step) for step in range(len(costs))] == costs


@pytest.mark.parametrize("name", compare.ABLATIONS)
def test_every_ablation_learns_from_its_first_step(name):
    """Beside the recipe, in which LADD begins later."""
    stage = stage_with(**{"ladd_from": 5, **compare.ABLATIONS[name]})
    loss, _ = stage.loss("student", 0, compare.SampleRandom(0, 0, "student", range(2)))
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in stage.student.parameters())


def test_a_budget_is_used_up():
    assert budget.within(stage_of("scm"), 6 * 4 * 25, 4) == (25, 600)
    assert budget.within(stage_of("scm"), 6 * 4 * 26 - 1, 4) == (25, 600)
    assert budget.within(stage_of("scm+ladd"), (11 + 4) * 3 * 10, 3) == (20, 450)  # the student's and the critic's
    assert budget.within(stage_of("scm"), 1, 4) == (1, 24)


@pytest.mark.parametrize("method", ["scm+ladd", "dmd2", "rcm+ladd", "emd"])
def test_the_count_foretold_is_the_count_taken(method):
    """Over a stretch in which everything takes its turns, and samples have one to four steps."""
    stage, steps, batch = stage_of(method), 12, 1
    with budget.counted(stage) as taken:
        for step in range(steps):
            for phase in stage.phases(step):
                stage.loss(phase.module, step, compare.SampleRandom(0, step, phase.module, range(batch)))
    assert budget.within(stage_of(method), taken.count, batch) == (steps, taken.count)


def test_diversity_is_that_of_grounds():
    grounds = (*captions.USUAL_GROUNDS, "gray")
    white, sky, grey = (scenes.backdrop(name).movedim(0, -1).round().byte() for name in grounds)
    data = torch.stack([white, white, sky, sky])  # of two images, one in two has another ground
    assert compare.diversity(torch.stack([sky] * 4), data) == 0.0
    assert compare.diversity(data, data) == 1.0
    assert compare.diversity(torch.stack([white, white, white, sky]), data) == pytest.approx((1 - 10 / 16) / 0.5)
    assert compare.diversity(torch.stack([white, sky, grey]), data) == pytest.approx((2 / 3) / 0.5)


def comparison_of(arguments, out):
    """What a command compares, before it does."""
    seen = []

    def end(comparison, *_):
        seen.append(comparison)
        raise ValueError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.Comparison, "untrained", end)
        assert command.main([*arguments, "--out", str(out)]) == 1
    return seen[0]


def test_every_second_caption_is_empty(arguments, tmp_path):
    """Of the data, and of those that are watched."""
    comparison = comparison_of(arguments, tmp_path)
    empty, kept = comparison.dataset.captions.null
    is_empty = (comparison.dataset.captions.ids == empty).all(1) & (comparison.dataset.captions.kept == kept).all(1)
    assert is_empty.tolist() == [i % 2 == 1 for i in range(len(is_empty))]
    assert comparison.dataset.fingerprint.endswith(compare.HALF_OPEN)
    watched = comparison.watch().captions
    assert len(watched) == 4 and [not text for text in watched] == [False, True] * 2
    images = [comparison.true_images(seed) for seed in (0, 0, 1)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_a_teacher_from_a_file(arguments, tmp_path, sprites, caplog):
    """As it is, without its stage; a student in its place is refused."""
    teacher = SanaTransformer(replace(recipes.EMOJI_TRANSFORMER, guidance_embed=False))
    initialise(teacher, 3)
    other = SanaTransformer(replace(teacher.config, caption_width=64))
    files = {"teacher": teacher, "student": student_of(teacher), "other": other}
    for name, network in files.items():
        weights = checkpoint.Weights(layouts.TRANSFORMER, network.config, network.state_dict(), tmp_path, {})
        checkpoint.save(tmp_path / f"{name}.safetensors", [weights], {})
    out, path = tmp_path / "out", tmp_path / "teacher.safetensors"
    with pytest.raises(ValueError, match="captions of width 64, and the text encoder of emoji has 128"):
        emoji.EmojiRun(out, recipes.RECIPES["demo"], sprites, teacher=tmp_path / "other.safetensors")
    run = emoji.EmojiRun(out, recipes.RECIPES["demo"], sprites, text_encoder=ENCODERS, teacher=path)
    loaded = run.train_teacher(run.train_text_encoder(None), None)
    assert all(torch.equal(p, q) for p, q in zip(loaded.transformer.parameters(), teacher.parameters(), strict=True))
    assert not any(p.requires_grad for p in loaded.parameters()) and not (out / "teacher").exists()
    more = ["--teacher", str(tmp_path / "student.safetensors"), "--out", str(out)]
    assert command.main([*arguments, *more]) == 1
    assert "student.safetensors: a SANA-Sprint; --teacher takes" in caplog.text


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    path = tmp_path_factory.mktemp("art") / "sprites.zip"
    with zipfile.ZipFile(path, "w") as file:
        for number in common()[:2]:
            image = Image.new("RGBA", (256, 256))
            image.paste((200, 3 * number % 256, 40, 255), (40, 60, 140, 160))
            buffer = io.BytesIO()
            Image.fromarray(emoji_art.fit(image)).save(buffer, "WEBP", lossless=True, exact=True)
            file.writestr(f"3d/{number}.webp", buffer.getvalue())
        file.writestr("concepts.json", json.dumps([concept.label for concept in concepts()]))
    return path


@pytest.fixture
def arguments(sprites, monkeypatch):
    for name, value in {"PROMPTS": 2, "SEEDS": 1, "STEPS": (1, 2), "OPEN_IMAGES": 3, "WATCHED": 4}.items():
        monkeypatch.setattr(compare, name, value)
    monkeypatch.setattr(emoji, "JUDGED", 2)
    settings = [f"--set={stage}.{key}=2" for stage in ("teacher", "distill") for key in ("steps", "batch")]
    settings += [f"--set={stage}.precision=fp32" for stage in ("teacher", "distill")]
    settings += ["--set=distill.ladd_from=1"]
    parts = ["--vae", str(ENCODERS), "--text-encoder", str(ENCODERS), "--concepts", "common"]
    return ["--compare", "--data", str(sprites), "--pool", "20", "--device", "cpu", *parts, *settings]


def test_from_a_command_to_a_chart(arguments, tmp_path, capsys, caplog):
    more = ["--methods", "scm,dmd", "--evaluations", "50", "--out", str(tmp_path)]
    assert command.main([*arguments, *more]) == 0
    out = capsys.readouterr().out.splitlines()
    document = json.loads(out[-1])
    lines = [json.loads(line) for line in (tmp_path / "compare" / "compare.jsonl").read_text().splitlines()]
    assert lines == document["compare"] and len(lines) == 3 * 2
    names = ["method", "seed", "steps", "judge", "frechet", "diversity", "evaluations", "seconds"]
    assert list(lines[0])[:8] == names and [line["steps"] for line in lines] == 3 * [1, 2]
    used = {line["method"]: line["evaluations"] for line in lines}
    assert used == {
        "untrained": 0,
        "scm": 48,
        "dmd": 42,
    }  # four steps of 2 * 6; 2 * (6 + 4 + 5 + 6), and the next would be 14 more
    results = [json.loads((tmp_path / "compare" / run / "result.json").read_text()) for run in ("scm-0", "dmd-0")]
    assert [one["key"]["schedule"].get("embedder_rate") for one in results] == ["0.1", None]  # of the rest: 1
    text = (tmp_path / "compare" / "compare.md").read_text()
    assert "## 1 step" in text and "## 2 steps" in text and "\n| dmd " in text
    assert "## T1 Parametrisation" in text and "## T3" not in text  # LADD alone is not among them
    references = json.loads((tmp_path / "compare" / "references.json").read_text())
    assert 0 <= references["largest_difference"] <= 1 / 255  # the teacher's, in flow and in TrigFlow
    assert references["flow"]["judge"]["prompts"] == references["trigflow"]["judge"]["prompts"] == 2
    with Image.open(tmp_path / "compare" / "compare.png") as chart:
        assert chart.size[0] > 600
    before = (tmp_path / "compare" / "dmd-0" / "result.json").read_bytes()
    assert command.main([*arguments, *more]) == 0  # trains and paints nothing again
    assert (tmp_path / "compare" / "dmd-0" / "result.json").read_bytes() == before
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["compare"] == document["compare"]
    (tmp_path / "compare" / "scm-0" / "result.json").write_text('{"judge": ')
    assert command.main([*arguments, *more]) == 1
    assert "result.json: not readable as JSON" in caplog.text


def test_a_killed_run_goes_on(arguments, tmp_path, monkeypatch):
    """Killed in its second step, it takes just that one again, to the same result."""

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    def weights(_comparison, transformer, seed):
        return {"weights": float(flat(transformer.parameters()).double().square().sum()), "seed": seed}

    monkeypatch.setattr(trainer, "SAVE_EVERY_SEC", 0)
    monkeypatch.setattr(compare.Comparison, "scores", weights)
    taken, one_step = [], budget.Timed._one_step
    monkeypatch.setattr(budget.Timed, "_one_step", lambda self: (taken.append(self.step), one_step(self))[1])
    comparison = comparison_of([*arguments, "--evaluations", "50", "--set", "distill.stop_factor=0"], tmp_path)
    whole = comparison.train("scm", 1)
    assert taken == [0, 1, 2, 3] and comparison.train("scm", 1) == whole and len(taken) == 4
    folder = comparison.folder / "scm-1"
    folder.rename(comparison.folder / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(recipes.Schedule, "rate", lambda self, step: kill() if step == 1 else self.lr)
        comparison.train("scm", 1)
    taken.clear()
    again = comparison.train("scm", 1)
    assert taken == [1, 2, 3] and {**again, "seconds": 0} == {**whole, "seconds": 0}
    seconds = json.loads((folder / "distill" / "seconds.json").read_text())["steps"]
    assert len(seconds) == 4 and again["seconds"] == round(sum(seconds), 1) and min(seconds) > 0


def test_several_processes_are_refused(sprites, tmp_path):
    run = emoji.EmojiRun(tmp_path, recipes.RECIPES["demo"], sprites, processes=ProcessGroup(world_size=2))
    with pytest.raises(ValueError, match="start it as one process"):
        compare.run(run, ["scm"], 1, 50, 2)


def test_a_missing_matplotlib_is_named_before_any_step(arguments, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "drawn by matplotlib: pip install matplotlib" in caplog.text and not list(tmp_path.iterdir())


def test_the_papers_tables():
    """All of its rows, each a run of its own; what is said of them is what their intervals say."""
    rows = {row.method for table in compare_tables.PAPER.values() for row in table}
    assert rows == {"scm", compare.SCM_AND_LADD, *compare.ABLATIONS, "flow", "trigflow"}
    assert compare.methods("all") == [*compare.METHODS, *compare.ABLATIONS] and "ladd" not in compare.methods(None)
    both, better, worse = (
        {"judge": measures.judged(right, 400), "frechet": {"value": value, "low": value - 5, "high": value + 5}}
        for right, value in ((200, 100.0), (300, 50.0), (100, 150.0))
    )
    references = {"data": both["frechet"], "flow": both, "trigflow": both, "largest_difference": 0.004}

    def run(scores):
        by_steps = {steps: scores | {"diversity": 1.0} for steps in ("1", "2", "4")}
        return {"by_steps": by_steps, "steps": 7, "seconds": 9.0, "memory_mib": 100, "stopped": True}

    one = {"scm": better, "ladd": worse, compare.SCM_AND_LADD: both}
    text = compare_tables.report({name: {0: run(row), 1: run(row)} for name, row in one.items()}, references, "short")
    table = text[text.index("## T3") :].splitlines()
    assert (
        table[2]
        == "|            | judge, %            | Frechet distance       | each seed     | paper's FID | CLIP  |"
    )
    assert (
        table[4]
        == "| sCM alone  | 75.0 (71.9 to 77.9) | 50.0 (46.5 to 53.5)    | 50.0 / 50.0   | 8.93        | 27.51 |"
    )
    assert table[8:] == [
        "- sCM alone against both: judge disagrees, Frechet disagrees",
        "- LADD alone against both: judge agrees, Frechet agrees; against sCM alone: judge agrees, Frechet agrees",
        "- both: the lowest FID in the paper",
    ]
    assert "Largest difference between their pixels, of 0 to 1: 4.0e-03" in text[: text.index("## T3")]
    assert "## T4" not in text and "2 of 2" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--compare", "--data", "x", "--methods", "scm,emb"], "--methods emb: there are scm, scm+ladd, dmd"),
        (["--compare"], "--compare needs --data sprites.zip"),
        (["--compare", "--recipe", "control"], "--compare is of the recipe demo"),
        (["--compare", "--stage", "teacher"], "without --stage"),
        (["--compare", "--keep-every", "5"], "--export and --keep-every are of one model"),
        (["--compare", "--resume-best"], "--resume-best: only distillations"),
        (["--compare", "--set", "distill.method=dmd"], "--set distill.method: each row of --compare has its own"),
        (["--compare", "--set", "distill.ladd_weight=0"], "--set distill.ladd_weight: each row"),
        (["--set", "distill.fakes=3"], "--set distill.fakes: method scm does not read it"),
        (["--set", "distill.fake_betas=0,0.9"], "--set distill.fake_betas: method scm trains none"),
        (["--set", "distill.method=dmd", "--set", "distill.chain_steps=9"], "chain_steps: method dmd does not read it"),
        (["--methods", "scm"], "are of --compare"),
        (["--compare", "--evaluations", "0"], "--evaluations 0"),
        (["--compare", "--seeds", "0"], "--seeds 0"),
        (["--seeds", "2"], "are of --compare"),
        (["--compare", "--seed", "2"], "--seed 2: 0 or more, of one model; --compare takes --seeds"),
        (["--seed", "-1"], "--seed -1: 0 or more"),
        (["--set", "distill.scm_weight=0"], "LADD alone has nothing to learn before ladd_from=100"),
        (["--recipe", "shapes", "--concepts", "common"], "--concepts: of --recipe demo"),
        (["--recipe", "shapes", "--pairs", "0.5"], "--pairs 0.5: of --recipe demo and demo-control"),
        (["--pairs", "1.5"], "--pairs 1.5: of --recipe demo and demo-control, from 0 to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, caplog, more, message):
    assert command.main(["--out", str(tmp_path / "out"), *more]) == 1
    assert message in caplog.text


@pytest.mark.parametrize(("method", "trained"), [("scm", 1), ("scm+ladd", 2), ("dmd", 2), ("dmd2", 3)])
def test_the_memory_of_a_method_counts_what_trains(method, trained):
    """Whatever phase came last, and froze what it did not train; but for networks that no phase trains."""
    stage = stage_of(method)
    names = sorted({phase.module for phase in stage.plan})
    assert len(names) == trained
    sizes = {name: sum(p.numel() for p in stage.modules[name].parameters()) for name in names}
    teacher = sum(p.numel() for p in stage.teacher.parameters())
    for phase in names:
        budget.cost_of(stage, stage_step(stage, phase))
        assert budget.trained_bytes(stage) == 4 * (4 * sum(sizes.values()) + sizes["student"] + teacher)


def stage_step(stage, phase: str) -> int:
    """The first in which a phase takes part."""
    return next(step for step in range(9) if phase in [one.module for one in stage.phases(step)])


def test_recipe_of_every_method_can_be_made():
    for changes in compare.METHODS.values():
        Objective(**{**with_method(changes)})
        recipes.override(recipes.RECIPES["demo"], [f"distill.{name}={value}" for name, value in changes.items()])
