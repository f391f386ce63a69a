"""What a stage is said to take, against the same stage really run."""

import dataclasses
import functools
import json

import pytest
import standin
import torch
from picture_files import plain, write
from tiny_recipe import tiny, write_pictures  # noqa: F401
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sprint_core.devices import DTYPES
from sprint_core.distill import __main__ as command
from sprint_core.distill import recipes
from sprint_core.distill.dataset.batch import Batch
from sprint_core.distill.engine.processes import ProcessGroup
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.engine.stage import Stage
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.recipes import CAME_BETAS, Objective, Schedule, with_method
from sprint_core.distill.runs import encoded_size, estimate
from sprint_core.distill.stages.base import Embedded
from sprint_core.distill.stages.rivals import distill_stage
from sprint_core.distill.stages.teacher import TeacherStage
from sprint_core.models.gemma import GemmaConfig
from sprint_core.models.transformer import SanaTransformer
from sprint_core.weights import checkpoint, layouts, presets

LATENT, CAPTION = (32, 2, 2), (11, standin.TEACHER.caption_width)
STAGES = {"teacher": ["teacher"], "distill": ["critic", "student"]}  # and their phases


class Zeros:
    """As estimate.MetaDataset, with numbers."""

    fingerprint = "zeros"

    def batch(self, random: SampleRandom) -> Batch:
        return Batch(torch.zeros(len(random), *LATENT), [torch.zeros(CAPTION)] * len(random))


def stage(name: str, device: str, checkpointing: bool = False, **objective) -> tuple[Stage, list[nn.Module]]:
    """A stage, and what is frozen in it."""
    data = Zeros() if device == "cpu" else estimate.MetaDataset(LATENT, CAPTION)
    model = Embedded(SanaTransformer(standin.TEACHER, device=device), torch.zeros(CAPTION, device=device))
    if name == "teacher":
        return TeacherStage(model, data, activation_checkpointing=checkpointing), []
    objective = Objective(**with_method(objective))
    distill = distill_stage(model, data, objective, activation_checkpointing=checkpointing)
    return distill, [distill.teacher]


@functools.cache
def counted(name: str, **schedule) -> estimate.Estimate:
    schedule = Schedule(**{"steps": 2, "batch": 4, "lr": 1e-3, "micro_batch": 2} | schedule)
    return estimate.estimate(*stage(name, "meta", schedule.activation_checkpointing), schedule)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_operations_are_those_of_the_stage_itself(name, checkpointing):
    """Counted on the CPU, with attention in single operations, as the counter knows them."""
    found = counted(name, activation_checkpointing=checkpointing)
    assert [phase.name for phase in found.phases] == STAGES[name]
    for phase in found.phases:
        real, _ = stage(name, "cpu", checkpointing)
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with math, FlopCounterMode(display=False) as counter:
            real.loss(phase.name, 0, SampleRandom(0, 0, "", range(2)))[0].backward()
        assert phase.flops == counter.get_total_flops() > 1e6
    assert found.per_step == sum(phase.flops for phase in found.phases) / len(found.phases) * 2  # micro-batches


@pytest.mark.parametrize("name", STAGES)
def test_activation_checkpointing_trades_memory_for_operations(name):
    kept, checkpointed = counted(name), counted(name, activation_checkpointing=True)
    assert kept.state_bytes == checkpointed.state_bytes
    for a, b in zip(kept.phases, checkpointed.phases, strict=True):
        if a.name == "critic":  # its trunk is frozen, so that it keeps nothing anyway
            assert (a.saved_bytes, a.flops) == (b.saved_bytes, b.flops)
        else:
            assert b.saved_bytes < a.saved_bytes / 4 and a.flops < b.flops < 1.34 * a.flops


@pytest.mark.parametrize(
    ("optimizer", "betas", "teacher", "method"),
    [
        ("adamw", (0.9, 0.95), "fp32", "scm"),
        ("adamw", (0.9, 0.95), "bf16", "scm"),
        ("adamw", (0.9, 0.95), "fp32", "dmd2"),
        ("adamw", (0.9, 0.95), "fp32", "dmd"),
        ("came", CAME_BETAS, "fp32", "scm"),
    ],
)
def test_memory_is_what_a_trainer_holds(optimizer, betas, teacher, method, tmp_path):
    """Weights, gradients, moments, average and the frozen teacher; CAME's second moments are small, and not counted."""
    schedule = Schedule(steps=2, batch=2, lr=1e-3, optimizer=optimizer, betas=betas)
    real, (frozen,) = stage("distill", "cpu", teacher_precision=teacher, method=method)
    found = estimate.estimate(*stage("distill", "meta", teacher_precision=teacher, method=method), schedule)
    trainer = Trainer(real, schedule, tmp_path)
    trainer.train()
    learning = [real.modules[name] for name in {phase.module for phase in real.plan}]  # DMD has no critic
    parts = [*real.modules.values(), *learning, trainer.average, frozen]  # these twice, for their gradients
    held = sum(p.nbytes for part in parts for p in part.parameters())
    states = [state for optimizer in trainer.optimizers.values() for state in optimizer.state.values()]
    held += sum(value.nbytes for state in states for value in state.values() if value.ndim)
    if method != "scm":  # nothing learns sCM's weight, so that it has no moments
        held += sum(2 * p.nbytes for p in real.student.log_variance.parameters())
    assert found.state_bytes == held if optimizer == "adamw" else 0.8 * held < found.state_bytes < held
    saved = trainer.state_file.stat().st_size
    least = saved - 200_000 if optimizer == "adamw" else 0.75 * saved  # names and shapes lie there, too
    assert least < found.checkpoint_bytes < saved
    assert {p.dtype for p in frozen.parameters()} == {DTYPES[teacher]}
    assert found.trained == sum(p.numel() for module in learning for p in module.parameters())


class Layers(Stage):
    """A frozen layer and two that learn."""

    name = averaged = "layers"

    def __init__(self):
        self.frozen = nn.Linear(8, 16, device="meta").requires_grad_(False)
        super().__init__({self.name: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16)).to("meta")}, {})

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[torch.Tensor, dict]:
        x = self.frozen(random.normal(8).to("meta"))
        _ = (x @ self.modules[self.name][0].weight.T).exp()  # a graph that nothing needs
        return self.modules[self.name](x).matmul(self.frozen.weight).sum(), {}


def test_kept_is_what_the_backward_pass_needs():
    """Input and output of the ReLU's layers, once each; no weight, not even the frozen; nothing of a dropped graph."""
    layers = Layers()
    found = estimate.estimate(layers, [layers.frozen], Schedule(steps=1, batch=5, lr=1e-3))
    assert found.phases[0].saved_bytes == 4 * 5 * (16 + 8)


def test_processes_share_the_work():
    schedule = Schedule(steps=2, batch=4, lr=1e-3)
    alone, shared = (
        estimate.estimate(*stage("teacher", "meta"), schedule, ProcessGroup(world_size=world)) for world in (1, 2)
    )
    assert shared.per_step == alone.per_step / 2 and shared.state_bytes == alone.state_bytes
    with pytest.raises(ValueError, match="does not divide"):
        estimate.estimate(*stage("teacher", "meta"), schedule, ProcessGroup(world_size=3))


def test_parts_are_a_share_of_what_learns_and_once_a_network():
    """AdamW's: weights, average, gradients and two moments of each process's part; the frozen teacher stays whole."""
    schedule = Schedule(steps=2, batch=4, lr=1e-3)
    made, (frozen,) = stage("distill", "meta")
    found = estimate.estimate(made, [frozen], schedule, ProcessGroup(world_size=4, shards=True))
    modules = (*made.modules.values(), frozen)
    student, critic, teacher = (4 * sum(p.numel() for p in module.parameters()) for module in modules)
    assert found.state_bytes == 5 * student // 4 + student + 4 * critic + teacher


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("recipe", ["shapes", "tiny"])
def test_dry_run_prints_every_stage_and_writes_nothing(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "MATMUL_SIZE", 64)
    out = tmp_path / "out"
    assert command.main(["--recipe", recipe, "--out", str(out), "--dry-run", "--device", "cpu"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    stages = recipes.RECIPES[recipe].stages
    assert found["device"] == "cpu" and list(found["dry_run"]) == list(stages)
    disk = ["disk, at most"] if recipe == "tiny" else []
    assert [line.partition(":")[0] for line in lines] == [*stages, *disk]
    assert all(min(numbers.values()) > 0 for numbers in found["dry_run"].values())
    assert "M parameters trained; memory" in lines[0] and "s a step" in lines[0]
    assert not list(tmp_path.iterdir())


def test_the_demo_has_the_sizes_of_the_bundled_model():
    """A stage for each part of the bundled file; a teacher has no guidance embedding."""
    recipe = recipes.RECIPES["demo"]
    parts = {"autoencoder": layouts.AUTOENCODER, "captioning": layouts.TEXT_ENCODER, "teacher": layouts.TRANSFORMER}
    few = {name: dataclasses.replace(recipe.stages[name], batch=2) for name in parts}
    for one in estimate.of_recipe(dataclasses.replace(recipe, stages=few)):
        tensors = checkpoint.load(presets.BUNDLED, parts[one.stage]).tensors
        assert one.trained == sum(t.numel() for name, t in tensors.items() if "guidance" not in name)


def test_the_disk_that_a_full_size_run_takes(tmp_path):
    """Of what files hold by their own account: shapes and types, of the largest image and the longest caption."""
    published, control = recipes.RECIPES["sprint-1.6B"], recipes.RECIPES["control"]
    latent, embedding = torch.empty(32, 32, 32).half().nbytes, torch.empty(300, 2304).bfloat16().nbytes
    found = encoded_size.of_recipe(published, None, text_cache=True)
    assert found.parts == {"latents": latent, "text cache": embedding} and found.count == 0
    assert found.text() == "disk, at most: for an image latents 64 KiB, text cache 1.32 MiB"
    assert encoded_size.of_recipe(control, None, text_cache=False).parts == {
        "latents": latent,
        "hints": latent,
        "text cache": 0,
    }
    write(tmp_path, {f"{n}.png": plain() for n in range(3)} | {f"{n}.txt": "x" for n in range(3)})
    found = encoded_size.of_recipe(published, tmp_path, text_cache=True)
    assert found.count == 3 and found.text().endswith("; 3 images: 4.14 MiB")
    write(tmp_path, {"prompts.txt": "one\n\ntwo\n"})
    of_prompts = encoded_size.of_recipe(published, tmp_path / "prompts.txt", text_cache=True)
    assert of_prompts.parts == {"text cache": embedding} and of_prompts.count == 2
    with pytest.raises(ValueError, match="no such file"):
        encoded_size.of_recipe(published, tmp_path / "gone", text_cache=True)


@pytest.mark.usefixtures("tiny")
def test_what_is_estimated_is_what_is_encoded(tmp_path, capsys, monkeypatch):
    """The largest latent of the tiny recipe, as training stores it."""
    monkeypatch.setattr(estimate, "MATMUL_SIZE", 64)
    options = ["--recipe", "tiny", "--out", str(tmp_path / "out"), "--dry-run", "--device", "cpu", "--no-text-cache"]
    assert command.main([*options, "--data", str(write_pictures(tmp_path / "data"))]) == 0
    disk = json.loads(capsys.readouterr().out.splitlines()[-1])["disk"]
    assert disk == {"bytes_per_image": {"latents": 32 * 2 * 2 * 2, "text cache": 0}, "images": 3}


@pytest.mark.parametrize("flop_per_sec, largest", [(1e6, 128), (1e9, 512), (1e15, 2048)])
def test_the_speed_of_products_is_measured_in_a_moment(flop_per_sec, largest, monkeypatch):
    """A CPU without bf16 instructions makes a thousandth of another's; each pretended product takes what it would."""
    sizes = []
    pretend = lambda size, device, dtype: sizes.append(size) or 2 * size**3 / flop_per_sec  # noqa: E731
    monkeypatch.setattr(estimate, "_matmul_sec", pretend)
    estimate.matmul_speed.cache_clear()
    assert estimate.matmul_speed(torch.device("cpu"), "bf16") == pytest.approx(flop_per_sec)
    estimate.matmul_speed.cache_clear()
    assert max(sizes) == largest and sizes == sorted(sizes)


def test_what_is_said_of_a_run():
    phase = estimate.Phase("distill", 6 * 10**12, 2**30)
    parts = {"weights": 2**29, "gradients": 3 * 2**29, "frozen networks": 0}
    found = estimate.Estimate("distill", 5_000_000, parts, (phase,), 6e12, 2400, 2**30, 2**29, keeps_best=True)
    assert found.text(2e12) == (
        "distill: 5.0 M parameters trained; memory 3.0 GiB (weights 0.5, gradients 1.5, activations 1.0); "
        "disk 2.5 GiB (its state twice, while it is written, and the best average), 0.5 more for each average that "
        "--keep-every keeps; 6 TFLOP and at least 3 s a step, 2400 steps; 2.0 h at that rate"
    )
    assert [estimate._duration(s) for s in (0.3, 59.4, 59.6, 720, 3590, 12600)] == [
        "0.3 s",
        "59 s",
        "1 min",
        "12 min",
        "1.0 h",
        "3.5 h",
    ]


def test_a_run_costs_what_its_steps_cost():
    """A phase that joins late counts from then on."""
    late, early = (
        estimate.estimate(*stage("distill", "meta", False, ladd_from=n), Schedule(steps=8, batch=2, lr=1e-3))
        for n in (4, 0)
    )
    flops = {phase.name: phase.flops for phase in early.phases}
    of_it = stage("distill", "meta", False, ladd_from=4)[0]
    runs = [phase.module for step in range(8) for phase in of_it.phases(step)]
    assert late.per_step == sum(flops[name] for name in runs) / 8 != early.per_step


def test_a_text_encoder_that_stays_is_counted():
    """gemma-2-2b's 2 614 341 888 parameters, as its report's table has them: 589 824 000 and 2 024 517 888."""
    found = counted("distill")
    (larger,) = estimate.with_text_encoder([found], GemmaConfig(), torch.bfloat16)
    assert larger.state_bytes - found.state_bytes == larger.memory_bytes - found.memory_bytes
    assert larger.state_bytes - found.state_bytes == 2 * (589_824_000 + 2_024_517_888)


def test_too_little_memory_is_refused_and_little_is_said(monkeypatch, caplog):
    found = counted("distill")
    monkeypatch.setattr(estimate, "free_bytes", lambda device: found.state_bytes - 1)
    with pytest.raises(ValueError, match=r"distill: cpu has 0\.0 GiB free; it needs .* choose a device with more"):
        estimate.check_memory([found], ProcessGroup())
    monkeypatch.setattr(estimate, "free_bytes", lambda device: found.memory_bytes - 1)
    estimate.check_memory([found], ProcessGroup())
    assert "fewer samples at a time help: --set distill.micro_batch=N" in caplog.text
    caplog.clear()
    monkeypatch.setattr(estimate, "free_bytes", lambda device: found.memory_bytes)
    estimate.check_memory([found], ProcessGroup())
    assert not caplog.text
