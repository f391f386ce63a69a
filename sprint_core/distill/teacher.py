"""Training a flow-matching teacher with the stabilisers that sCM needs: dense time and q/k norm.

For the demo model the text encoder learns with it; for published weights it is frozen.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import text
from ..gemma import Gemma
from ..transformer import Attention, SanaTransformer
from ..trigflow import flow_add_noise
from .jvp import plain_attention
from .randomness import SampleRandom
from .transform import per_sample

CAPTION_DROPOUT = 0.1
Batch = Callable[[SampleRandom], tuple[Tensor, list[str]]]  # scaled latents [b, 32, h, w] and their captions


class Captioned(nn.Module):
    """A transformer with its text encoder, so that both are trained, averaged and saved as one."""

    def __init__(self, transformer: SanaTransformer, gemma: Gemma, prompts: text.PromptTokenizer):
        super().__init__()
        self.transformer, self.gemma = transformer, gemma
        self.prompts = prompts

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Caption embeddings [b, n, c] and their mask [b, n]."""
        device = next(self.gemma.parameters()).device
        rows = text.encode_ids(self.gemma, [self.prompts.tokens(c) for c in captions], device=device)
        return text.pad_embeddings(rows)

    def __deepcopy__(self, memo: dict) -> "Captioned":
        """Copies the networks; the tokenizer, which cannot be copied, is shared."""
        networks = (self.transformer, self.gemma)
        twins = [type(m)(m.config).to(next(m.parameters())) for m in networks]
        for twin, network in zip(twins, networks):
            twin.load_state_dict(network.state_dict())
        return Captioned(*twins, self.prompts)


class TeacherStage:
    """Flow matching: v(x_s, s) is to be z - x0, with s from a logit-normal."""

    name = averaged = "teacher"

    def __init__(self, model: Captioned, batch: Batch, attention: Attention = plain_attention):
        self.modules = {self.name: model}
        self.batch, self.attention = batch, attention

    def phases(self, step: int) -> tuple[str, ...]:
        return (self.name,)

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.modules[self.name]
        x0, captions = self.batch(random)
        dropped = (random.uniform() < CAPTION_DROPOUT).tolist()
        caption, mask = model.encode(["" if drop else c for c, drop in zip(captions, dropped)])
        z, s = random.normal(*x0.shape[1:]).to(x0), random.normal().sigmoid().to(x0)
        x_s = flow_add_noise(x0, z, per_sample(s, x0))
        v = model.transformer(x_s, s, caption, mask=mask, attention=self.attention)
        return F.mse_loss(v, z - x0), {}


def student_of(teacher: SanaTransformer) -> SanaTransformer:
    """A copy with a guidance embedding, at first without effect: the same function as the teacher.

    Raises ValueError for a teacher without dense time embedding or q/k norm.
    """
    config = teacher.config
    if config.time_scale != 1.0 or not config.qk_norm:
        raise ValueError(
            "this teacher lacks the dense time embedding (time scale 0..1) or the q/k norm that the distillation "
            "needs: fine-tune it with them first (--stage teacher)"
        )
    student = SanaTransformer(dataclasses.replace(config, guidance_embed=True)).to(next(teacher.parameters()))
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and all("guidance_embedder" in name for name in missing)
    last = student.time_embed.guidance_embedder.linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return student


@torch.no_grad()
def euler(model: Captioned, z: Tensor, captions: Sequence[str], steps: int = 20, cfg: float = 4.5) -> Tensor:
    """The teacher's own multi-step samples from noise z: scaled latents."""
    (caption, mask), (null, null_mask) = model.encode(captions), model.encode([""] * len(captions))
    times = torch.linspace(1, 0, steps + 1).tolist()
    x = z
    for s, s_next in zip(times, times[1:]):
        batch = x.new_full((len(x),), s)
        v = model.transformer(x, batch, caption, mask=mask)
        u = model.transformer(x, batch, null, mask=null_mask)
        x = x + (s_next - s) * torch.lerp(u, v, cfg)
    return x
