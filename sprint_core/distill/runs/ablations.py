"""The paper's ablation tables (arXiv 2503.09641) in small, on the demo world.

    python -m sprint_core.distill --ablations --out DIR [--autoencoder FILE]

Every run starts from the demo teacher in DIR, which is trained first where it is missing, and trains its student
for the same number of steps, with as many of the critic in between from where LADD takes part. A configuration
that stands in several tables is trained once for each seed. Each run has a folder, DIR/ablations/RUN-SEED; its
result.json says that it has ended and is not to be repeated.
"""

import copy
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ... import sampler, trigflow
from ...evaluate import frechet as features
from ...evaluate import scoring, sheet
from ...models.autoencoder import Autoencoder
from ...models.transformer import SanaTransformer
from ...pipeline import Pipeline
from ...shapes import examples
from ...text.encoder import TextEncoder
from ...weights import presets, tensorfile
from .. import recipes
from ..dataset.batch import weights_fingerprint
from ..dataset.scene_latents import SceneLatents
from ..engine.processes import ProcessGroup
from ..engine.trainer import Trainer
from ..losses.transform import trigflow_network
from ..recipes import Objective, Recipe, Schedule
from ..stages.base import Captioned, TextConditioned
from ..stages.student import DistillStage
from ..stages.teacher import TeacherStage, euler, unchecked_student
from . import ablation_tables as tables
from . import demo

STEPS, BATCH, WARMUP_STEPS, LADD_FROM = 120, 16, 20, 60
SEEDS = (0, 1)
PROMPTS = 360  # held-out, for each seed others
STUDENT_STEPS = (2, 1)  # the tables and the chart show the first in full
TEACHER_STEPS = scoring.TEACHER_STEPS
TANGENT_WARMUP = 3  # a run's steps over those in which its tangent warms up, at least
FINE_TUNE = 2  # the steps of a teacher without stabilisers over a run's

_DISTILL = dataclasses.replace(
    recipes.DEMO["distill"], steps=STEPS, batch=BATCH, warmup_steps=WARMUP_STEPS, decay=0.3, ema=0.995
)
_OBJECTIVE = dataclasses.replace(
    recipes.RECIPES["demo"].objective, ladd_from=LADD_FROM, ladd_weight=recipes.Objective().ladd_weight
)
SHORT = Recipe(recipes.DEMO | {"distill": _DISTILL}, _OBJECTIVE)
VARIED = ("guidance", "scm_weight", "ladd_weight", "max_time_share")  # by the tables, so not by --set


@dataclass(frozen=True)
class Run:
    """What a run has other than the published configuration."""

    name: str
    objective: Mapping[str, object] = field(default_factory=dict)
    guidance_embed: bool = True
    teacher: Mapping[str, object] = field(default_factory=dict)  # what its teacher's configuration has other


SCM_ALONE = {"ladd_weight": 0.0}
RUNS = (
    Run("base"),
    Run("scm", SCM_ALONE),
    Run("ladd", {"scm_weight": 0.0, "ladd_from": 0}),
    Run("no-guidance", {"guidance": (presets.GUIDANCE,)}, guidance_embed=False),
    Run("weight-1", {"ladd_weight": 1.0}),
    Run("weight-0.1", {"ladd_weight": 0.1}),
    Run("share-0", {"max_time_share": 0.0}),
    Run("share-0.7", {"max_time_share": 0.7}),
    Run("sparse-time", SCM_ALONE, teacher={"time_scale": 1000.0}),
    Run("no-norm", SCM_ALONE, teacher={"qk_norm": False}),
    Run("neither", SCM_ALONE, teacher={"time_scale": 1000.0, "qk_norm": False}),
)


# --- the runs -----------------------------------------------------------------------------------------


class Watched(Trainer):
    """A trainer that keeps of every step its seconds, the gradient norm before clipping, and the tangent norm."""

    KEPT = {"grad_norm": "student/grad_norm", "tangent_norm": "student/dF_norm"}

    def __init__(self, *args):
        super().__init__(*args)
        self.file = self.folder / "norms.json"
        self.history = tensorfile.read_json(self.file).get("steps", [])[: self.step] if self.step else []

    def _one_step(self) -> dict[str, Tensor]:
        started = time.perf_counter()
        metrics = super()._one_step()
        kept = {name: float(metrics[key]) for name, key in self.KEPT.items() if key in metrics}
        self.history.append({"seconds": time.perf_counter() - started, **kept})
        return metrics

    def save(self) -> float:
        _write(self.file, {"steps": self.history})  # before the state, so that it is never behind it
        return super().save()

    def summary(self) -> dict:
        """Median and maximum of each norm, and the seconds of all steps, killed processes' too."""
        norms = {name: tables.spread([step[name] for step in self.history if name in step]) for name in self.KEPT}
        return norms | {"seconds": round(sum(step["seconds"] for step in self.history), 1)}


def plan(run: Run, recipe: Recipe) -> tuple[Schedule, Objective]:
    """Of a run: the recipe's steps are the student's, those of the critic come on top."""
    schedule, objective = recipe.stages["distill"], dataclasses.replace(recipe.objective, **run.objective)
    critic = max(0, schedule.steps - objective.ladd_from) if objective.ladd_weight else 0
    warmup = min(objective.tangent_warmup_steps, schedule.steps // TANGENT_WARMUP)
    return (
        dataclasses.replace(schedule, steps=schedule.steps + critic),
        dataclasses.replace(objective, tangent_warmup_steps=warmup),
    )


@torch.no_grad()
def rotations(
    model: TextConditioned, z: Tensor, captions: Sequence, flow_shift: float, steps: int, cfg: float
) -> Tensor:
    """teacher.euler in TrigFlow: the transformed network at the same times, as angles. Scaled latents."""
    conditions = model.encode(captions), model.encode([""] * len(captions))
    networks = [trigflow_network(functools.partial(_velocity, model, *condition)) for condition in conditions]
    angles = [trigflow.t_from_s(s) for s in trigflow.shifted_sigmas(steps, flow_shift)]
    x_t = trigflow.SIGMA_DATA * z
    for t, t_next in itertools.pairwise(angles):
        times = x_t.new_full((len(x_t),), t)
        F = sampler.classifier_free_guidance(*(network(x_t / trigflow.SIGMA_DATA, times) for network in networks), cfg)
        x_t = trigflow.rotate(x_t, F, t, t_next)
    return x_t / trigflow.SIGMA_DATA


def _velocity(model: TextConditioned, caption: Tensor, mask: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    return model.transformer(x_s, s, caption, mask=mask)


SAMPLERS: dict[str, Callable[..., Tensor]] = {"flow": euler, "trigflow": rotations}


class Ablations:
    """Every run of the tables, below a demo run's folder. Raises ValueError if that belongs to another run."""

    def __init__(
        self, run: demo.DemoRun, autoencoder: Autoencoder, latents: SceneLatents, teacher: Captioned, prompts: int
    ):
        self.demo, self.prompts, self.folder = run, prompts, run.out / "ablations"
        self.autoencoder, self.latents, self.teacher = autoencoder, latents, teacher
        self.fingerprint = weights_fingerprint(self.teacher)

    def sampled(self, seed: int) -> dict[str, dict]:
        """The teacher's pictures by either sampler, from the same noise: results by SAMPLERS' names."""
        paths = {name: self.folder / f"{name}-{seed}" / "result.json" for name in SAMPLERS}
        key = {"teacher": self.fingerprint, "prompts": self.prompts}
        known = {name: _read(path, key) for name, path in paths.items()}
        if all(known.values()):
            return known
        scores = {name: self._score(self._teacher_painter(sample), seed, name) for name, sample in SAMPLERS.items()}
        flow, rotated = scores.values()
        difference = {"largest_difference": float((flow.images - rotated.images).abs().max())}  # of pixels in [0, 1]
        for name, path in paths.items():
            seconds = {"seconds": round(scores[name].seconds, 1)}
            known[name] = self._result({TEACHER_STEPS: scores[name]}, seed) | difference | seconds
            _write(path, {"key": key} | known[name])
        return known

    def trained(self, run: Run, seed: int) -> dict:
        """Train, unless it is trained, and score, unless it is scored: the run's result."""
        teacher = self._teacher_without(run) if run.teacher else self.teacher
        schedule, objective = plan(run, self.demo.recipe)
        start = functools.partial(unchecked_student, guidance_embed=run.guidance_embed)
        stage = DistillStage(teacher, self.latents, objective, start=start)
        stage.settings |= {"teacher": weights_fingerprint(teacher), "guidance_embed": str(run.guidance_embed)}
        folder = self.folder / f"{run.name}-{seed}"
        trainer = Watched(stage, schedule, folder, seed, self.demo.processes)
        key = trainer.run | {"prompts": self.prompts}
        if known := _read(folder / "result.json", key):
            return known
        pipeline = self._pipeline(trainer.train().transformer.eval(), teacher)
        painters = {steps: scoring.student(pipeline, steps, presets.GUIDANCE) for steps in STUDENT_STEPS}
        scores = {n: self._score(paint, seed, f"{run.name}, {n}") for n, paint in painters.items()}
        result = self._result(scores, seed) | trainer.summary()
        _write(folder / "result.json", {"key": key} | result)
        return result

    def _teacher_without(self, run: Run) -> Captioned:
        """The teacher without a stabiliser, fine-tuned so that it works without it."""
        changed = copy.deepcopy(self.teacher)
        config = dataclasses.replace(changed.transformer.config, **run.teacher)
        transformer = SanaTransformer(config).to(self.demo.processes.device)
        transformer.load_state_dict(changed.transformer.state_dict(), strict=False)  # a norm that is gone has gains
        changed.transformer = transformer
        steps = FINE_TUNE * self.demo.recipe.stages["distill"].steps
        schedule = dataclasses.replace(self.demo.recipe.stages["teacher"], steps=steps, warmup_steps=WARMUP_STEPS)
        stage = TeacherStage(changed, self.latents, recipes.DEMO_FLOW_SHIFT)
        stage.settings |= {"teacher": self.fingerprint}
        trainer = Trainer(stage, schedule, self.folder / f"teacher-{run.name}", processes=self.demo.processes)
        return trainer.train().eval().requires_grad_(False)

    def _pipeline(self, transformer: SanaTransformer, teacher: Captioned) -> Pipeline:
        encoder = TextEncoder(teacher.gemma, self.demo.prompts.tokenizer, self.demo.prompts.preset)
        return Pipeline(transformer, self.autoencoder, encoder, recipes.DEMO_PX)

    def _teacher_painter(self, sample: Callable[..., Tensor]) -> scoring.Painter:
        pipeline, shape = self._pipeline(self.teacher.transformer, self.teacher), self.latents.latents.shape[1:]

        @torch.inference_mode()
        def paint(texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            z = sampler.initial_noise(seeds, shape).to(self.demo.processes.device)
            latents = sample(self.teacher, z, texts, recipes.DEMO_FLOW_SHIFT, TEACHER_STEPS, presets.GUIDANCE)
            return pipeline.decode(latents).cpu()

        return paint

    def _score(self, paint: scoring.Painter, seed: int, label: str) -> scoring.Score:
        prompts, _ = held_out(self.prompts, seed)
        return scoring.score(paint, prompts, seed * len(prompts), label)

    def _result(self, scores: Mapping[int, scoring.Score], seed: int) -> dict:
        """Judge shares by step count, and the Frechet distance at the first of these."""
        _, true = held_out(self.prompts, seed)
        first = next(iter(scores.values()))
        judge = {str(steps): tables.judged(sum(one.right), len(one.right)) for steps, one in scores.items()}
        return {"judge": judge, "frechet": tables.distance(features.extract(features.bundled(), first.images), true)}


@functools.cache
def held_out(count: int, seed: int) -> tuple[list[examples.Prompt], Tensor]:
    """Prompts, and the features [count, d] of a true picture of each."""
    prompts = scoring.balanced_prompts(count, seed)
    return prompts, features.extract(features.bundled(), sheet.true_images(prompts))


# --- all of it ----------------------------------------------------------------------------------------


def run(out: Path, recipe: Recipe, pool: int, given: Path | None, processes: ProcessGroup, prompts: int) -> dict:
    """Every run that is missing, then the tables: ablations.md and .png in DIR/ablations, and the JSON document.

    recipe: SHORT or like it, with the stage distill of each run; the rest as for demo.DemoRun. Raises ValueError.
    """
    _check(recipe.objective, processes)
    demo_run = demo.DemoRun(out, recipe, pool, given, processes)
    autoencoder = demo_run.train_autoencoder()
    latents = demo_run.encode_dataset(autoencoder)
    teacher = demo_run.train_teacher(demo_run.train_text_encoder(), autoencoder, latents)
    ablations = Ablations(demo_run, autoencoder, latents, teacher, prompts)
    results = _all_results(ablations)
    found = {name: tables.pooled([results[name, seed] for seed in SEEDS]) for name, _ in results}
    steps, batch, seeds = recipe.stages["distill"].steps, recipe.stages["distill"].batch, ", ".join(map(str, SEEDS))
    about = f"{steps} steps of the student with {batch} pictures, {prompts} held-out prompts; seeds {seeds}"
    document, files = tables.report(found, about), [ablations.folder / f"ablations.{kind}" for kind in ("md", "png")]
    files[0].write_text(document, encoding="utf-8")
    tables.chart(found).save(files[1])
    tqdm.write(document)
    rows = {title: {row.label: found[row.run] for row in rows} for title, rows in tables.PAPER.items()}
    rows["Stabilisers"] = {label: found[name] for label, name in tables.STABILISERS.items()}
    return {"ablations": rows, "files": [str(path) for path in files]}


def _check(objective: Objective, processes: ProcessGroup) -> None:
    """Refuse what the tables could not say. Raises ValueError."""
    published = Objective()
    if fixed := [name for name in VARIED if getattr(objective, name) != getattr(published, name)]:
        raise ValueError(f"--ablations varies {', '.join(fixed)} of distill itself: leave it as published")
    if processes.world_size > 1:
        raise ValueError("--ablations trains small models one after another: start it as one process")


def _all_results(ablations: Ablations) -> dict[tuple[str, int], dict]:
    """By run and seed, with a line for each."""
    results, total = {}, len(SEEDS) * (len(RUNS) + len(SAMPLERS))
    for seed in SEEDS:
        for name, result in ablations.sampled(seed).items():
            results[name, seed] = result
            tqdm.write(f"[{len(results)}/{total}] {name}-{seed}: {tables.said(result)}")
        for one in RUNS:
            results[one.name, seed] = ablations.trained(one, seed)
            tqdm.write(f"[{len(results)}/{total}] {one.name}-{seed}: {tables.said(results[one.name, seed])}")
    return results


def _read(path: Path, key: Mapping) -> dict | None:
    """The result in a file, if it is of the same run."""
    if not path.is_file():
        return None
    result = tensorfile.read_json(path)
    return result if result.pop("key", None) == key else None


def _write(path: Path, document: object) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document), encoding="utf-8")
    os.replace(temporary, path)
