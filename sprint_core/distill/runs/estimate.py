"""What a stage will take, before it starts: its own code, run on tensors without data.

Parameters, floating-point operations and what the backward pass keeps are counted on the meta device, in
fp32: autocast keeps less. Time is operations over the speed of a large matrix product on this machine, which real
steps do not reach.
"""

import dataclasses
import functools
import logging
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...evaluate.frechet import FeatureNetwork
from ...latent import DOWNSCALE, LATENT_CHANNELS
from ...models.autoencoder import Autoencoder
from ...models.gemma import Gemma
from ...models.transformer import SanaTransformer
from ...weights import checkpoint, presets
from .. import recipes
from ..dataset.batch import Batch
from ..engine.processes import SINGLE_PROCESS, ProcessGroup
from ..engine.randomness import SampleRandom
from ..engine.stage import Stage
from ..recipes import Recipe, Schedule
from ..stages import autoencoder, features
from ..stages.base import Embedded
from ..stages.captioning import CaptioningModel, CaptioningStage
from ..stages.control import ControlStage
from ..stages.student import DistillStage
from ..stages.teacher import TeacherStage
from . import demo

log = logging.getLogger(__name__)

GIB = 2**30
MATMUL_SIZE, MATMUL_RUNS = 2048, 5
FP32_BYTES = 4
CAPTION_TOKENS = 300  # the longest; the demo's few are counted as so many, too


@dataclass(frozen=True)
class Phase:
    """One phase of a stage, for one micro_batch of samples."""

    name: str
    samples: int
    flops: int
    saved_bytes: int  # kept for the backward pass


@dataclass(frozen=True)
class Estimate:
    """A stage on one process of `world`."""

    stage: str
    trained: int  # parameters
    state_bytes: int  # weights, gradients, moments, moving average, frozen networks
    phases: tuple[Phase, ...]
    per_step: float  # floating-point operations of one process, mean over the steps of the run
    steps: int

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + max(phase.saved_bytes for phase in self.phases)

    def text(self, flops_per_sec: float) -> str:
        """For people."""
        parts = [f"{self.stage}: {self.trained / 1e6:.1f} M parameters trained"]
        parts.append(f"memory {self.memory_bytes / GIB:.1f} GiB ({self.state_bytes / GIB:.1f} GiB without activations)")
        seconds = self.per_step / flops_per_sec
        parts.append(f"{self.per_step / 1e12:.3g} TFLOP and at least {seconds:.2g} s a step, {self.steps} steps")
        parts.append(f"{_duration(self.steps * seconds)} at that rate")
        return "; ".join(parts)


def _duration(seconds: float) -> str:
    """For people: '40 s', '12 min', '3.5 h'."""
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 59.5 * 60 else f"{seconds / 3600:.1f} h"


class MetaData:
    """Latents and caption embeddings that have a shape only."""

    fingerprint = "meta"

    def __init__(self, latent: Sequence[int], caption: Sequence[int], hints: bool = False):
        self.latent, self.caption, self.hints = tuple(latent), tuple(caption), hints

    def batch(self, random: SampleRandom) -> Batch:
        b = len(random)
        latents = torch.empty(b, *self.latent, device="meta")
        captions = [torch.empty(self.caption, device="meta") for _ in range(b)]
        return Batch(latents, captions, latents if self.hints else None)


def estimate(
    stage: Stage, frozen: Sequence[nn.Module], schedule: Schedule, processes: ProcessGroup = SINGLE_PROCESS
) -> Estimate:
    """Of a stage that was built on the meta device; frozen: the networks it reads besides its own.

    Each phase is counted as at the end of the run, where it is largest.
    """
    share = len(processes.share(schedule.batch))
    samples = min(schedule.micro_batch or share, share)
    end = schedule.steps  # where all that joins later takes part
    names = sorted({name for step in range(end, end + 4) for name in stage.phases(step)})
    weights = [p for module in (*stage.modules.values(), *frozen) for p in module.parameters()]
    phases = tuple(_phase(stage, name, end, samples, weights) for name in names)
    own = [p for module in stage.modules.values() for p in module.parameters()]
    trained = sum(p.numel() for p in own if p.requires_grad)
    extra = 3 if schedule.optimizer == "adamw" else 2  # gradients, moments (CAME's second one is factored)
    kept = [*own, *stage.modules[stage.averaged].parameters(), *(p for module in frozen for p in module.parameters())]
    state = extra * trained + sum(p.numel() for p in kept)
    flops = {phase.name: phase.flops for phase in phases}
    whole = sum(flops[name] for step in range(schedule.steps) for name in stage.phases(step))
    per_step = whole * (share / samples) / schedule.steps
    return Estimate(stage.name, trained, FP32_BYTES * state, phases, per_step, schedule.steps)


def _phase(stage: Stage, name: str, step: int, samples: int, weights: Sequence[Tensor]) -> Phase:
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
    return Phase(name, samples, counter.get_total_flops(), sum(storages.values()))


class _Saved:
    """A tensor that a graph keeps for its backward pass, as long as it does."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()  # or the graph would own itself through it


def of_recipe(
    recipe: Recipe, processes: ProcessGroup = SINGLE_PROCESS, trunk: checkpoint.Weights | None = None
) -> list[Estimate]:
    """Every stage of a recipe. trunk: of a ControlNet's; without it, the one that the recipe is for."""
    if recipe.is_control:
        stages = _control_stages(recipe, trunk)
    else:
        stages = _transformer_stages(recipe) | ({} if recipe.preset else _demo_stages())
    return [estimate(*stages[name], schedule, processes) for name, schedule in recipe.stages.items()]


def _transformer_stages(recipe: Recipe) -> dict[str, tuple[Stage, Sequence[nn.Module]]]:
    """The stages that train a transformer, on the meta device, with what is frozen in them."""
    preset = presets.PRESETS[f"{recipe.preset}-teacher"] if recipe.preset else None
    config = preset.transformer if preset else dataclasses.replace(recipes.DEMO_TRANSFORMER, guidance_embed=False)
    side = (preset.size_px if preset else recipes.DEMO_PX) // DOWNSCALE
    data = MetaData((LATENT_CHANNELS, side, side), (CAPTION_TOKENS, config.caption_width))
    null = torch.empty(1, config.caption_width, device="meta")
    teachers = [Embedded(SanaTransformer(config, device="meta"), null) for _ in range(2)]
    again = {name: recipe.stages[name].activation_checkpointing for name in ("teacher", "distill")}
    distill = DistillStage(teachers[1], data, recipe.objective, activation_checkpointing=again["distill"])
    teacher = TeacherStage(teachers[0], data, activation_checkpointing=again["teacher"])
    return {"teacher": (teacher, ()), "distill": (distill, [teachers[1]])}


def _control_stages(recipe: Recipe, trunk: checkpoint.Weights | None) -> dict[str, tuple[Stage, Sequence[nn.Module]]]:
    config, size_px = recipes.DEMO_TRANSFORMER, recipes.DEMO_PX
    if trunk is not None:
        config, size_px = trunk.config, trunk.settings["size_px"]
    elif recipe.preset:
        config, size_px = presets.PRESETS[recipe.preset].transformer, presets.PRESETS[recipe.preset].size_px
    side = size_px // DOWNSCALE
    data = MetaData((LATENT_CHANNELS, side, side), (CAPTION_TOKENS, config.caption_width), hints=True)
    model = Embedded(SanaTransformer(config, device="meta"), torch.empty(1, config.caption_width, device="meta"))
    checkpointing = recipe.stages["control"].activation_checkpointing
    return {"control": (ControlStage(model, data, recipe.objective, activation_checkpointing=checkpointing), [model])}


def _demo_stages() -> dict[str, tuple[Stage, Sequence[nn.Module]]]:
    """The demo's other stages."""

    def images(seeds: Sequence[int]) -> Tensor:
        return torch.empty(len(seeds), 3, recipes.DEMO_PX, recipes.DEMO_PX, device="meta")

    models = [Autoencoder(recipes.DEMO_AUTOENCODER, device="meta") for _ in range(2)]
    whole = autoencoder.WholeStage(models[0], images, steps=0, pool=1)
    decoder = autoencoder.DecoderStage(models[1], images, pool=1)
    known = features.FeatureStage(FeatureNetwork(features.QUESTIONS).to("meta"), pool=1)
    read = CaptioningStage(CaptioningModel(Gemma(recipes.DEMO_TEXT, device="meta")).to("meta"), demo.prompts(), pool=1)
    frozen = {"decoder": [models[1].encoder]}
    return {stage.name: (stage, frozen.get(stage.name, ())) for stage in (whole, decoder, known, read)}


def check_memory(estimates: Sequence[Estimate], processes: ProcessGroup) -> None:
    """Refuse a run whose state cannot fit, warn of one whose activations may not. Raises ValueError."""
    free = free_bytes(processes.device)
    for one in estimates:
        about = f"{one.stage}: {processes.device} has {free / GIB:.1f} GiB free; it needs"
        if one.state_bytes > free:
            raise ValueError(
                f"{about} {one.state_bytes / GIB:.1f} GiB for weights, gradients and averages alone; choose a device "
                "with more, or a smaller recipe"
            )
        if one.memory_bytes > free:
            log.warning(
                "%s up to %.1f GiB; fewer samples at a time help: --set %s.micro_batch=N",
                about,
                one.memory_bytes / GIB,
                one.stage,
            )


@functools.cache
def matmul_speed(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a large matrix product, the best of some runs."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype)
    seconds = []
    for _ in range(MATMUL_RUNS):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * MATMUL_SIZE**3 / min(seconds)


def free_bytes(device: torch.device) -> int:
    """Memory that is free now; a CPU's includes what the system caches."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**63  # unknown: no reason to refuse
