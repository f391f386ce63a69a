"""The paper's ablation tables (arXiv 2503.09641) in small, in the world of plain shapes.

    python -m sprint_core.distill --ablations --out DIR [--autoencoder FILE]

Every variant starts from the teacher in DIR, which is trained first where it is missing, and trains its student
for the same number of steps, with as many of the critic in between from where LADD takes part. A configuration
that stands in several tables is trained once for each seed. Each has a folder, DIR/ablations/VARIANT-SEED; its
result.json says that it has ended and is not to be repeated.
"""

import copy
import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ... import disk, sampler, trigflow
from ...evaluate import frechet, scoring, sheet
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
from . import ablation_measures as measures
from . import ablation_tables as tables
from .shapes import ShapesRun

SEEDS = (0, 1)
PROMPTS = 360  # held-out, for each seed others
STUDENT_STEPS = (2, 1)  # the tables and the chart show the first in full
WARMUP_STEPS = 20
TANGENT_WARMUP = 3  # a variant's steps over those in which its tangent warms up, at least
FINE_TUNE = 2  # the steps of a teacher without stabilisers over a variant's

# fmt: off
SHORT = Recipe(
    recipes.SHAPES | {"distill": replace(recipes.SHAPES["distill"], steps=120, batch=16, warmup_steps=WARMUP_STEPS,
                                       decay=0.3, betas=(0.9, 0.99), ema=0.995)},
    Objective(tangent_warmup_steps=150, ladd_from=60),  # the published form, whose columns the paper varies
)
# fmt: on
VARIED = ("method", "guidance", "scm_weight", "ladd_weight", "max_time_share")  # by the tables, so not by --set


@dataclass(frozen=True)
class Variant:
    """What a variant has other than the published configuration."""

    name: str
    objective: Mapping[str, Any] = field(default_factory=dict)
    guidance_embed: bool = True
    teacher: Mapping[str, Any] = field(default_factory=dict)  # what its teacher's configuration has other


SCM_ALONE = {"ladd_weight": 0.0}
VARIANTS = (
    Variant("base"),
    Variant("scm", SCM_ALONE),
    Variant("ladd", {"scm_weight": 0.0, "ladd_from": 0}),
    Variant("no-guidance", {"guidance": (presets.GUIDANCE,)}, guidance_embed=False),
    Variant("weight-1", {"ladd_weight": 1.0}),
    Variant("weight-0.1", {"ladd_weight": 0.1}),
    Variant("share-0", {"max_time_share": 0.0}),
    Variant("share-0.7", {"max_time_share": 0.7}),
    Variant("sparse-time", SCM_ALONE, teacher={"time_scale": 1000.0}),
    Variant("no-norm", SCM_ALONE, teacher={"qk_norm": False}),
    Variant("neither", SCM_ALONE, teacher={"time_scale": 1000.0, "qk_norm": False}),
)


def plan(variant: Variant, recipe: Recipe) -> tuple[Schedule, Objective]:
    """A variant's: the recipe's steps are the student's, those of the critic come on top."""
    schedule, objective = recipe.stages["distill"], replace(recipe.objective, **variant.objective)
    critic = max(0, schedule.steps - objective.ladd_from) if objective.ladd_weight else 0
    warmup = min(objective.tangent_warmup_steps, schedule.steps // TANGENT_WARMUP)
    return replace(schedule, steps=schedule.steps + critic), replace(objective, tangent_warmup_steps=warmup)


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
        write_result(self.file, {"steps": self.history})  # before the state, so that it is never behind it
        return super().save()

    def summary(self) -> dict[str, Any]:
        """Median and maximum of each norm, and the seconds of all steps, killed processes' too."""
        norms = {name: measures.spread([step[name] for step in self.history if name in step]) for name in self.KEPT}
        return norms | {"seconds": round(sum(step["seconds"] for step in self.history), 1)}


@torch.no_grad()
def rotations(
    model: TextConditioned, z: Tensor, captions: Sequence, flow_shift: float, steps: int, cfg: float
) -> Tensor:
    """teacher.euler in TrigFlow: the transformed network at the same times, as angles. Scaled latents."""
    conditions = model.encode(captions), model.encode([""] * len(captions))
    networks = [
        trigflow_network(functools.partial(model.transformer, caption=caption, mask=mask))
        for caption, mask in conditions
    ]
    angles = [trigflow.t_from_s(s) for s in trigflow.shifted_sigmas(steps, flow_shift)]
    x_t = trigflow.SIGMA_DATA * z
    for t, t_next in itertools.pairwise(angles):
        times = x_t.new_full((len(x_t),), t)
        conditional, unconditional = (network(x_t / trigflow.SIGMA_DATA, times) for network in networks)
        F = sampler.classifier_free_guidance(conditional, unconditional, cfg)
        x_t = trigflow.rotate(x_t, F, t, t_next)
    return x_t / trigflow.SIGMA_DATA


SAMPLERS: dict[str, Callable[..., Tensor]] = {"flow": euler, "trigflow": rotations}


@dataclass(frozen=True)
class Ablations:
    """What the variants share: a run of shapes with its DC-AE, latents and teacher, and how many prompts judge them."""

    run: ShapesRun
    autoencoder: Autoencoder
    latents: SceneLatents
    teacher: Captioned
    prompts: int

    @property
    def folder(self) -> Path:
        return self.run.out / "ablations"

    def sample_teacher(self, seed: int) -> dict[str, dict[str, Any]]:
        """The teacher's images by either sampler, from the same noise: results by SAMPLERS' names."""
        paths = {name: self.folder / f"{name}-{seed}" / "result.json" for name in SAMPLERS}
        key = {"teacher": weights_fingerprint(self.teacher), "prompts": self.prompts}
        results = {name: result for name, path in paths.items() if (result := read_result(path, key))}
        if len(results) == len(SAMPLERS):
            return results
        scores = {name: self._score(self._teacher_painter(sample), seed, name) for name, sample in SAMPLERS.items()}
        flow, rotated = (score.images for score in scores.values())
        shared = {"largest_difference": float((flow - rotated).abs().max())}  # of pixels in [0, 1]
        for name, score in scores.items():
            result = self._result({scoring.TEACHER_STEPS: score}, seed)
            results[name] = result | shared | {"seconds": round(score.seconds, 1)}
            write_result(paths[name], {"key": key} | results[name])
        return results

    def train_student(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Train, unless it is trained, and score, unless it is scored: the variant's result."""
        teacher = self._train_teacher(variant) if variant.teacher else self.teacher
        schedule, objective = plan(variant, self.run.recipe)
        start = functools.partial(unchecked_student, guidance_embed=variant.guidance_embed)
        stage = DistillStage(teacher, self.latents, objective, start=start)
        stage.settings |= {"teacher": weights_fingerprint(teacher), "guidance_embed": str(variant.guidance_embed)}
        folder = self.folder / f"{variant.name}-{seed}"
        trainer = Watched(stage, schedule, folder, seed, self.run.processes)
        key = trainer.run | {"prompts": self.prompts}
        if result := read_result(folder / "result.json", key):
            return result
        pipeline = self._pipeline(trainer.train().transformer.eval(), teacher)
        painters = {steps: scoring.student(pipeline, steps, presets.GUIDANCE) for steps in STUDENT_STEPS}
        scores = {n: self._score(paint, seed, f"{variant.name}, {n}") for n, paint in painters.items()}
        result = self._result(scores, seed) | trainer.summary()
        write_result(folder / "result.json", {"key": key} | result)
        return result

    def _train_teacher(self, variant: Variant) -> Captioned:
        """The teacher without a stabiliser, fine-tuned so that it works without it."""
        model = copy.deepcopy(self.teacher)
        transformer = SanaTransformer(replace(model.transformer.config, **variant.teacher)).to(self.run.device)
        transformer.load_state_dict(model.transformer.state_dict(), strict=False)  # a norm that is gone has gains
        model.transformer = transformer
        steps = FINE_TUNE * self.run.recipe.stages["distill"].steps
        schedule = replace(self.run.recipe.stages["teacher"], steps=steps, warmup_steps=WARMUP_STEPS)
        stage = TeacherStage(model, self.latents, recipes.SHAPES_FLOW_SHIFT)
        stage.settings |= {"teacher": weights_fingerprint(self.teacher)}
        trainer = Trainer(stage, schedule, self.folder / f"teacher-{variant.name}", processes=self.run.processes)
        return trainer.train().eval().requires_grad_(False)

    def _pipeline(self, transformer: SanaTransformer, teacher: Captioned) -> Pipeline:
        encoder = TextEncoder(teacher.gemma, self.run.prompts.tokenizer, self.run.prompts.preset)
        return Pipeline(transformer, self.autoencoder, encoder, recipes.SHAPES_PX)

    def _teacher_painter(self, sample: Callable[..., Tensor]) -> scoring.Painter:
        pipeline, shape = self._pipeline(self.teacher.transformer, self.teacher), self.latents.latents.shape[1:]

        @torch.inference_mode()
        def paint(texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            z = sampler.initial_noise(seeds, shape).to(self.run.device)
            steps, cfg = scoring.TEACHER_STEPS, presets.GUIDANCE
            return pipeline.decode(sample(self.teacher, z, texts, recipes.SHAPES_FLOW_SHIFT, steps, cfg)).cpu()

        return paint

    def _score(self, paint: scoring.Painter, seed: int, label: str) -> scoring.Score:
        prompts, _ = held_out(self.prompts, seed)
        return scoring.score(paint, prompts, seed * len(prompts), label)

    def _result(self, scores: Mapping[int, scoring.Score], seed: int) -> dict[str, Any]:
        """Judge shares by step count, and the Frechet distance at the first of these."""
        _, true = held_out(self.prompts, seed)
        painted = frechet.extract(frechet.bundled(), next(iter(scores.values())).images)
        judge = {str(steps): measures.judged(sum(one.right), len(one.right)) for steps, one in scores.items()}
        return {"judge": judge, "frechet": measures.distance(painted, true)}


@functools.cache
def held_out(count: int, seed: int) -> tuple[list[examples.Prompt], Tensor]:
    """Prompts, and the features [count, d] of a true image of each."""
    prompts = scoring.balanced_prompts(count, seed)
    return prompts, frechet.extract(frechet.bundled(), sheet.true_images(prompts))


# --- all of it ----------------------------------------------------------------------------------------


def run(out: Path, recipe: Recipe, pool: int, autoencoder: Path | None, processes: ProcessGroup, prompts: int) -> dict:
    """Every result that is missing, then the tables: ablations.md and .png in DIR/ablations, and the JSON document.

    recipe: SHORT or like it, with the stage distill of each variant; the rest as for ShapesRun. Raises ValueError.
    """
    _check(recipe.objective, processes)
    shapes = ShapesRun(out, recipe, pool, autoencoder, processes)
    vae = shapes.train_autoencoder()
    latents = shapes.encode_dataset(vae)
    teacher = shapes.train_teacher(shapes.train_text_encoder(), vae, latents)
    results = _all_results(Ablations(shapes, vae, latents, teacher, prompts))
    distill, seeds = recipe.stages["distill"], ", ".join(map(str, SEEDS))
    judging = f"{prompts} held-out prompts; seeds {seeds}"
    document = tables.report(results, f"{distill.steps} steps of the student with {distill.batch} images, {judging}")
    files = [shapes.out / "ablations" / f"ablations.{kind}" for kind in ("md", "png")]
    with disk.replacing(files[0]) as temporary:
        temporary.write_text(document, encoding="utf-8")
    tables.chart(results, files[1])
    tqdm.write(document)
    rows = {title: {row.label: results[row.run] for row in rows} for title, rows in tables.PAPER.items()}
    rows["Stabilisers"] = {label: results[name] for label, name in tables.STABILISERS.items()}
    return {"ablations": rows, "files": [str(path) for path in files]}


def _check(objective: Objective, processes: ProcessGroup) -> None:
    """Refuse what the tables could not say, or the chart not show. Raises ValueError."""
    published = Objective()
    if fixed := [name for name in VARIED if getattr(objective, name) != getattr(published, name)]:
        raise ValueError(f"--ablations varies {', '.join(fixed)} of distill itself: leave it as published")
    if processes.world_size > 1:
        raise ValueError("--ablations trains small models one after another: start it as one process")
    tables.figure_class()


def _all_results(ablations: Ablations) -> dict[str, dict[str, Any]]:
    """Of all seeds together, by variant and sampler; with a line in the log for each seed's."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in (*SAMPLERS, *(one.name for one in VARIANTS))}
    numbers, total = itertools.count(1), len(SEEDS) * len(results)
    for seed in SEEDS:
        trained = ((one.name, ablations.train_student(one, seed)) for one in VARIANTS)
        for name, result in itertools.chain(ablations.sample_teacher(seed).items(), trained):
            results[name].append(result)
            tqdm.write(f"[{next(numbers)}/{total}] {name}-{seed}: {tables.in_words(result)}")
    return {name: measures.pooled(of_seeds) for name, of_seeds in results.items()}


def read_result(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in a file, if it is of the same run."""
    if not path.is_file():
        return None
    result = tensorfile.read_json(path)
    return result if result.pop("key", None) == key else None


def write_result(path: Path, document: object) -> None:
    """JSON, whole or not at all."""
    with disk.replacing(path) as temporary:
        temporary.write_text(json.dumps(document), encoding="utf-8")
