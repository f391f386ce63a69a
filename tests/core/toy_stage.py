"""A stage that trains in no time, for tests of the trainer."""

import torch
from torch import nn

from sprint_core.distill.engine.phase import Phase
from sprint_core.distill.engine.randomness import initialise
from sprint_core.distill.engine.stage import Stage
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.recipes import Schedule

SCHEDULE = Schedule(steps=12, batch=4, lr=0.05, warmup_steps=3, ema=0.9)


class Toy(Stage):
    """Two modules, trained in turn, on noise."""

    name, averaged = "toy", "student"

    def __init__(self, bad_step: int = -1):
        plan = Phase("student"), Phase("critic", period=2, turns=(1,), averaged=False)
        super().__init__({"student": nn.Linear(3, 2), "critic": nn.Linear(2, 1)}, {}, plan)
        for seed, module in enumerate(self.modules.values()):
            initialise(module, seed)
        self.bad_step = bad_step

    def samples(self, average):
        return average.weight.detach().abs().expand(3, 2, 2, 3)

    def loss(self, phase, step, random):
        x = random.normal(3)
        loss = self.modules["critic"](self.modules["student"](x)).square().mean() + random.uniform().mean()
        return (loss * float("nan") if step == self.bad_step else loss), {"x": x.mean()}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    parts = {**trainer.stage.modules, "average": trainer.average}
    return {f"{n}.{k}": v.clone() for n, module in parts.items() for k, v in module.state_dict().items()}
