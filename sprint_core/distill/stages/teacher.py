"""Training a flow-matching teacher with the stabilisers that sCM needs: dense time and q/k norm.

The text encoder is frozen. (A small model's was pre-trained, captioning.py: trained on with a teacher it forgets again
which thing is left of which, as that shows late in the teacher's loss.)
"""

import dataclasses
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import sampler, trigflow
from ...models.layers import sdpa
from ...models.transformer import SanaTransformer, TransformerConfig
from ...trigflow import flow_add_noise, flow_predict_x0
from ...weights import presets
from ..dataset.batch import Captions, Dataset, without
from ..dataset.read_ahead import reading_ahead
from ..dataset.resident import ResidentLatents
from ..engine.activation_checkpointing import around_block
from ..engine.randomness import SampleRandom, initialise
from ..engine.stage import Stage
from ..losses.jvp import plain_attention
from ..losses.transform import per_sample
from .base import FRESH_SEED, Preview, TextConditioned

CAPTION_DROPOUT = 0.1


Model = TypeVar("Model", bound=TextConditioned)


class TeacherStage(Stage[Model], Generic[Model]):
    """Flow matching: v(x_s, s) is to be z - x0, with s from a logit-normal that `flow_shift` moves towards noise."""

    name = averaged = "teacher"

    def __init__(
        self,
        model: Model,
        dataset: Dataset,
        flow_shift: float = presets.FLOW_SHIFT,
        preview: Preview | None = None,
        activation_checkpointing: bool = False,
    ):
        super().__init__({self.name: model}, {"latents": dataset.fingerprint, "flow_shift": str(flow_shift)})
        self.model = model
        self.dataset = dataset
        self.preview = preview
        self.flow_shift = flow_shift
        self.around_block = around_block(activation_checkpointing)

    def reading_ahead(self, asked: Iterator[tuple[str, SampleRandom]]) -> AbstractContextManager:
        return reading_ahead(self.dataset, (random for _, random in asked), self.device)

    def constant(self, phase: str, step: int) -> Hashable | None:
        return () if isinstance(self.dataset, ResidentLatents) else None

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self.dataset.batch(random)
        x0 = batch.latents.to(self.device)
        caption, mask = self.model.encode(without(batch.captions, random.uniform() < CAPTION_DROPOUT))
        z = random.normal(*x0.shape[1:]).to(x0)
        s = trigflow.shift(random.normal().sigmoid(), self.flow_shift).to(x0)
        x_s = flow_add_noise(x0, z, per_sample(s, x0))
        # torch's fused attention has a slow backward pass with a mask on the CPU: a quarter of a small model's step
        attention = plain_attention if x0.device.type == "cpu" else sdpa
        transformer = self.model.transformer
        v = transformer(x_s, s, caption, mask=mask, attention=attention, around_block=self.around_block)
        return F.mse_loss(v, z - x0), {}

    @property
    def compilable(self) -> tuple[nn.Module, ...]:
        return (self.model.transformer,)

    def samples(self, average: Model) -> Tensor | None:
        """Samples of 20 steps with classifier-free guidance for the preview's captions."""
        if self.preview is None:
            return None
        noise = self.preview.noise(self.device)
        return self.preview.decode(euler(average, noise, self.preview.captions, self.flow_shift))


def is_stable(config: TransformerConfig) -> bool:
    """Whether a teacher has what keeps the tangent bounded: dense time embedding and q/k norm."""
    return config.time_scale == 1.0 and config.qk_norm


def student_of(teacher: SanaTransformer, guidance_embed: bool = True) -> SanaTransformer:
    """A copy with a guidance embedding, at first without effect, or with none: the same function as the teacher.

    Raises ValueError for a teacher without dense time embedding or q/k norm.
    """
    if not is_stable(teacher.config):
        raise ValueError(
            "this teacher lacks the dense time embedding (time scale 0..1) or the q/k norm that the distillation "
            "needs: fine-tune it with them first (--stage teacher)"
        )
    config = dataclasses.replace(teacher.config, guidance_embed=guidance_embed)
    like = next(teacher.parameters())
    student = SanaTransformer(config, dtype=like.dtype, device=like.device)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and all("guidance_embedder" in name for name in missing)
    if guidance_embed:
        initialise(student.time_embed.guidance_embedder, FRESH_SEED)
        for parameter in student.time_embed.guidance_embedder.linear_2.parameters():
            nn.init.zeros_(parameter)
    return student


@torch.no_grad()
def euler(
    model: TextConditioned,
    z: Tensor,
    captions: Captions,
    flow_shift: float,
    steps: int = 20,
    cfg: float = presets.GUIDANCE,
) -> Tensor:
    """The teacher's own multi-step samples from noise z: scaled latents."""
    conditions = model.encode(captions), model.encode_empty(len(captions))

    def denoise(x_s: Tensor, s: Tensor) -> Tensor:
        times = s.expand(len(x_s))
        conditional, unconditional = (model.transformer(x_s, times, c, mask=mask) for c, mask in conditions)
        return flow_predict_x0(sampler.classifier_free_guidance(conditional, unconditional, cfg), x_s, s)

    return sampler.euler(denoise, z, torch.tensor(trigflow.shifted_sigmas(steps, flow_shift), device=z.device))
