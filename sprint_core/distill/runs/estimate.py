"""What a stage will take, before it starts: its own code, run on tensors without data.

Parameters, floating-point operations and what the backward pass keeps are counted on the meta device, in
fp32 but for a teacher that is held in bf16: autocast keeps less. Time is operations over the speed of a large matrix
product on this machine, which real steps do not reach.
"""

import collections
import dataclasses
import functools
import itertools
import operator
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ... import messages
from ...evaluate.contrastive import ContrastiveNetwork
from ...evaluate.frechet import INPUT_PX, FeatureNetwork
from ...latent import DOWNSCALE, LATENT_CHANNELS
from ...models.autoencoder import Autoencoder
from ...models.gemma import Gemma, GemmaConfig
from ...models.transformer import SanaTransformer
from ...weights import checkpoint, presets
from .. import recipes
from ..dataset import emoji_scenes, emoji_text
from ..dataset.batch import Batch
from ..engine import sharding
from ..engine.phase import Phase as TrainedPhase
from ..engine.processes import SINGLE_PROCESS, ProcessGroup
from ..engine.randomness import SampleRandom
from ..engine.stage import Stage
from ..recipes import Recipe, Schedule
from ..stages import autoencoder, features
from ..stages.base import Embedded
from ..stages.captioning import CaptioningModel, CaptioningStage, TokenCaptioningStage
from ..stages.contrastive import ContrastiveStage
from ..stages.control import ControlStage
from ..stages.rivals import distill_stage
from ..stages.student import DistillStage
from ..stages.teacher import TeacherStage
from . import shapes

log = messages.logger(__name__)

GIB = 2**30
FIRST_MATMUL_SIZE = 128
MATMUL_SIZE = 2048
MATMUL_RUNS = 5
MATMUL_LIMIT_SEC = 0.1  # of one product, after which larger ones are not tried
FP32_BYTES = 4
TRANSFORMER_STAGES = ("teacher", "distill", "control")
CAPTION_TOKENS = 300  # the longest; those of small models are counted as so many, too


@dataclass(frozen=True)
class Phase:
    """One phase of a stage, for one micro-batch."""

    name: str
    flops: int
    saved_bytes: int  # kept for the backward pass


@dataclass(frozen=True)
class Estimate:
    """A stage on one process of its group."""

    stage: str
    trained: int  # parameters
    parts: Mapping[str, int]  # bytes of weights, gradients, moments and the rest, by their names
    phases: tuple[Phase, ...]
    per_step: float  # floating-point operations of one process, mean over the steps of the run
    steps: int
    checkpoint_bytes: int  # about those of the state file: one for all processes
    average_bytes: int  # of a file of the moving average
    keeps_best: bool  # the average with the lowest error, too

    @property
    def state_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + max(phase.saved_bytes for phase in self.phases)

    @property
    def disk_bytes(self) -> int:
        """About, without the data and what is exported in the end."""
        return 2 * self.checkpoint_bytes + self.keeps_best * self.average_bytes

    def text(self, flops_per_sec: float) -> str:
        """For people."""
        seconds = self.per_step / flops_per_sec
        sizes = {**self.parts, "activations": self.memory_bytes - self.state_bytes}
        best = ", and the best average" * self.keeps_best
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items() if size)
        return (
            f"{self.stage}: {self.trained / 1e6:.1f} M parameters trained; "
            f"memory {self.memory_bytes / GIB:.1f} GiB ({parts}); "
            f"disk {self.disk_bytes / GIB:.1f} GiB (its state twice, while it is written{best}), "
            f"{self.average_bytes / GIB:.1f} more for each average that --keep-every keeps; "
            f"{self.per_step / 1e12:.3g} TFLOP and at least {seconds:.2g} s a step, {self.steps} steps; "
            f"{_duration(self.steps * seconds)} at that rate"
        )


def _duration(seconds: float) -> str:
    """For people: '40 s', '12 min', '3.5 h'."""
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 59.5 * 60 else f"{seconds / 3600:.1f} h"


# --- counting -------------------------------------------------------------------------------------------


def estimate(
    stage: Stage, frozen: Sequence[nn.Module], schedule: Schedule, processes: ProcessGroup = SINGLE_PROCESS
) -> Estimate:
    """Of a stage that was built on the meta device; frozen: the networks it reads besides its own.

    Each phase is counted as at the end of the run, where it is largest.
    """
    share = len(processes.share(schedule.batch))
    samples = min(schedule.micro_batch or share, share)
    own, others = _parameters(stage.modules.values()), _parameters(frozen)
    learning = {phase.module for phase in stage.plan}
    trained = sum(p.numel() for name in learning for p in stage.modules[name].parameters() if p.requires_grad)
    moments = 2 if schedule.optimizer == "adamw" else 1  # CAME's second one is factored
    whole, parts = collections.Counter[str](), collections.Counter[str]()
    for name, module in stage.modules.items():
        sizes = _sizes(module, moments * (name in learning), averaged=name == stage.averaged)
        whole.update(sizes)
        shared = processes.shards and sharding.is_shared(module)
        parts.update(_shared(sizes, processes.world_size) if shared else sizes)
    saved = whole["weights"] + whole["moments"] + whole["moving average"]
    average = whole["moving average"]
    best = isinstance(stage, DistillStage) and schedule.check_every > 0
    parts["frozen networks"] = sum(p.nbytes for p in others)
    plan = sorted(stage.plan, key=operator.attrgetter("module"))  # counted last: a phase freezes what it does not train
    phases = [_phase(stage, phase, schedule.steps, samples, own + others) for phase in plan]
    flops = sum(phase.count(schedule.steps) * one.flops for phase, one in zip(plan, phases, strict=True))
    per_step = flops * (share / samples) / schedule.steps
    return Estimate(stage.name, trained, parts, tuple(phases), per_step, schedule.steps, saved, average, best)


def _sizes(module: nn.Module, moments: int, averaged: bool) -> dict[str, int]:
    """Bytes of a module's weights and average; where it learns, with so many moments, of these and its gradients."""
    weights = sum(p.nbytes for p in module.parameters())
    trained = FP32_BYTES * sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {
        "weights": weights,
        "gradients": trained * bool(moments),
        "moments": moments * trained,
        "moving average": weights * averaged,
    }


def _shared(parts: Mapping[str, int], processes: int) -> dict[str, int]:
    """A process's part of them, and all weights for a moment, as forward-mode differentiation takes them."""
    return {name: size // processes for name, size in parts.items()} | {"gathered weights": parts["weights"]}


def _parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters()]


def _phase(stage: Stage, phase: TrainedPhase, step: int, samples: int, weights: Sequence[Tensor]) -> Phase:
    """The mean over as many of its updates as differ, the first from that step on; of what is kept, the most."""
    steps = itertools.islice(phase.steps_from(step), phase.kinds)
    updates = [_update(stage, phase.module, step, samples, weights) for step in steps]
    mean = sum(one.flops for one in updates) // len(updates)
    return Phase(phase.module, mean, max(one.saved_bytes for one in updates))


def _update(stage: Stage, name: str, step: int, samples: int, weights: Sequence[Tensor]) -> Phase:
    """Count one loss and its gradient; the weights are kept anyway."""
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()  # what belongs to no graph any more is gone from it

    def keep(tensor: Tensor) -> _Saved:
        saved.add(one := _Saved(tensor))
        return one

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
            loss, _ = stage.loss(name, step, SampleRandom(0, step, name, range(samples)))
        storages = {s._cdata: s.nbytes() for s in (one.tensor.untyped_storage() for one in saved)}
        for weight in weights:
            storages.pop(weight.untyped_storage()._cdata, None)
        loss.backward()
    return Phase(name, counter.get_total_flops(), sum(storages.values()))


class _Saved:
    """A tensor that a graph keeps for its backward pass, as long as it does."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()  # or the graph would own itself through it


# --- the stages of a recipe on the meta device ----------------------------------------------------------


class MetaDataset:
    """Latents and caption embeddings that have a shape only."""

    fingerprint = "meta"

    def __init__(self, latent: Sequence[int], caption: Sequence[int], hints: bool = False):
        self.latent = tuple(latent)
        self.caption = tuple(caption)
        self.hints = hints

    def batch(self, random: SampleRandom) -> Batch:
        latents = torch.empty(len(random), *self.latent, device="meta")
        captions = [torch.empty(self.caption, device="meta") for _ in range(len(random))]
        return Batch(latents, captions, latents if self.hints else None)


def of_recipe(
    recipe: Recipe, processes: ProcessGroup = SINGLE_PROCESS, trunk: checkpoint.Weights | None = None
) -> list[Estimate]:
    """Every stage of a recipe. trunk: of a ControlNet's; without it, the one that the recipe is for."""
    estimates = []
    for name, schedule in recipe.stages.items():
        if name in TRANSFORMER_STAGES:
            stage = _transformer_stage(name, recipe, trunk)
        else:
            stage = _emoji_stage(name) if recipe.world == "emoji" else _shapes_stage(name)
        estimates.append(estimate(*stage, schedule, processes))
    return estimates


def _transformer_stage(
    name: str, recipe: Recipe, trunk: checkpoint.Weights | None
) -> tuple[Stage, Sequence[nn.Module]]:
    """A stage that trains a transformer or a ControlNet, and what is frozen in it."""
    control = name == "control"
    small = recipes.EMOJI_TRANSFORMER if recipe.world == "emoji" else recipes.SHAPES_TRANSFORMER
    config, size_px = dataclasses.replace(small, guidance_embed=control), recipes.SHAPES_PX
    if trunk is not None:
        config, size_px = trunk.config, trunk.settings["size_px"]
    elif recipe.preset:
        preset = presets.PRESETS[recipe.preset if control else f"{recipe.preset}-teacher"]
        config, size_px = preset.transformer, preset.size_px
    side = size_px // DOWNSCALE
    dataset = MetaDataset((LATENT_CHANNELS, side, side), (CAPTION_TOKENS, config.caption_width), hints=control)
    model = Embedded(SanaTransformer(config, device="meta"), torch.empty(1, config.caption_width, device="meta"))
    checkpointing = recipe.stages[name].activation_checkpointing
    if name == "teacher":
        return TeacherStage(model, dataset, activation_checkpointing=checkpointing), ()
    kind = ControlStage if control else distill_stage
    stage = kind(model, dataset, recipe.objective, activation_checkpointing=checkpointing)
    return stage, [stage.teacher]


def _images(seeds: Sequence[int]) -> Tensor:
    return torch.empty(len(seeds), 3, recipes.SHAPES_PX, recipes.SHAPES_PX, device="meta")


def _emoji_stage(name: str) -> tuple[Stage, Sequence[nn.Module]]:
    """Another of the stages of a model of emoji, and what is frozen in it."""
    tokens = torch.empty(1, emoji_text.MAX_TOKENS, dtype=torch.long, device="meta")
    if name == "features":
        model = ContrastiveNetwork(recipes.EMOJI_TEXT.vocab).to("meta")
        thumbnails = torch.empty(1, 3, INPUT_PX, INPUT_PX, dtype=torch.uint8, device="meta")
        return ContrastiveStage(model, thumbnails, tokens, ""), ()
    if name == "captioning":
        model = CaptioningModel(Gemma(recipes.EMOJI_TEXT, device="meta"), emoji_scenes.QUESTIONS).to("meta")
        labels = torch.empty(1, len(emoji_scenes.QUESTIONS), dtype=torch.long, device="meta")
        return TokenCaptioningStage(model, tokens, labels, ""), ()
    vae = Autoencoder(recipes.EMOJI_AUTOENCODER, device="meta")
    if name == "autoencoder":
        return autoencoder.WholeStage(vae, autoencoder.SeededImages(_images, 1), steps=0), ()
    critic = autoencoder.PatchCritic().to("meta")
    return autoencoder.DecoderStage(vae, autoencoder.SeededImages(_images, 1), critic), [vae.encoder]


def _shapes_stage(name: str) -> tuple[Stage, Sequence[nn.Module]]:
    """The same of a model of plain shapes."""
    if name == "features":
        return features.FeatureStage(FeatureNetwork(features.QUESTIONS).to("meta"), pool=1), ()
    if name == "captioning":
        model = CaptioningModel(Gemma(recipes.SHAPES_TEXT, device="meta")).to("meta")
        return CaptioningStage(model, shapes.prompts(), pool=1), ()
    vae = Autoencoder(recipes.SHAPES_AUTOENCODER, device="meta")
    if name == "autoencoder":
        return autoencoder.WholeStage(vae, autoencoder.SeededImages(_images, 1), steps=0), ()
    return autoencoder.DecoderStage(vae, autoencoder.SeededImages(_images, 1)), [vae.encoder]


def with_text_encoder(estimates: Iterable[Estimate], config: GemmaConfig, dtype: torch.dtype) -> list[Estimate]:
    """The same where captions are encoded batch by batch, so that the text encoder stays in memory."""
    more = sum(p.numel() for p in Gemma(config, device="meta").parameters()) * dtype.itemsize
    return [dataclasses.replace(one, parts={**one.parts, "text encoder": more}) for one in estimates]


# --- this machine ---------------------------------------------------------------------------------------


def check_memory(estimates: Sequence[Estimate], processes: ProcessGroup) -> None:
    """Refuse a run whose state cannot fit, warn of one whose activations may not. Raises ValueError."""
    free = free_bytes(processes.device)
    for one in estimates:
        needs = f"{one.stage}: {processes.device} has {free / GIB:.1f} GiB free; it needs"
        if one.state_bytes > free:
            raise ValueError(
                f"{needs} {one.state_bytes / GIB:.1f} GiB for weights, gradients and averages alone; choose a device "
                "with more, or a smaller recipe"
            )
        if one.memory_bytes > free:
            advice = f"fewer samples at a time help: --set {one.stage}.micro_batch=N"
            log.warning("%s up to %.1f GiB; %s", needs, one.memory_bytes / GIB, advice)


@functools.cache
def matmul_speed(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a large matrix product, the best of some runs.

    Sizes double until one takes long: a CPU without bf16 instructions would take minutes for the largest.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = min(FIRST_MATMUL_SIZE, MATMUL_SIZE)
    while True:
        seconds = min(_matmul_sec(size, device, dtype) for _ in range(MATMUL_RUNS))
        if size >= MATMUL_SIZE or seconds > MATMUL_LIMIT_SEC:
            return 2 * size**3 / seconds
        size *= 2


def _matmul_sec(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
    started = time.perf_counter()
    float((a @ a)[0, 0])  # waits for the device
    return time.perf_counter() - started


def free_bytes(device: torch.device) -> int:
    """Memory that is free now; a CPU's includes what the system caches."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**63  # unknown: no reason to refuse
