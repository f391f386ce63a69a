"""Every method of distillation from one teacher, in the world of emoji, for equally many evaluations of a network.

    python -m sprint_core.distill --compare --data sprites.zip --out DIR [--methods scm,dmd2]

and, with `--methods all`, the paper's tables T3 to T6; T1 always, which trains nothing.

Each student starts from the teacher of `--teacher`, or in DIR, which is trained first where it is missing, and trains
until the budget of evaluations is used: one is a forward pass of one sample through a network of the teacher's size;
its backward pass counts as two more, or as one where no weight learns. Each has a folder, DIR/compare/METHOD-SEED; its
result.json says that it has ended.

Every second caption is empty. A caption says nearly all of its image, so that an untrained student paints it well in
one step; what an empty one leaves open becomes a blur of all images then, which tells methods apart.
"""

import functools
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ... import disk, sampler
from ...emoji import captions, judge, scenes
from ...evaluate import contrastive, frechet, scoring
from ...evaluate import emoji as evaluate
from ...models.autoencoder import Autoencoder
from ...models.transformer import SanaTransformer
from ...pipeline import Pipeline
from ...text.encoder import TextEncoder
from ...weights import presets, tensorfile
from .. import recipes
from ..dataset.batch import weights_fingerprint
from ..dataset.resident import ResidentLatents
from ..engine.guard import TrainingFailed
from ..engine.randomness import SampleRandom
from ..recipes import Objective, Schedule
from ..stages.base import Captioned, Watch
from ..stages.rivals import distill_stage
from ..stages.student import WATCHED, DistillStage
from ..stages.teacher import student_of
from . import compare_tables as tables
from . import measures
from .budget import Timed, counted, trained_bytes, within
from .emoji import FLOW_SHIFT, EmojiRun
from .parametrisation import SAMPLERS
from .shapes import scaled_decoder

HALF_OPEN = ", every second caption empty"
UNTRAINED = "untrained"  # the teacher, told of guidance: what all start from
SCM_AND_LADD = "scm+ladd"
METHODS: Mapping[str, Mapping[str, Any]] = {  # what each has other than the recipe
    "scm": {"ladd_weight": 0.0},
    SCM_AND_LADD: {},
    "dmd": {"method": "dmd"},
    "dmd2": {"method": "dmd2"},
    "sid": {"method": "sid"},
    "rcm": {"method": "rcm"},
    "rcm+ladd": {"method": "rcm", "ladd_weight": 0.5},
    "emd": {"method": "emd"},
}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {  # the paper's tables T3 to T6: what each has other than scm+ladd
    "ladd": {"scm_weight": 0.0, "ladd_from": 0},
    "no-guidance": {"guidance": (presets.GUIDANCE,)},
    "ladd-weight-1": {"ladd_weight": 1.0},
    "ladd-weight-0.1": {"ladd_weight": 0.1},
    "max-time-0": {"max_time_share": 0.0},
    "max-time-0.7": {"max_time_share": 0.7},
}
CHOICES = {**METHODS, **ABLATIONS}
ALL = "all"  # of them
WITHOUT_GUIDANCE = "no-guidance"  # whose student embeds none
SEEDS = 3
STEPS = (1, 2, 4)
EVALUATIONS = 300_000
PROMPTS = 120  # held-out, for each seed others
OPEN_IMAGES = 360  # of the empty caption: the Frechet distance needs 320
WARMUP_SHARE = 3  # a run's steps over those in which its tangent, or LADD, is still to begin; with 8 sCM broke


# --- one run -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What all runs share: an emoji run with its DC-AE, data and teacher; the budget, and how many prompts judge."""

    run: EmojiRun
    autoencoder: Autoencoder
    dataset: ResidentLatents
    teacher: Captioned
    evaluations: int
    prompts: int

    @property
    def folder(self) -> Path:
        return self.run.out / "compare"

    def stage(self, method: str) -> tuple[DistillStage, Schedule, int]:
        """What a method trains, for how long, and its evaluations. Warm-ups take the same share of any run."""
        objective = replace(self.run.recipe.objective, **recipes.with_method(CHOICES[method]))
        base = recipes.scheduled(self.run.recipe.stages["distill"], objective)
        shortest = self._made(method, replace(objective, tangent_warmup_steps=0, ladd_from=0))
        begin = within(shortest, self.evaluations, base.batch)[0] // WARMUP_SHARE
        later = {"tangent_warmup_steps": min(begin, objective.tangent_warmup_steps)}
        later["ladd_from"] = min(begin, objective.ladd_from)
        made = self._made(method, replace(objective, **later))
        steps, taken = within(made, self.evaluations, base.batch)
        warmup = min(base.warmup_steps, begin)
        return made, replace(base, steps=steps, warmup_steps=warmup, check_every=max(1, steps // 10)), taken

    def _made(self, method: str, objective: Objective) -> DistillStage:
        embeds = method != WITHOUT_GUIDANCE
        start = functools.partial(student_of, guidance_embed=embeds)
        stage = distill_stage(self.teacher, self.dataset, objective, start=start, watch=self.watch())
        stage.settings["teacher"] = self.key["teacher"]
        if not embeds:
            stage.settings["guidance_embed"] = "False"
        return stage

    def watch(self) -> Watch:
        """Every second caption of held-out ones is empty, as in the data."""
        prompts = captions.prompts(WATCHED, among=self.run.among)
        texts = ["" if i % 2 else prompt.text for i, prompt in enumerate(prompts)]
        return Watch(texts, tuple(self.dataset.latents.shape[1:]), FLOW_SHIFT)

    def train(self, method: str, seed: int) -> dict[str, Any]:
        """Train, unless it is trained, and score, unless it is scored: the result of a method and a seed."""
        stage, schedule, evaluations = self.stage(method)
        folder = self.folder / f"{method}-{seed}"
        trainer = Timed(stage, schedule, folder, seed, self.run.processes, False, self.run.stop)
        key = self.key | trainer.run | {"evaluations": self.evaluations, "prompts": self.prompts}
        if result := read_result(folder / "result.json", key):
            return result
        stopped = False
        try:
            student = trainer.train()
        except TrainingFailed as failure:
            tqdm.write(f"{method}-{seed}: {failure}")
            student, stopped = trainer.average, True
            student.load_state_dict(trainer.guard.load_best(self.run.device))
        result = {
            "steps": schedule.steps,
            "evaluations": evaluations,
            "seconds": trainer.seconds,
            "memory_mib": round(trained_bytes(stage) / 2**20),
            "stopped": stopped,
            "by_steps": self.scores(student.transformer.eval(), seed),
        }
        write_result(folder / "result.json", {"key": key} | result)
        return result

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        """What a score depends on, beside the network that paints."""
        networks = {"teacher": self.teacher, "autoencoder": self.autoencoder}
        prints = {name: weights_fingerprint(network) for name, network in networks.items()}
        return prints | {"latents": self.dataset.fingerprint, "open_images": OPEN_IMAGES}

    def untrained(self, seed: int) -> dict[str, Any]:
        """What every method starts from, scored unless it is: as a result."""
        path = self.folder / f"{UNTRAINED}-{seed}" / "result.json"
        key = self.key | {"prompts": self.prompts}
        if scored := read_result(path, key):
            return scored
        student = student_of(self.teacher.transformer).eval()
        result: dict[str, Any] = dict.fromkeys(("steps", "evaluations", "seconds", "memory_mib"), 0)
        result["stopped"] = False
        result["by_steps"] = self.scores(student, seed)
        write_result(path, {"key": key} | result)
        return result

    def references(self) -> dict[str, Any]:
        """Of other images of the data the Frechet distance; the teacher's images in 20 steps by either sampler.

        The teacher is judged as students are: guided as theirs was, and of the empty caption without guidance.
        """
        guidance = self.run.recipe.objective.teacher_guidance * presets.GUIDANCE
        path, key = self.folder / "references.json", self.key | {"prompts": self.prompts, "guidance": guidance}
        if known := read_result(path, key):
            return known
        prompts, true = captions.prompts(self.prompts, among=self.run.among), self.true_images(0)
        result: dict[str, Any] = {"data": _distance(self.true_images(1), true)}
        images = {}
        for name in SAMPLERS:
            score = evaluate.score(self.teacher_painter(name, guidance), prompts, 0, f"teacher, {name}")
            painted = evaluate.painted(self.teacher_painter(name, 1.0), [""] * len(true), 0, f"teacher, {name}, open")
            result[name] = {"judge": _named(score), "frechet": _distance(painted, true)}
            images[name] = score.images
        flow, rotated = (of_one.short() for of_one in images.values())
        result["largest_difference"] = int((flow - rotated).abs().max()) / 255
        write_result(path, {"key": key} | result)
        return result

    def teacher_painter(self, name: str, guidance: float) -> scoring.Painter:
        """By a row of SAMPLERS."""
        shape, decode = tuple(self.dataset.latents.shape[1:]), scaled_decoder(self.autoencoder)

        @torch.inference_mode()
        def paint(texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            z = sampler.initial_noise(seeds, shape).to(self.run.device)
            return decode(SAMPLERS[name](self.teacher, z, texts, FLOW_SHIFT, scoring.TEACHER_STEPS, guidance))

        return paint

    def scores(self, transformer: SanaTransformer, seed: int) -> dict[str, dict[str, Any]]:
        """By the number of steps: the judge; and of the empty caption the Frechet distance and diversity."""
        prompts = captions.prompts(self.prompts, seed, among=self.run.among)
        true, pipeline = self.true_images(seed), self.pipeline(transformer)
        result = {}
        for steps in STEPS:
            paint = scoring.student(pipeline, steps, presets.GUIDANCE)
            score = evaluate.score(paint, prompts, seed * self.prompts, f"{steps} steps")
            painted = evaluate.painted(paint, [""] * len(true), seed * len(true), f"{steps} steps, open")
            result[str(steps)] = {
                "judge": _named(score),
                "frechet": _distance(painted, true),
                "diversity": diversity(painted, true),
            }
        return result

    def true_images(self, seed: int) -> Tensor:
        """[n, h, w, 3] uint8 of the data, through the DC-AE as all images are; for each seed others."""
        draw = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.dataset), (OPEN_IMAGES,), generator=draw).to(self.dataset.latents.device)
        decode, parts = scaled_decoder(self.autoencoder), self.dataset.latents[chosen].float().split(scoring.BATCH)
        with torch.inference_mode():
            return torch.cat([evaluate.as_bytes(decode(part)) for part in parts])

    def pipeline(self, transformer: SanaTransformer) -> Pipeline:
        encoder = TextEncoder(self.teacher.gemma, self.run.prompts.tokenizer, self.run.prompts.preset)
        return Pipeline(transformer, self.autoencoder, encoder, scenes.CANVAS_PX)


def diversity(painted: Tensor, true: Tensor) -> float:
    """How often two images [n, h, w, 3] uint8 have different grounds, over how often two of the data do."""
    return _different(painted) / _different(true)


def _named(score: evaluate.Score) -> dict[str, Any]:
    """How many images show what their prompt names."""
    names = score.verdicts.names
    return measures.judged(int(names.sum()), len(names))


def _different(images: Tensor) -> float:
    counts = torch.unique(judge.grounds(images), return_counts=True)[1].double()
    return float(1 - (counts / counts.sum()).square().sum())


def _distance(painted: Tensor, true: Tensor) -> dict[str, Any] | None:
    """Frechet distance of images [n, h, w, 3] uint8; None where no network knows this world."""
    try:
        network = contrastive.load().image.features
    except tensorfile.CheckpointError:
        return None
    features = [
        frechet.extract(lambda batch: network(batch.float() / 255.0), images.cpu()) for images in (painted, true)
    ]
    return measures.distance(*features)


def methods(names: str | None) -> list[str]:
    """Those named with commas, METHODS if none, or with ABLATIONS by ALL. Raises ValueError."""
    chosen = list(CHOICES) if names == ALL else names.split(",") if names else list(METHODS)
    if unknown := [name for name in chosen if name not in CHOICES]:
        raise ValueError(f"--methods {','.join(unknown)}: there are {', '.join(CHOICES)}, or {ALL}")
    return chosen


# --- all of it ----------------------------------------------------------------------------------------


def run(run: EmojiRun, chosen: Sequence[str], seeds: int, evaluations: int, prompts: int) -> dict[str, Any]:
    """Every result that is missing, then compare.jsonl, .md and .png in DIR/compare, and the JSON document.

    Raises ValueError for several processes, and without matplotlib.
    """
    if run.processes.world_size > 1:
        raise ValueError("--compare trains small models one after another: start it as one process")
    tables.figure_class()
    drawn = run.draw_scenes()
    gemma, autoencoder = run.train_text_encoder(drawn), run.train_autoencoder()
    dataset = run.dataset(run.encode_dataset(autoencoder, drawn), drawn)
    dataset.captions = dataset.captions.without(torch.arange(len(dataset), device=run.device) % 2 == 1)
    dataset.fingerprint += HALF_OPEN  # so that no run of whole captions is taken for one of these
    teacher = run.train_teacher(gemma, dataset)
    comparison = Comparison(run, autoencoder, dataset, teacher, evaluations, prompts)
    total = len(chosen) * seeds
    tqdm.write(
        f"{total} runs of {evaluations} evaluations: about {total * _hours(comparison):.1f} h without the judging"
    )
    results: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in (UNTRAINED, *chosen)}
    results[UNTRAINED] = {seed: comparison.untrained(seed) for seed in range(seeds)}
    for number, (seed, method) in enumerate(itertools.product(range(seeds), chosen), 1):
        result = results[method][seed] = comparison.train(method, seed)
        tqdm.write(f"[{number}/{total}] {method}-{seed}: {tables.in_words(result)}")
    return _written(comparison, results)


def _hours(comparison: Comparison) -> float:
    """Of one run, by a backward and forward pass of the teacher's."""
    recipe = comparison.run.recipe
    stage, batch = comparison._made(SCM_AND_LADD, recipe.objective), recipe.stages["distill"].batch
    phase = stage.phases(0)[0].module
    started = time.perf_counter()
    with counted(stage) as used:
        stage.loss(phase, 0, SampleRandom(0, 0, phase, range(batch)))[0].backward()
    for module in stage.modules.values():
        module.zero_grad(set_to_none=True)
    return comparison.evaluations * (time.perf_counter() - started) / used.count / 3600


def _written(comparison: Comparison, results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    folder = comparison.folder
    files = {kind: folder / f"compare.{kind}" for kind in ("jsonl", "md", "png")}
    lines = list(itertools.chain.from_iterable(tables.lines(method, by_seed) for method, by_seed in results.items()))
    judged = f"{comparison.prompts} held-out prompts and {OPEN_IMAGES} images of the empty caption"
    counts = f"{comparison.evaluations:,} evaluations; {judged}"
    document = tables.report(results, comparison.references(), counts)
    for kind, text in (("jsonl", "\n".join(map(json.dumps, lines)) + "\n"), ("md", document)):
        with disk.replacing(files[kind]) as temporary:
            temporary.write_text(text, encoding="utf-8")
    tables.chart(results, files["png"])
    tqdm.write(document)
    return {"compare": lines, "files": [str(path) for path in files.values()]}


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
