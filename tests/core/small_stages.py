"""The real stages on a transformer of three blocks, for tests of what trains them."""

import dataclasses
from collections.abc import Iterable

import standin
import torch

from sprint_core.distill.dataset.batch import Batch
from sprint_core.distill.engine import sharding
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.engine.stage import Stage
from sprint_core.distill.recipes import Objective, Schedule, with_method
from sprint_core.distill.stages.base import Embedded
from sprint_core.distill.stages.rivals import distill_stage
from sprint_core.distill.stages.teacher import TeacherStage
from sprint_core.models.transformer import SanaTransformer

CONFIG = dataclasses.replace(standin.TEACHER, depth=3)
SCHEDULE = Schedule(steps=4, batch=4, lr=1e-4, warmup_steps=1)


class Noise:
    """Latents and captions of 3 to 9 tokens, so that micro-batches are padded differently."""

    fingerprint = "noise"

    def batch(self, random: SampleRandom) -> Batch:
        captions = [
            row[: 3 + n] for row, n in zip(random.normal(9, CONFIG.caption_width), random.integers(7), strict=True)
        ]
        return Batch(random.normal(32, 2, 3), captions)


def teacher() -> Embedded:
    transformer = SanaTransformer(CONFIG)
    transformer.load_state_dict(standin.random_model(transformer))
    return Embedded(transformer, torch.zeros(1, CONFIG.caption_width))


def stage(name: str, activation_checkpointing: bool = False) -> Stage:
    model = teacher()
    if name == "teacher":
        return TeacherStage(model, Noise(), activation_checkpointing=activation_checkpointing)
    objective = Objective(**with_method({"method": "scm" if name == "distill" else name, "tangent_warmup_steps": 1}))
    return distill_stage(model, Noise(), objective, activation_checkpointing=activation_checkpointing)


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([sharding.whole(tensor.detach()).flatten() for tensor in tensors])


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of the gradients' norm, and every weight to 1e-5."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if name.endswith("gradients"):
            assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
        else:
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
