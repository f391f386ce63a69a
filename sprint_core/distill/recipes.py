"""Recipes: one aligned row per stage of what a run may change, and the demo model's sizes."""

import dataclasses
from dataclasses import dataclass

from ..autoencoder_config import RES, VIT, AutoencoderConfig
from ..gemma import GemmaConfig
from ..transformer import TransformerConfig

DEMO_PX = 256

DEMO_AUTOENCODER = AutoencoderConfig(
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
DEMO_TEXT = GemmaConfig(vocab=128, width=128, depth=2, heads=4, kv_heads=2, head_dim=32, ffn=256, query_scale=32)
DEMO_TRANSFORMER = TransformerConfig(width=160, depth=6, cross_heads=5, caption_width=128)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage learns."""

    steps: int
    batch: int
    lr: float
    warmup_steps: int = 100
    decay: float = 0.5  # the learning rate falls to 0 over this last share of the steps
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    ema: float = 0.999

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fall = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.lr * rise * fall


def override(schedule: Schedule, settings: dict[str, str]) -> Schedule:
    """A schedule with settings from the command line, each of the type it has. Raises ValueError."""
    fields = {f.name: f for f in dataclasses.fields(schedule)}
    unknown = sorted(set(settings) - set(fields))
    if unknown:
        raise ValueError(f"no setting {', '.join(unknown)}; there are {', '.join(fields)}")
    values = {name: type(getattr(schedule, name)) for name in settings}
    return dataclasses.replace(schedule, **{name: values[name](settings[name]) for name in settings})
