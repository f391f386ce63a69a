"""Section train: do the distillation's own commands run on this device, as on the CPU, and how fast?"""

import dataclasses
import functools
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import PeakMemory, wait
from benchmarks.training import Noise
from sprint_core.distill import __main__ as distill
from sprint_core.distill import recipes
from sprint_core.distill.dataset import scenes
from sprint_core.distill.dataset.batch import Batch, Dataset
from sprint_core.distill.dataset.resident import ResidentLatents
from sprint_core.distill.dataset.scene_latents import SceneLatents
from sprint_core.distill.dataset.tokenized import tokenize
from sprint_core.distill.engine.processes import ProcessGroup
from sprint_core.distill.engine.randomness import SampleRandom, initialise
from sprint_core.distill.engine.stage import Stage
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.runs import shapes
from sprint_core.distill.stages.autoencoder import SeededImages, WholeStage
from sprint_core.distill.stages.base import Captioned, Embedded
from sprint_core.distill.stages.captioning import CaptioningModel, CaptioningStage
from sprint_core.distill.stages.control import ControlStage
from sprint_core.distill.stages.student import DistillStage
from sprint_core.distill.stages.teacher import TeacherStage, student_of
from sprint_core.models.autoencoder import Autoencoder
from sprint_core.models.transformer import SanaTransformer

from .timing import Row, attempt, most_common, rounded, synchronisations
from .world import World

POOL = 8  # scenes of the runs
SCENES = 256  # that throughput draws from, each drawn once before it is timed
COMPARED = 4  # samples
RECORDED_TURNS = 3  # of student and critic
RECIPE = recipes.RECIPES["shapes"]
LATE = RECIPE.objective.ladd_from  # a step at which all losses take part; the next one trains the critic
STAGES = ("captioning", "features", "autoencoder", "teacher", "all")  # each after those that it needs


def train(world: World, row: Row) -> None:
    """Agreement with the CPU, then the commands, then throughput."""
    row["agreement"] = {}
    for name in _BUILDERS:
        row["agreement"][name] = attempt(functools.partial(_agreement, name, world.device))
    row["recorded"] = {
        name: attempt(functools.partial(_recorded, name, world.device)) for name in ("teacher", "student")
    }
    row["resumed"] = attempt(functools.partial(_resumed, world.device))
    row["commands"] = {}
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
        for name, command in _commands(world, Path(folder)).items():
            row["commands"][name] = attempt(functools.partial(_command, command))
    row["throughput"] = {}
    precisions, batches = (("fp32",), (4,)) if world.tiny else (("bf16", "fp32"), (256, 1024))
    for batch, precision, name in itertools.product(batches, precisions, ("teacher", "student")):
        measure = functools.partial(_throughput, name, world.device, precision, batch, _resident)
        row["throughput"][f"{name}_{precision}_{batch}"] = attempt(measure)
    measure = functools.partial(_throughput, "student", world.device, precisions[0], batches[0], _worded)
    row["throughput"][f"student_{precisions[0]}_{batches[0]}_with_captions_as_texts"] = attempt(measure)


# --- the commands ---------------------------------------------------------------------------------------


class _Errors(logging.Handler):
    """Keeps what a command says went wrong."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _settings(recipe: str, device: torch.device) -> list[str]:
    """Two steps of two samples a stage, the second of which trains the critic."""
    stages = recipes.RECIPES[recipe].stages
    last = list(stages)[-1]
    settings = [f"{stage}.{key}=2" for stage in stages for key in ("steps", "batch")] + [f"{last}.ladd_from=1"]
    if device.type == "cpu":  # bf16 is slow on some
        settings += [f"{stage}.precision=fp32" for stage in stages]
    return [f"--set={setting}" for setting in settings]


def _commands(world: World, folder: Path) -> dict[str, list[str]]:
    """`python -m sprint_core.distill` for every stage, the whole again, which resumes it, and a ControlNet."""
    chosen = ["--device", str(world.device), "--pool", str(POOL)]
    model = ["--recipe", "shapes", "--out", str(folder / "shapes"), *chosen, *_settings("shapes", world.device)]
    control = ["--recipe", "shapes-control", "--out", str(folder / "control"), *chosen]
    control += _settings("shapes-control", world.device)
    trained = folder / "shapes" / "sana_sprint_tiny.safetensors"
    control += [word for option in ("--student", "--vae", "--text-encoder") for word in (option, str(trained))]
    stages = STAGES[-1:] if world.tiny else STAGES
    return {stage: [*model, "--stage", stage] for stage in stages} | {"again": model, "control": control}


def _command(arguments: Sequence[str]) -> Row:
    errors, started = _Errors(), time.perf_counter()
    logging.getLogger().addHandler(errors)
    try:
        status = distill.main(arguments)
    finally:
        logging.getLogger().removeHandler(errors)
    return {"status": status, "sec": rounded(time.perf_counter() - started)} | (
        {"error": errors.lines} if errors.lines else {}
    )


# --- the same numbers as on the CPU ---------------------------------------------------------------------


class _Hinted(Noise):
    """With the hints of a ControlNet's dataset."""

    def batch(self, random: SampleRandom) -> Batch:
        batch = super().batch(random)
        return dataclasses.replace(batch, hints=random.normal(*batch.latents.shape[1:]))


def _transformer(guidance_embed: bool) -> SanaTransformer:
    config = dataclasses.replace(recipes.SHAPES_TRANSFORMER, guidance_embed=guidance_embed)
    transformer = SanaTransformer(config)
    initialise(transformer, 0)
    return transformer


def _embedded(guidance_embed: bool = False) -> Embedded:
    return Embedded(_transformer(guidance_embed), torch.zeros(1, recipes.SHAPES_TRANSFORMER.caption_width))


def _autoencoder() -> Stage:
    model = Autoencoder(recipes.SHAPES_AUTOENCODER)
    initialise(model, 0)
    return WholeStage(model, SeededImages(scenes.images, POOL), steps=1)


def _captioning() -> Stage:
    model = CaptioningModel(shapes.fresh_gemma(0))
    initialise(model.heads, 0)
    return CaptioningStage(model, shapes.prompts(), POOL)


_BUILDERS: dict[str, Callable[[], Stage]] = {
    "autoencoder": _autoencoder,
    "captioning": _captioning,
    "teacher": lambda: TeacherStage(_embedded(), Noise(), recipes.SHAPES_FLOW_SHIFT),
    "student": lambda: DistillStage(_embedded(), Noise(), RECIPE.objective),
    "critic": lambda: DistillStage(_embedded(), Noise(), RECIPE.objective),
    "control": lambda: ControlStage(_embedded(guidance_embed=True), _Hinted(), RECIPE.objective),
}


def _numbers(name: str, stage: Stage, device: torch.device) -> dict[str, float]:
    """Loss, metrics and gradient norm of one batch in fp32."""
    for module in stage.modules.values():
        module.to(device)
    if teacher := getattr(stage, "teacher", None):
        teacher.to(device)
    phase = {"control": "student"}.get(name, name)
    step = LATE + (phase == "critic")
    loss, metrics = stage.loss(phase, step, SampleRandom(0, step, phase, range(COMPARED)))
    loss.backward()
    gradients = [p.grad.flatten() for p in stage.modules[phase].parameters() if p.grad is not None]
    numbers = {"loss": loss.detach(), **metrics, "grad_norm": torch.cat(gradients).norm()}
    return {key: float(value) for key, value in numbers.items()}


def _agreement(name: str, device: torch.device) -> Row:
    """The device's numbers, and each one's relative difference from the CPU's."""
    exact = _numbers(name, _BUILDERS[name](), torch.device("cpu"))
    measured = _numbers(name, _BUILDERS[name](), device)
    return {
        key: {"is": rounded(value), "off": rounded(abs(value - exact[key]) / max(abs(exact[key]), 1e-9))}
        for key, value in measured.items()
    }


def _recorded(name: str, device: torch.device) -> Row:
    """Do losses recorded as CUDA graphs teach what launched ones do? The largest difference of any weight."""
    schedule = dataclasses.replace(RECIPE.stages["distill"], batch=COMPARED)
    ends, recorded = [], 0
    for launched in (False, True):
        with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
            processes = ProcessGroup(device, draws_on_device=True)
            trainer = Trainer(_whole(name, device, _resident(device)), schedule, Path(folder), processes=processes)
            trainer.graphs = None if launched else trainer.graphs
            trainer.step = LATE
            _advance(trainer, 2 * RECORDED_TURNS)
            recorded += len(trainer.graphs or ())
            ends.append(torch.cat([p.detach().flatten() for p in trainer.average.parameters()]))
    off, largest = (ends[0] - ends[1]).abs().max(), ends[1].abs().max()
    return {"off": rounded(float(off)), "largest": rounded(float(largest)), "graphs": recorded}


def _resumed(device: torch.device) -> Row:
    """A stage goes on from its file, and where its optimizer keeps what."""
    schedule = recipes.Schedule(steps=4, batch=2, lr=1e-3)
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
        make = _BUILDERS["teacher"]
        Trainer(make(), schedule, Path(folder), processes=ProcessGroup(device)).train(until=2)
        trainer = Trainer(make(), schedule, Path(folder), processes=ProcessGroup(device))
        state = next(iter(trainer.optimizers["teacher"].state.values()))
        places = {key: str(value.device) for key, value in state.items()}
        step = trainer.step
        trainer.train()
    return {"from_step": step, "to_step": trainer.step, "optimizer": places}


# --- throughput -----------------------------------------------------------------------------------------


def _latents() -> torch.Tensor:
    """Noise, as good as any."""
    return torch.randn(SCENES, 32, 8, 8, generator=torch.Generator().manual_seed(0)).half()


def _worded(device: torch.device) -> Dataset:
    """In memory, with captions that are worded anew for every batch."""
    return SceneLatents(_latents(), "noise")


def _resident(device: torch.device) -> Dataset:
    """On the device, with captions as tokens."""
    texts = scenes.captions(range(SCENES), SampleRandom(0, 0, "captions", range(SCENES)))
    return ResidentLatents(_latents(), tokenize(shapes.prompts(), texts), "noise", device=device)


def _whole(name: str, device: torch.device, dataset: Dataset) -> Stage:
    """The small model's own stage: captions are encoded by its Gemma."""
    teacher = Captioned(_transformer(False), shapes.fresh_gemma(0), shapes.prompts()).to(device)
    if name == "teacher":
        return TeacherStage(teacher, dataset, recipes.SHAPES_FLOW_SHIFT)
    return DistillStage(teacher, dataset, RECIPE.objective, start=student_of)


def _throughput(
    name: str, device: torch.device, precision: str, batch: int, dataset: Callable[[torch.device], Dataset]
) -> Row:
    """Samples a second of whole optimizer steps, and what the batch and its captions alone take."""
    schedule = dataclasses.replace(
        RECIPE.stages["teacher" if name == "teacher" else "distill"], batch=batch, precision=precision
    )
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
        processes = ProcessGroup(device, draws_on_device=True)  # as always on a GPU
        trainer = Trainer(_whole(name, device, dataset(device)), schedule, Path(folder), processes=processes)
        trainer.step = LATE
        steps, memory = (2 if name == "student" else 1), PeakMemory(device)  # student and critic take turns
        _advance(trainer, steps)
        memory.start()
        sec = _advance(trainer, 2 * steps) / (2 * steps)
        with synchronisations(device) as waits:
            _advance(trainer, steps)
    measured = {"samples_per_sec": rounded(batch / sec), "step_ms": rounded(1e3 * sec), "peak_mib": memory.used()}
    measured |= _data_ms(trainer, batch)
    return measured | {"waits_a_step": sum(waits.values()) / steps, "waits_by_line": most_common(waits)}


def _advance(trainer: Trainer, steps: int) -> float:
    """Seconds of so many steps, as `Trainer.train` makes them."""
    wait(trainer.processes.device)
    started = time.perf_counter()
    for _ in range(steps):
        trainer._one_step()
        trainer.step += 1
    wait(trainer.processes.device)
    return time.perf_counter() - started


def _data_ms(trainer: Trainer, batch: int) -> Row:
    """Of drawing a batch, and of encoding its captions."""
    stage: Any = trainer.stage
    started = time.perf_counter()
    drawn = stage.dataset.batch(trainer.processes.random(0, 0, "data", range(batch)))
    wait(stage.device)
    words = time.perf_counter()
    model = stage.model if isinstance(stage, TeacherStage) else stage.teacher
    model.encode(drawn.captions)
    wait(stage.device)
    encoded = time.perf_counter()
    return {"batch_ms": rounded(1e3 * (words - started)), "captions_ms": rounded(1e3 * (encoded - words))}
