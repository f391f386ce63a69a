"""Stages whose data lie on a device, on a transformer of three blocks: what a GPU may record."""

import dataclasses

import standin
import torch

from sprint_core.distill.dataset.resident import ResidentLatents
from sprint_core.distill.dataset.tokenized import TokenizedCaptions
from sprint_core.distill.engine.stage import Stage
from sprint_core.distill.recipes import Objective, with_method
from sprint_core.distill.stages.base import TextConditioned
from sprint_core.distill.stages.rivals import distill_stage
from sprint_core.distill.stages.teacher import TeacherStage
from sprint_core.models.transformer import SanaTransformer

CONFIG = dataclasses.replace(standin.TEACHER, depth=3)
WARM, LADD = 6, 9  # LADD begins later than the tangent is warm


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Worded(TextConditioned):
    """Captions of tokens, each of which has an embedding."""

    def __init__(self, device: torch.device):
        super().__init__()
        transformer = SanaTransformer(CONFIG)
        transformer.load_state_dict(standin.random_model(transformer))
        self.transformer = transformer.to(device)
        self.words = _noise(0, 8, CONFIG.caption_width).to(device)
        self.empty = self.words[:3][None], torch.ones(1, 3, device=device)

    def encode(self, captions):
        if isinstance(captions, TokenizedCaptions):
            return self.words[captions.ids], captions.kept
        return self.encode_empty(len(captions))

    def encode_empty(self, count):
        return tuple(one.expand(count, *one.shape[1:]) for one in self.empty)


def resident(device: torch.device) -> ResidentLatents:
    ids = torch.arange(20).reshape(5, 4) % 8
    kept = torch.ones(5, 4, dtype=torch.bool)
    captions = TokenizedCaptions(ids, kept, (ids[0], kept[0]))
    return ResidentLatents(_noise(1, 5, 32, 2, 3), captions, "noise", device=device)


def stages(name: str, device: torch.device) -> Stage:
    """The teacher's stage, or that of a method."""
    if name == "teacher":
        return TeacherStage(Worded(device), resident(device))
    values = {"method": name, "tangent": "difference", "tangent_warmup_steps": WARM}
    values |= {"ladd_from": LADD} if name in ("scm", "dmd2") else {}
    return distill_stage(Worded(device), resident(device), Objective(**with_method(values)))
