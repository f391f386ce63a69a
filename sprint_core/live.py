"""A live canvas without its canvas: frames in, images out, and nothing computed again that did not change.

    text -> caption ----------------.
    seed -> noise -------------------+-> 1 to 4 steps -> x0 -> image
    lines -> hint   paint -> start --'

Each arrow keeps what it made last, and what it made it from. A `Painter` makes the things on the right of the arrows:
`PipelinePainter` by the core's own networks, and the node's by ComfyUI's objects.
"""

import copy
import functools
import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import devices, sampler, trigflow
from .fastest import Fastest
from .images.frames import Frame
from .latent import DOWNSCALE, LATENT_CHANNELS
from .models.controlnet import SanaControlNet
from .pipeline import Caption, Control, Pipeline
from .thread_count import threads

STAGES = ("text", "control", "steps", "decode")


class SeedNoise:
    """The noise of one image: what it starts from, and what each further step adds, drawn once and kept."""

    def __init__(self, seed: int, width: int, height: int):
        shape = (LATENT_CHANNELS, height // DOWNSCALE, width // DOWNSCALE)
        self.initial = sampler.initial_noise([seed], shape)
        self._draw = sampler.StepNoise([seed], shape)
        self._drawn: list[Tensor] = []

    def steps(self) -> Callable[[], Tensor]:
        """For one run: each call returns the next step's noise [1, 32, h/32, w/32], fp32 on the CPU."""
        number = itertools.count()

        def step() -> Tensor:
            i = next(number)
            if i == len(self._drawn):
                self._drawn.append(self._draw())
            return self._drawn[i]

        return step


class Painter(Protocol):
    """The networks of a `LiveSession`. Its things are opaque: what one method returns, `sample` and `decode` take."""

    steers: bool  # whether it has a ControlNet
    on_cpu: bool  # where the number of threads counts
    networks: Sequence[nn.Module]  # that paint

    def encode_text(self, text: str) -> Any: ...

    def encode_lines(self, image: Tensor) -> Any:
        """Of a control image [1, h, w, 3] in [0, 1]; asked only of a painter that steers."""
        ...

    def encode_paint(self, image: Tensor) -> Tensor:
        """Image [1, h, w, 3] in [0, 1] -> latent, to start from."""
        ...

    def sample(self, frame: Frame, caption: Any, noise: SeedNoise, hint: Any | None, start: Tensor | None) -> Tensor:
        """A latent [1, 32, h/32, w/32]. hint: None without control; start: None for text-to-image."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Image [1, h, w, 3] in [0, 1]."""
        ...

    def in_bf16(self) -> "Painter | None":
        """The same with an auto-encoder in bf16, where a CPU may run that sooner than this one's; else None."""
        ...


@dataclass(frozen=True)
class Painted:
    """What a frame became. image: [1, h, w, 3] in [0, 1]; ms: milliseconds by stage, 0 where nothing was to be done."""

    image: Tensor
    latent: Tensor
    ms: dict[str, float]


class Outdated(BaseException):
    """A frame is given up, as it is no longer wanted. No fault, which a host on the way might take for its own."""


class Way(NamedTuple):
    """How a hurried frame is painted."""

    threads: int
    bf16: bool  # of the auto-encoder


class _Kept:
    """A result and what it was made from."""

    def __init__(self) -> None:
        self.key: Hashable = object()
        self.value: Any = None

    def __call__(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key != self.key:
            self.value, self.key = make(), key
        return self.value


class LiveSession:
    """Paints frame after frame with one painter."""

    def __init__(self, painter: Painter):
        self.painter = painter
        self._caption, self._noise, self._hint, self._start = _Kept(), _Kept(), _Kept(), _Kept()
        self._painted = _Kept()

    def steered(self, frame: Frame) -> bool:
        """Whether the ControlNet acts: not without lines, and an all-black control image is none."""
        return self.painter.steers and frame.lines is not None and frame.strength > 0.0 and not frame.empty

    def paint(self, frame: Frame, hurried: bool = False, wanted: Callable[[], bool] | None = None) -> Painted:
        """The image of a frame. Raises what the painter does.

        hurried: on a CPU, in the way that proves fastest, which may change the image a little: by the number of threads
        in its last bits, by an auto-encoder in bf16 by a few levels of 255 (docs/benchmarks.md). wanted: asked there
        before each block of the networks; Outdated is raised once it is not.
        """
        if not (hurried and self.painter.on_cpu):
            return self._timed_paint(frame, self.painter)
        kind = (frame.steps, frame.size, self.steered(frame), frame.paint is not None)
        way = self._fastest.choice(kind)
        painter, blocks = self._painters[way.bf16]
        begun = time.perf_counter()
        try:
            with threads(way.threads), asked_often(wanted, blocks):
                painted = self._timed_paint(frame, painter)
        except Outdated:
            self._fastest.note_given_up(kind, way, 1000 * (time.perf_counter() - begun))
            raise
        if painted.ms["steps"]:  # it was not kept from before
            self._fastest.note(kind, way, sum(painted.ms.values()) - painted.ms["text"])
        return painted

    @functools.cached_property
    def _painters(self) -> list[tuple[Painter, list[nn.Module]]]:
        """Of hurried frames, with the blocks of their networks; the second one, where there is one, in bf16."""
        return [(one, blocks_of(one.networks)) for one in (self.painter, self.painter.in_bf16()) if one is not None]

    @functools.cached_property
    def _fastest(self) -> Fastest[Way]:
        counts = sorted({1, torch.get_num_threads()})
        return Fastest([Way(count, bool(i)) for i in range(len(self._painters)) for count in counts])

    def _timed_paint(self, frame: Frame, painter: Painter) -> Painted:
        ms: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        way = Way(torch.get_num_threads(), painter is not self.painter)
        latent, image = self._painted((frame, way), lambda: self._paint(frame, painter, way, ms))
        return Painted(image, latent, ms)

    def _paint(self, frame: Frame, painter: Painter, way: Way, ms: dict[str, float]) -> tuple[Tensor, Tensor]:
        hint, start = None, None
        with _timed(ms, "text"):
            caption = self._caption((frame.text, way.threads), lambda: painter.encode_text(frame.text))
        with _timed(ms, "control"):
            if self.steered(frame):
                hint = self._hint((frame.lines, frame.size, way), lambda: painter.encode_lines(frame.control_image()))
            if frame.paint is not None:
                start = self._start((frame.paint, frame.size, way), lambda: painter.encode_paint(frame.sheet()))
        with _timed(ms, "steps"):
            noise = self._noise((frame.seed, frame.size), lambda: SeedNoise(frame.seed, *frame.size))
            latent = painter.sample(frame, caption, noise, hint, start)
        with _timed(ms, "decode"):
            return latent, painter.decode(latent)


def blocks_of(networks: Sequence[nn.Module]) -> list[nn.Module]:
    """What lies in lists and sequences of the networks: nothing between two of them takes long."""
    kinds = nn.ModuleList, nn.Sequential
    lists = (part for network in networks for part in network.modules() if isinstance(part, kinds))
    return [block for part in lists for block in part]


@contextmanager
def asked_often(wanted: Callable[[], bool] | None, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Before each of the blocks runs; Outdated is raised out of it when the answer is no. None: never."""
    if wanted is None:
        yield
        return

    def ask(*_: Any) -> None:
        if not wanted():
            raise Outdated

    handles = [block.register_forward_pre_hook(ask) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _timed(ms: dict[str, float], stage: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    ms[stage] = (time.perf_counter() - begun) * 1000


def sigmas_of(frame: Frame) -> Tensor:
    """Flow times [steps + 1] by the paper's schedule; denoise counts where there is paint to start from."""
    return torch.tensor(trigflow.sigmas("auto", frame.steps, 1.0 if frame.paint is None else frame.denoise))


class PipelinePainter:
    """The painter of the core's own networks."""

    def __init__(self, pipeline: Pipeline, control: SanaControlNet | None = None):
        self.pipeline, self.control = pipeline, control
        self.steers = control is not None
        self.on_cpu = next(pipeline.transformer.parameters()).device.type == "cpu"
        self.networks: Sequence[nn.Module] = [pipeline.transformer, pipeline.autoencoder, *filter(None, [control])]

    def encode_text(self, text: str) -> Caption:
        return self.pipeline.encode_text([text])

    def encode_lines(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image, self.encode_paint(image)

    @torch.inference_mode()
    def encode_paint(self, image: Tensor) -> Tensor:
        return self.pipeline.encode_image(image)

    @torch.inference_mode()
    def sample(
        self, frame: Frame, caption: Caption, noise: SeedNoise, hint: tuple[Tensor, Tensor] | None, start: Tensor | None
    ) -> Tensor:
        device = next(self.pipeline.transformer.parameters()).device
        sigmas, z, step = sigmas_of(frame), noise.initial.to(device), noise.steps()
        x_s = trigflow.flow_add_noise(torch.zeros_like(z) if start is None else start, z, sigmas[0])
        controls, hints = [], []
        if hint is not None and self.control is not None:
            controls, hints = [Control(self.control, hint[0], frame.strength)], [hint[1]]
        denoise = self.pipeline.denoiser(*caption, frame.guidance, controls, hints=hints)
        return sampler.sample(denoise, x_s, sigmas, lambda: step().to(device))

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> Tensor:
        return self.pipeline.decode(latent)

    def in_bf16(self) -> "PipelinePainter | None":
        whole = self.pipeline.autoencoder
        if not (self.on_cpu and devices.cpu_multiplies_bf16()) or next(whole.parameters()).dtype != torch.float32:
            return None
        pipeline = copy.copy(self.pipeline)
        pipeline.autoencoder = devices.copied(whole, torch.bfloat16)
        return PipelinePainter(pipeline, self.control)
