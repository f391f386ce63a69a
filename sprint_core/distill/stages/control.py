"""What a ControlNet learns: sCM and LADD as for the student, of trunk and branch together."""

from torch import Tensor, nn

from ...models import controlnet
from ...models.layers import sdpa
from ...models.transformer import AroundBlock, Attention
from ..dataset.batch import Dataset
from ..losses.transform import per_sample
from ..recipes import Objective
from .base import Preview, TextConditioned
from .sprint import Conditioning, LogVariance, SprintStage, Weighted


class Controlled(Weighted):
    """What is trained: the branch, without what it shares with its trunk, and sCM's weight."""

    def __init__(self, branch: controlnet.SanaControlNet):
        super().__init__()
        self.branch, self.log_variance = branch, LogVariance()
        for name, parameter in branch.named_parameters():
            parameter.requires_grad_(not name.startswith(controlnet.SHARED))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.branch.controlnet_blocks[-1].weight  # type: ignore


def block_count(depth: int) -> int:
    """Copied blocks for a trunk of that depth: the published seven, or the first half of a small trunk."""
    return min(controlnet.PUBLISHED_BLOCKS, depth // 2)


class ControlStage(SprintStage[Controlled]):
    """A ControlNet of a frozen SANA-Sprint; the dataset's batches have hints. branch: one to train on from."""

    name = "control"

    def __init__(
        self,
        trunk: TextConditioned,
        dataset: Dataset,
        objective: Objective,
        preview: Preview | None = None,
        activation_checkpointing: bool = False,
        branch: controlnet.SanaControlNet | None = None,
    ):
        if branch is None:
            branch = controlnet.copy_trunk(trunk.transformer, block_count(trunk.transformer.config.depth))
        super().__init__(trunk, Controlled(branch), dataset, objective, preview, activation_checkpointing)

    @property
    def compilable(self) -> tuple[nn.Module, ...]:
        """Trunk and branch, unless they are differentiated in forward mode, which they are as one."""
        return () if self.objective.is_forward_mode else (self.teacher.transformer, self.student.branch)

    def _trajectory(self, x0: Tensor, z: Tensor, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The image's own: x_t = cos t x0 + sin t z."""
        angle = per_sample(t, x_t)
        return angle.cos() * z - angle.sin() * x0

    def _velocity(
        self,
        student: Controlled,
        conditioning: Conditioning,
        x: Tensor,
        s: Tensor,
        attention: Attention = sdpa,
        around_block: AroundBlock | None = None,
    ) -> Tensor:
        inputs = {"guidance": conditioning.guidance, **conditioning.text}
        how = {"attention": attention, "around_block": around_block}
        residuals = student.branch(x, s, hint=conditioning.hint, **inputs, **how)
        return self.teacher.transformer(x, s, control=residuals, **inputs, **how)

    def _judge(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        inputs = {"guidance": conditioning.guidance, **conditioning.text}
        return self.critic(self.teacher.transformer, x_t, t, around_block=self.around_block, **inputs)
