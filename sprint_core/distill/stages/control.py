"""What a ControlNet learns: sCM and LADD as for the student, of trunk and branch together."""

from torch import Tensor, nn

from ...models import controlnet
from ...models.layers import sdpa
from ...trigflow import SIGMA_DATA
from ..dataset import scenes as data
from ..dataset.encoded import EncodedPictures
from ..losses.transform import per_sample
from ..recipes import Objective
from .base import Encoding, Preview
from .student import DistillStage, Given, LogVariance


class Controlled(nn.Module):
    """What is trained: the branch, without what it shares with its trunk, and sCM's weight."""

    def __init__(self, branch: controlnet.SanaControlNet):
        super().__init__()
        self.branch, self.log_variance = branch, LogVariance()
        for name, parameter in branch.named_parameters():
            parameter.requires_grad_(not name.startswith(controlnet.SHARED))


def block_count(depth: int) -> int:
    """Copied blocks for a trunk of that depth: the published seven, or the first half of a small trunk."""
    return min(controlnet.PUBLISHED_BLOCKS, depth // 2)


class ControlStage(DistillStage):
    """Branch and critic in turn; `data` has hints. The trunk is a SANA-Sprint; branch: one to train on from."""

    name = "control"

    def __init__(
        self,
        trunk: Encoding,
        data: data.ControlledScenes | EncodedPictures,
        objective: Objective,
        preview: Preview | None = None,
        recompute: bool = False,
        branch: controlnet.SanaControlNet | None = None,
    ):
        self.teacher = trunk.requires_grad_(False).eval()
        if branch is None:
            branch = controlnet.copy_of(trunk.transformer, block_count(trunk.transformer.config.depth))
        self._prepare(Controlled(branch), data, objective, preview, recompute)

    def _batch(self, random):
        latents, texts, hints = self.data.batch(random)
        w = random.choice(self.objective.guidance).to(self._device)
        x0 = SIGMA_DATA * latents.to(self._device)
        return x0, Given(w, self._text(texts), hints.to(self._device))

    def _trajectory(self, x0: Tensor, z: Tensor, x_t: Tensor, t: Tensor, given: Given) -> Tensor:
        angle = per_sample(t, x_t)
        return angle.cos() * z - angle.sin() * x0

    def _velocity(self, student: nn.Module, given: Given, x: Tensor, s: Tensor, attention=sdpa, around=None) -> Tensor:
        told = {"guidance": given.w, "attention": attention, "around_block": around, **given.text}
        residuals = student.branch(x, s, hint=given.hint, **told)
        return self.teacher.transformer(x, s, control=residuals, **told)

    def _judge(self, x_t: Tensor, t: Tensor, given: Given) -> Tensor:
        told = {"guidance": given.w, **given.text}
        return self.modules["critic"](self.teacher.transformer, x_t, t, around=self.around, **told)
