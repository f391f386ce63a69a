"""Recipes: one aligned row per stage of what a run may change, and the sizes of small models.

Every value can be overridden on the command line: --set STAGE.KEY=VALUE. The rows of sprint-0.6B and
sprint-1.6B are the published configuration (arXiv 2503.09641, appendix; NVlabs/Sana
configs/sana_sprint_config).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.autoencoder_config import RES, VIT, AutoencoderConfig
from ..models.gemma import GemmaConfig
from ..models.transformer import TransformerConfig
from . import methods
from .methods import METHODS, WEIGHTS

SHAPES_PX = 256
SHAPES_FLOW_SHIFT = 5.0  # scenes hold few bits, so what they show is decided at s of 0.75 to 0.98

SHAPES_AUTOENCODER = AutoencoderConfig(
    encoder_channels=(8, 16, 32, 64, 128, 128),
    decoder_channels=(8, 16, 32, 64, 128, 128),
    encoder_layers=(0, 1, 1, 1, 1, 1),
    decoder_layers=(0, 1, 1, 1, 1, 1),
    encoder_blocks=(RES, RES, RES, RES, VIT, VIT),
    decoder_blocks=(RES, RES, RES, RES, VIT, VIT),
    encoder_multiscales=((), (), (), (), (5,), (5,)),
    decoder_multiscales=((), (), (), (), (5,), (5,)),
    encoder_out_shortcut=False,  # so that a scale per channel folds into the convolutions exactly
    decoder_in_shortcut=False,
)
EMOJI_AUTOENCODER = dataclasses.replace(
    SHAPES_AUTOENCODER,
    decoder_channels=(16, 16, 32, 64, 128, 256),
    encoder_layers=(0, 1, 1, 1, 2, 2),
    decoder_layers=(0, 1, 1, 1, 2, 2),
)
EMOJI_TEXT = GemmaConfig(vocab=3840, width=128, depth=3, heads=4, kv_heads=2, head_dim=32, ffn=256, query_scale=32)
EMOJI_TRANSFORMER = TransformerConfig(width=192, depth=8, cross_heads=6, caption_width=128, pos_embed_base=8)
SHAPES_TEXT = GemmaConfig(vocab=128, width=128, depth=3, heads=4, kv_heads=2, head_dim=32, ffn=256, query_scale=32)
SHAPES_TRANSFORMER = TransformerConfig(width=160, depth=6, cross_heads=5, caption_width=128, pos_embed_base=8)


OWN_BETAS = {"critic": "critic_betas", "fake": "fake_betas"}  # of a Schedule, by a stage's module


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage learns."""

    steps: int
    batch: int
    lr: float
    warmup_steps: int = 100
    decay: float = 0.5  # the learning rate falls to 0 over this last share of the steps
    betas: tuple[float, ...] = (0.9, 0.95)
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "fp32"  # or "bf16": autocast
    optimizer: str = "adamw"  # or "came", or "muon": hidden matrices by Muon, the rest by AdamW
    activation_checkpointing: bool = False  # of the blocks: less memory, a third more time
    micro_batch: int = 0  # samples that a process takes at a time, accumulating gradients; 0: its share of the batch
    embedder_rate: float = 1.0  # the learning rate of embedders of time and guidance over the others'
    critic_betas: tuple[float, ...] = ()  # of LADD's heads; none: as betas
    fake_betas: tuple[float, ...] = ()  # of a fake network; none: as betas
    check_every: int = 100  # steps, where a stage has something to check; 0: never
    stop_factor: float = 2.0  # how often the lowest error of all checks ends a training; 0: none does

    def __post_init__(self) -> None:
        for name, choices in (("precision", ("fp32", "bf16")), ("optimizer", ("adamw", "came", "muon"))):
            if getattr(self, name) not in choices:
                *others, last = choices
                raise ValueError(f"{name} is {getattr(self, name)!r}; there are {', '.join(others)} and {last}")
        if min(self.steps, self.batch) < 1 or min(self.micro_batch, self.warmup_steps, self.check_every) < 0:
            least = "steps and batch must be 1 or more, micro_batch, warmup_steps and check_every 0 or more"
            raise ValueError(f"{least}; this is {self}")
        if not (self.stop_factor == 0 or 1 < self.stop_factor < math.inf):
            raise ValueError(f"stop_factor must be above 1, or 0; this is {self}")
        if not (0 < self.lr <= 1 and 0 < self.clip < math.inf and 0 <= self.decay <= 1):
            raise ValueError(f"lr must lie in 0 to 1, clip above 0, decay in 0 to 1; this is {self}")
        if not 0 <= self.embedder_rate < math.inf:
            raise ValueError(f"embedder_rate must be 0 or more; this is {self}")
        if not all(0 <= share < 1 for share in (self.ema, *self.betas, *self.critic_betas, *self.fake_betas)):
            raise ValueError(f"ema and betas must lie in 0 to 1, without 1; this is {self}")
        for betas in (self.betas, *map(self.betas_of, OWN_BETAS)):
            if len(betas) != (3 if self.optimizer == "came" else 2):
                raise ValueError(f"{self.optimizer} does not take {len(betas)} betas")

    @property
    def chosen(self) -> dict[str, str]:
        """What differs from the defaults: identifies a run, whatever later versions add."""
        return _chosen(self)

    def betas_of(self, module: str) -> tuple[float, ...]:
        """Those of a stage's module of that name."""
        own = getattr(self, OWN_BETAS[module]) if module in OWN_BETAS else ()
        return own or self.betas

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fall = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.lr * rise * fall


OF_SCORES = ("sampled_steps", "fakes", "fake_rate", "chain_steps")  # what only methods read that compare scores


@dataclass(frozen=True)
class Objective:
    """What the distillation minimises; the defaults are the published configuration."""

    guidance: tuple[float, ...] = (4.0, 4.5, 5.0)  # embedded in the student, drawn anew for every sample
    teacher_guidance: float = 1.0  # of the teacher, over what the student is told
    form: str = "published"  # of sCM's loss, or "cosine", or "flow", flow matching alone: see losses/scm.py
    tangent: str = "jvp"  # of sCM, or "difference": by finite differences
    teacher_precision: str = "fp32"  # or "bf16": of its weights, in half the memory
    scm_weight: float = 1.0
    ladd_weight: float = 0.5
    max_time_share: float = 0.5  # of the generator's samples that start at pi/2
    tangent_warmup_steps: int = 4000
    ladd_from: int = 0  # the step from which the adversary takes part; see RECIPES
    noise_mean: float = 0.2  # of the student's angles: tan t = exp(n) / sigma_data, n ~ N(mean, std^2)
    noise_std: float = 1.6  # (the paper's ablation prefers mean 0)
    critic_mean: float = -0.6  # the same for the angles at which the critic looks
    critic_std: float = 1.0
    method: str = "scm"  # a row of methods.METHODS
    score_weight: float = 0.0  # of the difference between the teacher's score and the student's
    sampled_steps: int = 4  # the student's samples are of 1 to so many steps, in turn
    fakes: int = 0  # updates of the fake network for each of the student's; 0: the method's own
    fake_rate: float = 0.0  # its learning rate over the student's; 0: the method's own
    chain_steps: int = 4  # of EM distillation's Langevin chain

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; there are {methods.listed()}")
        fixed = {"form": ("published", "cosine", "flow"), "tangent": ("jvp", "difference")}
        for name, choices in (fixed | {"teacher_precision": ("fp32", "bf16")}).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; there are {' and '.join(choices)}")
        weights = {name: getattr(self, name) for name in WEIGHTS}
        numbers = (*self.guidance, *weights.values())
        if not self.guidance or not all(0 <= n < math.inf for n in numbers) or not any(weights.values()):
            raise ValueError(f"an objective needs guidance scales, and a weight of sCM or LADD above 0; this is {self}")
        if self.ladd_from and not (self.scm_weight or self.score_weight):
            raise ValueError(f"LADD alone has nothing to learn before ladd_from={self.ladd_from}; set ladd_from=0")
        if not METHODS[self.method].takes(weights):
            values = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
            raise ValueError(
                f"method {self.method} does not go with {values}; above 0 must be those without, may be those in "
                f"brackets: {methods.listed()}"
            )
        if not (1 <= self.sampled_steps <= 4 and self.chain_steps >= 1 and self.fakes >= 0):
            raise ValueError(f"sampled_steps must lie in 1 to 4, chain_steps be 1, fakes 0 or more; this is {self}")
        if not 0 <= self.teacher_guidance < math.inf:
            raise ValueError(f"teacher_guidance must be 0 or more; this is {self}")
        if not 0 <= self.fake_rate < math.inf:
            raise ValueError(f"fake_rate must be 0 or more; this is {self}")
        if not 0 <= self.max_time_share <= 1 or min(self.tangent_warmup_steps, self.ladd_from) < 0:
            raise ValueError(f"max_time_share must lie in 0 to 1, steps be 0 or more; this is {self}")
        if not all(abs(n) < math.inf for n in (self.noise_mean, self.critic_mean)):
            raise ValueError(f"noise_mean and critic_mean must be numbers; this is {self}")
        if not all(0 < std < math.inf for std in (self.noise_std, self.critic_std)):
            raise ValueError(f"noise_std and critic_std must be above 0; this is {self}")

    @property
    def chosen(self) -> dict[str, str]:
        """What differs from the defaults."""
        return _chosen(self)

    @property
    def is_forward_mode(self) -> bool:
        """Whether the student is differentiated in forward mode."""
        return self.scm_weight > 0 and self.form != "flow" and self.tangent == "jvp"

    @property
    def unread(self) -> list[str]:
        """What was chosen and the method does not read."""
        row = METHODS[self.method]
        idle = () if row.score == "emd" else ("chain_steps",) if row.score else OF_SCORES
        return [name for name in idle if name in self.chosen]

    @property
    def score_from(self) -> int:
        """The step from which the score takes part."""
        return self.tangent_warmup_steps if METHODS[self.method].warms_up else 0


def with_method(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of an Objective: these, and what their method sets besides. Another method is for the Objective to refuse."""
    row = METHODS.get(values.get("method", ""))
    return {**(row.sets if row else {}), **values}


@dataclass(frozen=True)
class Recipe:
    """A run: the schedule of each stage, and the objective of the last. preset: a row of presets.py; '': the small
    world of that name. (A ControlNet's trunk may be another: what is asked of it is read off its file.)"""

    stages: Mapping[str, Schedule]
    objective: Objective
    preset: str = ""
    world: str = "shapes"

    def __post_init__(self) -> None:
        name, aim = self.last, self.objective
        steps = self.stages[name].steps
        if aim.ladd_weight and aim.ladd_from >= steps:
            raise ValueError(
                f"LADD would never begin: {name}.ladd_from is {aim.ladd_from}, {name}.steps {steps}; "
                f"lower {name}.ladd_from, or set {name}.ladd_weight=0 to go without"
            )
        if aim.score_weight and aim.score_from >= steps:
            raise ValueError(
                f"the fake network would never begin: {name}.tangent_warmup_steps is {aim.score_from}, {name}.steps "
                f"{steps}; lower {name}.tangent_warmup_steps"
            )
        if self.is_control and aim.teacher_precision != "fp32":
            raise ValueError(f"{name}.teacher_precision is {aim.teacher_precision}: a ControlNet has no teacher")
        if self.is_control and METHODS[aim.method].score:
            raise ValueError(f"{name}.method is {aim.method}: a ControlNet learns by scm alone")

    @property
    def last(self) -> str:
        """The stage that the objective belongs to."""
        return list(self.stages)[-1]

    @property
    def is_control(self) -> bool:
        return self.last == "control"


def _chosen(row: Schedule | Objective) -> dict[str, str]:
    return {f.name: repr(value) for f in dataclasses.fields(row) if (value := getattr(row, f.name)) != f.default}


# Published: a batch over 32 GPUs, warm-up, then a constant rate. How long small models take is in docs/training.md.
CAME_BETAS = (0.9, 0.999, 0.9999)
# fmt: off
PUBLISHED = {
    "teacher": Schedule( 5000, 1024, 2e-5,  500, 0.0, CAME_BETAS, 0.1, 0.9999, "bf16", "came", True, 16),
    "distill": Schedule(20000,  512, 2e-6, 5000, 0.0, CAME_BETAS, 0.1, 0.9999, "bf16", "came", True, 16),
}
SHAPES = {
    "autoencoder": Schedule( 6000,  8, 5e-4),
    "decoder":     Schedule( 3000,  6, 3e-4, decay=0.9),
    "features":    Schedule( 1500, 32, 2e-3),
    "captioning":  Schedule(  800, 64, 1e-3),
    "teacher":     Schedule( 8000, 32, 1e-3, decay=0.5, precision="bf16"),
    "distill":     Schedule( 2400, 32, 3e-4, decay=0.4, betas=(0.0, 0.99), clip=0.5, ema=0.998, precision="bf16",
                            embedder_rate=0.1),
}
EMOJI = {  # for one GPU: see docs/training.md
    "autoencoder": Schedule( 1200, 128, 2e-3, 200, decay=0.6, precision="bf16", optimizer="muon"),
    "decoder":     Schedule( 2500,  48, 5e-4, 100, decay=0.8, precision="bf16"),
    "features":    Schedule( 3000, 256, 2e-3),
    "captioning":  Schedule( 2200,1536, 2e-3, 200, ema=0.995, precision="bf16"),
    "teacher":     Schedule(20000,  64, 2e-3, 300, decay=0.6, precision="bf16", optimizer="muon"),
    "distill":     Schedule(  240,  24, 3e-4,  50, decay=0.5, betas=(0.0, 0.99), clip=0.5, ema=0.995,
                            embedder_rate=0.1, check_every=40),
}
EMOJI_CONTROL = Schedule(3000, 24, 2e-3, 50, decay=0.7, ema=0.99, optimizer="muon")
SHAPES_CONTROL = Schedule(2000, 32, 5e-4, decay=0.5, betas=(0.0, 0.99), clip=0.5, ema=0.995, precision="bf16")
# fmt: on
# Few steps need the form of sCM that counts from the first one on. Its gradients are as long for every number of
# elements, so that LADD's weight is a multiple of sCM's: 2.5 holds, 25 broke the world of shapes. The student's
# momentum is 0, since near pi/2 sCM is transport, which momentum amplifies. A rate of 5e-4 or more did not converge.
# The embedders of time and guidance learn at a tenth of it (optimizers.py): at all of it sCM's errors burst.
ROBUST = Objective(
    form="cosine", tangent="difference", scm_weight=0.2, ladd_weight=0.5, tangent_warmup_steps=150, ladd_from=150
)
# Scenes of emoji leave little open: guided by 4.5, which is what users have, their teacher exaggerates colours and
# outlines. Its Frechet distance is 25.5, and 11.7 when guided by 2 (320 held-out prompts in 20 steps).
OF_EMOJI = dataclasses.replace(ROBUST, teacher_guidance=2 / 4.5, tangent_warmup_steps=100, ladd_from=100)
# A drawing and a caption nearly decide an image, so that flow matching alone paints it well in one step, at the large
# angles where that one begins. Consistency along noisy trajectories of single images made blobs of what was drawn.
OF_EMOJI_CONTROL = Objective(form="flow", ladd_weight=0.0, noise_mean=2.0)
AT_FULL_SIZE = Objective(teacher_precision="bf16")
RECIPES = {
    "demo": Recipe(EMOJI, OF_EMOJI, world="emoji"),
    "shapes": Recipe(SHAPES, ROBUST),
    "sprint-0.6B": Recipe(PUBLISHED, AT_FULL_SIZE, "sprint-0.6B"),
    "sprint-1.6B": Recipe(PUBLISHED, AT_FULL_SIZE, "sprint-1.6B"),
    "demo-control": Recipe({"control": EMOJI_CONTROL}, OF_EMOJI_CONTROL, world="emoji"),
    "shapes-control": Recipe({"control": SHAPES_CONTROL}, ROBUST),
    "control": Recipe({"control": PUBLISHED["distill"]}, Objective(), "sprint-1.6B"),
}


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with STAGE.KEY=VALUE settings, each of the type it has. Raises ValueError."""
    stages, aims = {name: {} for name in recipe.stages}, {}  # applied together: some go only with others
    for setting in settings:
        name, _, value = setting.partition("=")
        stage, _, key = name.partition(".")
        if stage not in stages or not key or not value:
            raise ValueError(f"--set {setting}: write it as STAGE.KEY=VALUE, with a stage of {', '.join(stages)}")
        if stage == recipe.last and key in {f.name for f in dataclasses.fields(Objective)}:
            aims[key] = _parsed(recipe.objective, key, value, setting)
        else:
            stages[stage][key] = _parsed(recipe.stages[stage], key, value, setting)
    changed = {name: _replaced(name, recipe.stages[name], values) for name, values in stages.items()}
    objective = _replaced(recipe.last, recipe.objective, with_method(aims))
    if "embedder_rate" not in stages[recipe.last]:
        changed[recipe.last] = scheduled(changed[recipe.last], objective)
    return dataclasses.replace(recipe, stages=changed, objective=objective)


def scheduled(schedule: Schedule, objective: Objective) -> Schedule:
    """With embedders at a rate of their own only where sCM teaches, whose bursts that is for.

    At a tenth of the rate DMD and DMD2 had hardly begun to learn a first step where others had (docs/ablations.md).
    """
    return schedule if objective.scm_weight else dataclasses.replace(schedule, embedder_rate=1.0)


def _replaced(stage: str, row: Any, values: Mapping[str, Any]) -> Any:
    try:
        return dataclasses.replace(row, **values)
    except ValueError as error:
        raise ValueError(f"{stage}: {error}") from None


_PARSERS = {
    tuple: lambda text: tuple(float(n) for n in text.split(",")),
    bool: lambda text: {"true": True, "false": False}[text.lower()],
}


def _parsed(row: Schedule | Objective, key: str, value: str, setting: str) -> Any:
    """The value of a setting, of the type it has. Raises ValueError."""
    keys = [f.name for f in dataclasses.fields(row)]
    if key not in keys:
        raise ValueError(f"--set {setting}: no setting {key}; there are {', '.join(keys)}")
    kind = type(getattr(row, key))
    try:
        return _PARSERS.get(kind, kind)(value)
    except (ValueError, KeyError):
        raise ValueError(f"--set {setting}: {value!r} is no {kind.__name__}") from None
