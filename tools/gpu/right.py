"""Sections card and right: what the device is, and whether it computes what the CPU computes."""

import contextlib
import copy
import functools
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sprint_core.emoji import judge
from sprint_core.emoji.captions import Requirement
from sprint_core.emoji.concepts import number_of
from sprint_core.images import edges
from sprint_core.models.autoencoder import Autoencoder
from sprint_core.models.autoencoder_config import SANA
from sprint_core.models.controlnet import ControlNetConfig, SanaControlNet
from sprint_core.models.gemma import Gemma, GemmaConfig
from sprint_core.models.tiny_autoencoder import TinyAutoencoder
from sprint_core.models.transformer import SanaTransformer
from sprint_core.pipeline import Control, Pipeline
from sprint_core.weights import checkpoint, layouts, presets

from .timing import Row, attempt, finite, milliseconds, rounded
from .world import SMALL_AUTOENCODER, SMALL_TEXT, SMALL_TRANSFORMER, World

GIB = 2**30
PROMPTS = ("a slice of pizza", "a cat on a blue background", "two red apples")
REQUIRED = (
    Requirement((number_of("pizza"),)),
    Requirement((number_of("cat"),), ground="blue"),
    Requirement((number_of("red apple"),), count=2),
)
BLOCKS = 3  # of the reduced transformers and text encoders


def card(world: World, row: Row) -> None:
    """Names, versions, memory, and the two figures that everything else is measured against."""
    device, size = world.device, 256 if world.tiny else 8192
    row |= {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {"name": properties.name, "gib": rounded(properties.total_memory / GIB)}
        row |= {"capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
        row |= {"processors": properties.multi_processor_count, "cudnn": torch.backends.cudnn.version()}
        row["driver"] = _driver()
    source = torch.ones(size, size, 4, device=device)
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source), device)["ms"]
    row["copy_gb_per_sec"] = rounded(2 * source.nbytes / copy_ms / 1e6)  # read and written
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product_ms = milliseconds(lambda a=a, b=b: a @ b, device, runs=5)["ms"]
        row[f"{dtype}_tflop_per_sec".removeprefix("torch.")] = rounded(2 * size**3 / product_ms / 1e9)
    small = torch.zeros(16, device=device)
    row["launch_us"] = rounded(milliseconds(lambda: [small.add_(1) for _ in range(1000)], device)["host_ms"])


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether fp32 products and convolutions may be rounded to TF32; torch's own default is convolutions alone."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# --- networks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One network and a call of it. build: with dtype and device; inputs: in fp32 on the CPU, as run takes them."""

    build: Callable[..., nn.Module]
    inputs: tuple[Tensor, ...]
    run: Callable[..., Tensor]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _cases(tiny: bool) -> dict[str, Case]:
    config = SMALL_TRANSFORMER if tiny else presets.PRESETS["sprint-0.6B"].transformer
    config = replace(config, depth=BLOCKS)
    text = SMALL_TEXT if tiny else GemmaConfig(vocab=2000, depth=BLOCKS)
    branch = ControlNetConfig(
        width=config.width,
        depth=BLOCKS - 1,
        cross_heads=config.cross_heads,
        caption_width=config.caption_width,
        qk_norm=True,
        guidance_embed=True,
        time_scale=1.0,
    )
    side = 4 if tiny else 16
    latent, caption = _normal(2, 32, side, side), _normal(2, 20, config.caption_width)
    times, guidance = torch.tensor([1.0, 0.4]), torch.tensor([4.5, 1.0])
    mask = (torch.arange(20) < torch.tensor([[20], [13]])).float()
    seen = latent, times, caption, guidance, mask
    ids = torch.randint(8, text.vocab, (2, 40), generator=torch.Generator().manual_seed(0))
    pixels = _normal(1, 3, 64 if tiny else 256, 64 if tiny else 256).clamp(-1, 1)
    raw = _normal(1, 32, 2 if tiny else 8, 2 if tiny else 8) / 0.41407
    published = functools.partial(Autoencoder, SMALL_AUTOENCODER if tiny else SANA)
    small = functools.partial(Autoencoder, SMALL_AUTOENCODER)
    encode, decode = (lambda net, x: net.encode(x)), (lambda net, x: net.decode(x))
    return {
        "transformer": Case(functools.partial(SanaTransformer, config), seen, lambda net, *x: net(*x)),
        "positions": Case(
            functools.partial(SanaTransformer, replace(config, pos_embed_base=8)), seen, lambda net, *x: net(*x)
        ),
        "controlnet": Case(
            functools.partial(SanaControlNet, branch),
            (*seen, latent.flip(0)),
            lambda net, x, s, c, g, m, hint: net(x, s, c, hint, g, m)[-1],
        ),
        "gemma": Case(functools.partial(Gemma, text), (ids,), lambda net, ids: net(ids)),
        "gemma_with_prefix": Case(
            functools.partial(Gemma, text),
            (ids,),
            lambda net, ids: net(ids[:, 15:], prefix=net.prefill(ids[:1, :15])),
        ),
        "dc_ae_small_encode": Case(small, (pixels,), encode),
        "dc_ae_small_decode": Case(small, (raw,), decode),
        "dc_ae_encode": Case(published, (pixels,), encode),
        "dc_ae_decode": Case(published, (raw,), decode),
        "dc_ae_tiled_decode": Case(small, (_normal(1, 32, 8, 8),), lambda net, x: net.decode_tiled(x, 128, 64)),
        "taesana_encode": Case(TinyAutoencoder, (pixels,), encode),
        "taesana_decode": Case(TinyAutoencoder, (raw,), decode),
    }


def _relative(x: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact values."""
    return rounded(float((x.float().cpu() - exact).norm() / exact.norm()))


def _cast(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


def _errors(case: Case, device: torch.device) -> Row:
    """Relative errors of the device against the CPU in fp32, of the same weights, made on the device from a seed."""
    torch.manual_seed(0)
    net = case.build(dtype=torch.float32, device=device).eval().requires_grad_(False)
    exact = case.run(copy.deepcopy(net).cpu(), *case.inputs)
    inputs = [_cast(x, device, torch.float32) for x in case.inputs]
    row = {}
    for name, allowed in {"fp32": False, "tf32_convolutions": True}.items():
        with tf32(allowed):
            row[name] = _relative(case.run(net, *inputs), exact)
    rough = case.build(dtype=torch.bfloat16, device=device).eval().requires_grad_(False)
    rough.load_state_dict(net.state_dict())
    output = case.run(rough, *[_cast(x, device, torch.bfloat16) for x in case.inputs])
    return row | {"bf16": _relative(output, exact), "finite": finite(output)}


# --- the bundled model ----------------------------------------------------------------------------------


def _images(dtype: torch.dtype, device: torch.device, size: tuple[int, int] | None) -> dict[str, Tensor]:
    """What the bundled model paints in each of its ways, on the CPU."""
    pipeline = Pipeline.load(presets.BUNDLED, dtype=dtype, device=device)
    weights = checkpoint.load(presets.BUNDLED_CONTROL, layouts.CONTROLNET)
    net = checkpoint.build(weights, dtype=dtype, device=device)
    seeds = list(range(len(PROMPTS)))
    painted = {f"steps_{n}": pipeline.generate(PROMPTS, seeds=seeds, size=size, steps=n) for n in (1, 2, 4)}
    drawn = _drawing(pipeline.size_px if size is None else size[0])
    control = Control(net, edges.detect(drawn))
    painted["controlnet"] = pipeline.generate(PROMPTS, seeds=seeds, size=size, controls=[control])
    painted["image_to_image"] = pipeline.generate(PROMPTS, seeds=seeds, image=drawn, strength=0.6)
    return {way: images.float().cpu() for way, images in painted.items()}


def _drawing(size_px: int) -> Tensor:
    """A red square on white: [1, h, w, 3] in [0, 1]."""
    image = torch.ones(1, size_px, size_px, 3)
    image[:, size_px // 4 : size_px // 2, size_px // 4 : size_px // 2, 1:] = 0.0
    return image


def right(world: World, row: Row) -> None:
    """Each network, then the bundled model's images, against the CPU in fp32."""
    row["networks"] = {}
    for name, case in _cases(world.tiny).items():
        started = time.perf_counter()
        row["networks"][name] = attempt(functools.partial(_errors, case, world.device))
        row["networks"][name]["sec"] = rounded(time.perf_counter() - started)
    size = (64, 64) if world.tiny else None
    exact = _images(torch.float32, torch.device("cpu"), size)
    row["images"] = {"cpu": {way: _judged(images) for way, images in exact.items()}}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        with tf32(False):
            painted = _images(dtype, world.device, size)
        row["images"][name] = {way: _difference(images, exact[way]) for way, images in painted.items()}


def _judged(images: Tensor) -> Row:
    """How many images show what their prompts say."""
    return {"right": int(judge.judge(images, REQUIRED).names.sum())}


def _difference(images: Tensor, exact: Tensor) -> Row:
    """In 255ths: the largest, the mean, and the share of values that differ by more than one."""
    error = 255 * (images - exact).abs()
    measured = {
        "max": float(error.max()),
        "mean": float(error.mean()),
        "share_above_1": float((error > 1).float().mean()),
    }
    return {name: rounded(value) for name, value in measured.items()} | _judged(images)
