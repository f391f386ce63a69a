"""Compiled blocks: the same losses and gradients, the same names, in all phases of a step."""

import pytest
import standin
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

from sprint_core.distill.dataset.batch import Batch
from sprint_core.distill.engine import compiling
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.recipes import Objective, Schedule, with_method
from sprint_core.distill.stages.base import Embedded
from sprint_core.distill.stages.control import ControlStage
from sprint_core.distill.stages.rivals import distill_stage
from sprint_core.models.transformer import SanaTransformer

CONFIG = standin.TEACHER


class Noise:
    fingerprint = "noise"

    def batch(self, random: SampleRandom) -> Batch:
        captions = [
            row[: 3 + n] for row, n in zip(random.normal(6, CONFIG.caption_width), random.integers(3), strict=True)
        ]
        return Batch(random.normal(32, 2, 2), captions)


@pytest.fixture(autouse=True)
def fresh():
    """Settings of the process as they were, and nothing compiled."""
    before = torch._dynamo.config.recompile_limit, torch._functorch.config.donated_buffer
    yield
    torch._dynamo.config.recompile_limit, torch._functorch.config.donated_buffer = before
    torch._dynamo.reset()


def stage(method: str = "scm", tangent: str = "difference", precision: str = "fp32"):
    values = {"method": method, "tangent": tangent, "tangent_warmup_steps": 1, "teacher_precision": precision}
    transformer = SanaTransformer(CONFIG)
    transformer.load_state_dict(standin.random_model(transformer))
    teacher = Embedded(transformer, torch.zeros(1, CONFIG.caption_width))
    return distill_stage(teacher, Noise(), Objective(**with_method(values)), activation_checkpointing=True)


def learnt(one, phase: str, step: int = 19) -> torch.Tensor:
    """Loss and gradient; in that step each loss tells how loud it is, by a backward pass of its own."""
    loss, _ = one.loss(phase, step, SampleRandom(0, step, phase, range(2)))
    loss.backward()
    return torch.cat(
        [loss.detach()[None], *(p.grad.flatten() for p in one.modules[phase].parameters() if p.grad is not None)]
    )


def test_compiled_blocks_learn_the_same():
    plain, compiled = stage(), stage()
    names = [*compiled.student.state_dict()]
    counter = CompileCounterWithBackend("eager")
    compiling.compile_blocks(compiled.compilable, counter)
    assert [*compiled.student.state_dict()] == names
    for phase in plain.modules:
        torch.testing.assert_close(learnt(compiled, phase), learnt(plain, phase), rtol=1e-4, atol=1e-5)
    assert counter.frame_count > 0


def test_each_network_is_compiled_and_an_average_is_not(tmp_path):
    one = stage("dmd2")
    compiling.compile_blocks(one.compilable, "eager")
    networks = [one.teacher.transformer, one.student.transformer, one.fake]
    assert all(block._compiled_call_impl for network in networks for block in network.transformer_blocks)
    trainer = Trainer(one, Schedule(steps=1, batch=2, lr=1e-4), tmp_path)
    assert not any(block._compiled_call_impl for block in trainer.average.transformer.transformer_blocks)


def test_forward_mode_stands_aside():
    one = stage(tangent="jvp")
    assert one.compilable == (one.teacher.transformer,)
    trunk = Embedded(SanaTransformer(standin.TRANSFORMER), torch.zeros(1, CONFIG.caption_width))
    assert ControlStage(trunk, Noise(), Objective()).compilable == ()
    assert len(ControlStage(trunk, Noise(), Objective(tangent="difference")).compilable) == 2
    assert len(ControlStage(trunk, Noise(), Objective(form="flow")).compilable) == 2


def test_a_machine_that_cannot_compile_is_named():
    message = r"--compile: .*; install a C\+\+ compiler \(apt install g\+\+\), or leave"
    none = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with none, pytest.raises(ValueError, match=message):
        compiling.check(torch.device("cpu"))
