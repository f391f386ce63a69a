"""The distillation stage: the student follows the trajectories of its teacher under classifier-free guidance."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...models.layers import sdpa
from ...models.transformer import AroundBlock, Attention, SanaTransformer
from ...trigflow import SIGMA_DATA
from ...weights import checkpoint, layouts
from ..dataset.batch import Dataset
from ..losses import scm
from ..losses.transform import trigflow_network
from ..recipes import Objective
from .base import CHUNK, Preview, TextConditioned, Watch
from .frozen import FROZEN
from .sprint import Conditioning, LogVariance, SprintStage, Weighted
from .teacher import euler, student_of

WATCHED = 32  # captions whose endpoints are computed


class Student(Weighted):
    """What is trained: a SANA-Sprint, and sCM's weight."""

    def __init__(self, transformer: SanaTransformer):
        super().__init__()
        self.transformer, self.log_variance = transformer, LogVariance()

    @property
    def last_layer(self) -> nn.Parameter:
        return self.transformer.proj_out.weight


def continued(path: Path) -> Callable[[SanaTransformer], SanaTransformer]:
    """Start from the SANA-Sprint in a file rather than from its teacher. Raises CheckpointError; so does the start."""
    weights = checkpoint.load(path, layouts.TRANSFORMER)

    def start(teacher: SanaTransformer) -> SanaTransformer:
        if weights.config != replace(teacher.config, guidance_embed=True):
            raise checkpoint.CheckpointError(f"{path}: no student of this teacher: {weights.config}, {teacher.config}")
        device = next(teacher.parameters()).device
        return copy.deepcopy(checkpoint.build(weights, dtype=torch.float32, device=device))  # out of its file

    return start


class DistillStage(SprintStage[Student]):
    """Distillation of a teacher. start: makes the student at its first step from the teacher's transformer.

    watch: by what the guard sees how it does. The teacher is given in fp32, and held as the objective says.
    """

    name = "distill"

    def __init__(
        self,
        teacher: TextConditioned,
        dataset: Dataset,
        objective: Objective,
        preview: Preview | None = None,
        activation_checkpointing: bool = False,
        start: Callable[[SanaTransformer], SanaTransformer] = student_of,
        watch: Watch | None = None,
    ):
        _check_guidance(teacher)
        self.watch, self._ends = watch, torch.empty(0)
        student = Student(start(teacher.transformer).requires_grad_(True))
        if objective.teacher_precision != "fp32":
            teacher = teacher.with_transformer(FROZEN[objective.teacher_precision](teacher.transformer))
        super().__init__(teacher, student, dataset, objective, preview, activation_checkpointing)

    @property
    def compilable(self) -> tuple[nn.Module, ...]:
        """The teacher, and a student that nothing differentiates in forward mode."""
        return (self.teacher.transformer, *(() if self.objective.is_forward_mode else (self.student.transformer,)))

    def check(self, average: Student) -> dict[str, float]:
        """error: of one step against the teacher's many; judge: where there is one."""
        if self.watch is None:
            return {}
        z, captions = self.watch.noise(self.device), self.watch.captions
        aim = self.objective
        guidance = aim.guidance[len(aim.guidance) // 2]
        chunks = [slice(i, i + CHUNK) for i in range(0, len(z), CHUNK)]
        if not len(self._ends):
            first = [part for part in chunks if part.start < WATCHED]
            flow_shift = self.watch.flow_shift
            cfg = aim.teacher_guidance * guidance
            ends = [euler(self.teacher, z[part], captions[part], flow_shift, cfg=cfg) for part in first]
            self._ends = torch.cat(ends)[:WATCHED]
        latents = torch.cat([self._one_step(average, z[part], captions[part], guidance) for part in chunks])
        judged = {"judge": self.watch.judge(latents)} if self.watch.judge else {}
        return self._errors(latents[:WATCHED], self._ends) | judged

    def _errors(self, latents: Tensor, ends: Tensor) -> dict[str, float]:
        """By what the guard judges, and more to log: of one step's latents [b, c, h, w] and the teacher's."""
        error = (latents - ends).square().mean() / ends.var()
        return {"error": float(error)}

    def _trajectory(self, x0: Tensor, z: Tensor, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The teacher's, with classifier-free guidance."""
        nulls = self._empty_text(len(x_t))
        x, guidance = x_t / SIGMA_DATA, self.objective.teacher_guidance * conditioning.guidance
        return scm.guided_velocity(self._teacher, x, t, guidance, conditioning.text, nulls)

    def _velocity(
        self,
        student: Student,
        conditioning: Conditioning,
        x: Tensor,
        s: Tensor,
        attention: Attention = sdpa,
        around_block: AroundBlock | None = None,
    ) -> Tensor:
        inputs = {"guidance": conditioning.guidance, **conditioning.text}
        return student.transformer(x, s, **inputs, attention=attention, around_block=around_block)

    def _judge(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.critic(self.teacher.transformer, x_t, t, around_block=self.around_block, **conditioning.text)

    def _teacher(self, x: Tensor, t: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The teacher as a TrigFlow network."""
        return trigflow_network(lambda x, s: self.teacher.transformer(x, s, **text))(x, t)


def _check_guidance(teacher: TextConditioned) -> None:
    """Raises ValueError for a teacher that knows no empty caption, with which guidance compares."""
    caption, mask = teacher.encode_empty(1)
    if not caption.is_meta and not (mask.any() and caption.isfinite().all()):
        raise ValueError(
            "the teacher is to be guided, and its embedding of the empty caption has no tokens or is not finite: "
            "delete `encoded` in the folder of this run, so that captions are encoded anew"
        )
