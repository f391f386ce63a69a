"""Sections suspicious, parts, kernels, end, diffusers and compiled: where the time of an image goes."""

import functools
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.measure import PeakMemory, difference, wait
from benchmarks.networks import LONG, SHORT, prompt_of
from benchmarks.theirs import Theirs, version
from sprint_core.kernels import fused
from sprint_core.models.compiled import compile_in_place, require_compiler
from sprint_core.pipeline import Caption, Control

from .timing import Casts, Row, attempt, finite, graphed, kernels, milliseconds, most_common, rounded, synchronisations
from .world import Kept, World

BATCHES = (1, 4, 8, 16)
LARGE = 8  # a batch for the transformer alone
MODEL = "1.6B"


def _paint(ours: Kept, caption: "Caption | list[str]", count: int = 1, steps: int = 1, control: bool = False) -> Tensor:
    """The core's own pipeline."""
    controls = [Control(ours.net, _control_image(ours.size_px))] if control else []
    size = (ours.size_px, ours.size_px)
    return ours.pipeline.generate(caption, seeds=range(count), size=size, steps=steps, controls=controls)


@functools.cache
def _control_image(size_px: int) -> Tensor:
    """On the CPU, as images come from files."""
    image = torch.zeros(1, size_px, size_px, 3)
    image[:, size_px // 3] = 1.0
    return image


class _NewPrompts:
    """Another prompt at every call."""

    def __init__(self, tokens: int = SHORT):
        self.tokens, self.count = tokens, 0

    def __call__(self) -> str:
        self.count += 1
        return prompt_of(self.tokens, 1000 + self.count)


def _ways(ours: Kept) -> dict[str, Callable[[], Tensor]]:
    """One image in one step: with its prompt's embeddings kept, with a new prompt, with a ControlNet and a new hint."""
    kept, new = ours.pipeline.encode_text([prompt_of(SHORT, 0)]), _NewPrompts()
    return {
        "prompt_kept": lambda: _paint(ours, kept),
        "new_prompt": lambda: _paint(ours, [new()]),
        "controlnet": lambda: _paint(ours, kept, control=True),
    }


def suspicious(world: World, row: Row) -> None:
    """What waits for the device, what is cast where, which kernels run, and the most memory, in each way."""
    device = world.device
    ways = _ways(world.ours(MODEL))
    for name, paint in ways.items():
        row[name] = measured = {}
        for _ in range(2):
            paint()
        memory = PeakMemory(device)
        memory.start()
        measured["finite"] = finite(paint())
        measured["peak_mib"] = memory.used()
        with synchronisations(device) as waits:
            paint()
        measured |= {"waits": sum(waits.values()), "waits_by_line": most_common(waits)}
        with Casts() as casts:
            paint()
        measured |= {"operations": casts.operations, "casts": sum(casts.lines.values())}
        measured["casts_by_line"] = most_common(casts.lines)
        measured["kernels"] = attempt(functools.partial(kernels, paint, device))
    row["nan_check"] = _nan_checks(world)


def _nan_checks(world: World) -> Row:
    """Two ways to look for NaN in an image, on the device and on the CPU."""
    ways = {"all": lambda x: bool(torch.isfinite(x).all()), "sum": lambda x: bool(torch.isfinite(x.sum()))}
    places = {"device": world.device, "cpu": torch.device("cpu")}
    images = {place: torch.rand(1, world.size_px, world.size_px, 3, device=where) for place, where in places.items()}
    return {
        f"{way}_on_{place}": milliseconds(lambda look=look, image=image: look(image), places[place], world.runs)
        for way, look in ways.items()
        for place, image in images.items()
    }


def parts(world: World, row: Row) -> None:
    """Every part by itself, eager and as a CUDA graph."""
    for name, call in _parts(world):
        row[name] = _eager_and_graph(world, call)
    ours = world.ours(MODEL)
    for tokens in (SHORT, LONG):
        new = _NewPrompts(tokens)
        encoder = milliseconds(lambda new=new: ours.text_encoder.encode([new()]), world.device, world.runs)
        row[f"text_{tokens}"]["encoder"] = encoder


def _parts(world: World) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each by its name; of both transformers also a large batch."""
    for model in ("0.6B", MODEL):
        ours = world.ours(model)
        yield f"step_{model}", functools.partial(ours.step, 1)
        yield f"step_{model}_batch_{LARGE}", functools.partial(ours.transformer, **ours.batch_inputs(LARGE))
    ours = world.ours(MODEL)
    ways = {"controlnet": ours.branch, "decode": ours.decode, "encode": ours.encode, "taesana_decode": ours.draft}
    for name, way in ways.items():
        yield name, functools.partial(way, 1)
    for tokens in (SHORT, LONG):
        yield f"text_{tokens}", functools.partial(_gemma, ours, *_gemma_inputs(ours, tokens))
    yield "prefill", functools.partial(_gemma, ours, _prefix_ids(ours), None)


def kernels_of_ours(world: World, row: Row) -> None:
    """Every part with and without the kernels of sprint_core/kernels, in turn: how far apart, and how fast."""
    if world.device.type == "cuda" and fused.source() is None:
        raise ValueError("there is no Triton")
    for name, call in _parts(world):
        row[name] = attempt(functools.partial(_with_and_without_kernels, world, call))


def _with_and_without_kernels(world: World, call: Callable[[], Tensor]) -> Row:
    switch = functools.partial(mock.patch.object, fused, "enabled")
    with switch(False):
        expected = call().float()
    started = time.perf_counter()
    with switch(True), mock.patch.object(fused, "launch", wraps=fused.launch) as launch:
        output = call().float()
    wait(world.device)
    measured: Row = {"launched": launch.call_count, "first_sec": rounded(time.perf_counter() - started)}  # compiles
    measured["largest"] = rounded(float(expected.abs().max()))
    measured["difference"] = rounded(float((output - expected).abs().max()))
    for way, on in {"plain": False, "fused": True}.items():
        with switch(on):
            measured[way] = _eager_and_graph(world, call)
    return measured


def _eager_and_graph(world: World, call: Callable[[], Tensor]) -> Row:
    def measure(way: Callable[..., Row]) -> Row:
        return attempt(lambda: way(call, world.device, world.runs))

    return {"eager": measure(milliseconds), "graph": measure(graphed)}


def _prefix_ids(ours: Kept) -> Tensor:
    return torch.tensor([list(ours.text_encoder.prompts.prefix_ids)], device=ours.device)


def _gemma_inputs(ours: Kept, tokens: int):
    """The prompt's own ids after the instruction's, and the instruction's states."""
    gemma, prefix = ours.text_encoder.gemma, _prefix_ids(ours)
    ids = ours.text_encoder.tokens(prompt_of(tokens, 0)).ids[prefix.shape[1] :]
    return torch.tensor([ids], device=ours.device), gemma.prefill(prefix)


def _gemma(ours: Kept, ids: Tensor, prefix) -> Tensor:
    return ours.text_encoder.gemma(ids, prefix=prefix)


def end(world: World, row: Row) -> None:
    """From a prompt to an image, and how many images a second."""
    ours, device, runs = world.ours(MODEL), world.device, world.runs
    for name, paint in _ways(ours).items():
        row[name] = milliseconds(paint, device, runs, warm_ups=2)
    one = ours.pipeline.encode_text([prompt_of(SHORT, 0)])
    for steps in (2, 4):
        row[f"steps_{steps}"] = milliseconds(lambda steps=steps: _paint(ours, one, steps=steps), device, runs, 2)
    memory = PeakMemory(device)
    for count in BATCHES[:2] if world.tiny else BATCHES:
        captions = ours.pipeline.encode_text([prompt_of(SHORT, 0)] * count)
        memory.start()
        measured = milliseconds(lambda n=count, c=captions: _paint(ours, c, n), device, 3, 1)
        measured["images_per_sec"] = rounded(1e3 * count / measured["ms"])
        row[f"batch_{count}"] = measured | {"peak_mib": memory.used()}


# --- beside diffusers -----------------------------------------------------------------------------------


def _theirs(world: World) -> Theirs:
    """On the weights of ours. Raises ValueError where diffusers is missing."""
    theirs = Theirs(world.ours(MODEL))
    theirs._caption = functools.cache(theirs._caption)
    return theirs


def diffusers(world: World, row: Row) -> None:
    """Both sides' parts in turn, eager, on the same weights."""
    try:
        row["version"] = version()
    except ValueError as error:
        row["skipped"] = str(error)
        return
    sides = {"theirs": _theirs(world), "ours": world.ours(MODEL)}
    for part in ("step", "decode", "encode", "text", "total"):
        row[part] = measured = {}
        outputs = {side: getattr(made, part)(1).float().cpu() for side, made in sides.items()}
        measured["difference"] = rounded(difference([outputs["ours"]], [outputs["theirs"]]))
        for side, made in sides.items():
            measured[side] = milliseconds(_seeded(made, part), world.device, world.runs, 1)
        measured["speed_up"] = rounded(measured["theirs"]["ms"] / measured["ours"]["ms"])


def _seeded(made, part: str) -> Callable[[], Tensor]:
    """A call of a part; of texts and images with a new prompt every time."""
    call, seed = getattr(made, part), [1]

    def turn() -> Tensor:
        seed[0] += part in ("text", "total")
        return call(seed[0])

    return turn


def compiled(world: World, row: Row) -> None:
    """torch.compile in its default mode: how long the first call takes, and what the next ones save.

    Last of all sections, as networks stay compiled.
    """
    require_compiler(world.device.type)
    ours = world.ours(MODEL)
    _compile(world, row, "step", ours.transformer, lambda: ours.step(1))
    _compile(world, row, "decode", ours.autoencoder.decoder, lambda: ours.decode(1))
    try:
        theirs = _theirs(world)
    except ValueError as error:
        row["theirs"] = {"skipped": str(error)}
        return
    row["theirs"] = {}
    _compile(world, row["theirs"], "step", theirs.transformer, lambda: theirs.step(1))
    _compile(world, row["theirs"], "decode", theirs.autoencoder.decoder, lambda: theirs.decode(1))


def _compile(world: World, row: Row, name: str, network: nn.Module, call: Callable[[], Tensor]) -> None:
    row[name] = measured = {"eager": milliseconds(call, world.device, world.runs)}
    expected = call().float().cpu()
    compile_in_place(network)
    started = time.perf_counter()
    output = call()
    wait(world.device)
    measured["compile_sec"] = rounded(time.perf_counter() - started)
    measured["compiled"] = milliseconds(call, world.device, world.runs)
    measured["difference"] = rounded(difference([output.float().cpu()], [expected]))
    measured["graph"] = attempt(lambda: graphed(call, world.device, world.runs))
