"""A live session: the pipeline's own images, and nothing computed again that did not change."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import standin
import torch
from torch import nn

from sprint_core import devices, fastest, sampler
from sprint_core import thread_count as threads
from sprint_core.images.frames import Frame
from sprint_core.live import LiveSession, Outdated, PipelinePainter
from sprint_core.models.autoencoder import EfficientViTBlock, ResBlock
from sprint_core.models.controlnet import AUTHORS
from sprint_core.models.transformer import SanaBlock
from sprint_core.pipeline import Control, Pipeline
from sprint_core.weights import checkpoint

WIDTH, HEIGHT = 96, 64
RANDOM = np.random.default_rng(1)
LINES = RANDOM.integers(0, 256, (HEIGHT, WIDTH), np.uint8)
PAINT = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
PLAIN = Frame(WIDTH, HEIGHT, "a red circle", seed=3, steps=2, denoise=0.5)
DRAWN = replace(PLAIN, lines=LINES.tobytes(), strength=0.7)
PAINTED = replace(PLAIN, paint=PAINT.tobytes(), denoise=0.6)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Pipeline:
    return Pipeline.load(standin.make(tmp_path_factory.mktemp("models") / "sprint"))


@pytest.fixture(scope="module")
def net():
    return checkpoint.build(standin.control(AUTHORS))


@pytest.fixture
def session(model, net) -> LiveSession:
    return LiveSession(PipelinePainter(model, net))


def levels(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("frame", [PLAIN, DRAWN, PAINTED, replace(DRAWN, paint=PAINTED.paint, denoise=0.4)])
def test_a_frame_is_the_pipelines_image(session, model, net, frame, steps):
    frame = replace(frame, steps=steps, guidance=4.0)
    image = LINES[..., None].repeat(3, axis=-1)
    expected = model.generate(
        [frame.text],
        seeds=[3],
        size=(WIDTH, HEIGHT),
        steps=steps,
        guidance=4.0,
        image=None if frame.paint is None else levels(PAINT),
        strength=1.0 if frame.paint is None else frame.denoise,
        controls=[] if frame.lines is None else [Control(net, levels(image), 0.7)],
    )
    session.paint(replace(frame, text="another", seed=8))
    assert torch.equal(session.paint(frame).image, expected)


@pytest.fixture
def calls(model, net, monkeypatch):
    """How often each network ran, by its name."""
    counts = dict.fromkeys(("text", "encoder", "control", "trunk", "decoder", "noise"), 0)
    networks = {
        "text": model.text_encoder.gemma,
        "encoder": model.autoencoder.encoder,
        "control": net,
        "trunk": model.transformer,
        "decoder": model.autoencoder.decoder,
    }

    def counted(name):
        def hook(*_):
            counts[name] += 1

        return hook

    hooks = [network.register_forward_hook(counted(name)) for name, network in networks.items()]
    noise = sampler.initial_noise
    monkeypatch.setattr(sampler, "initial_noise", lambda *args: [counted("noise")(), noise(*args)][1])
    yield counts
    for hook in hooks:
        hook.remove()


def test_what_did_not_change_is_not_computed_again(session, calls):
    other = LINES.copy()
    other[:8] = 255
    first, prompt = replace(DRAWN, text="a green ring"), replace(DRAWN, text="a blue square")
    moved = replace(first, lines=other.tobytes())
    # fmt: off
    steps = (  # frame                         text encoder control trunk decoder noise
        (first,                                (1,   1,      2,      2,    1,      1)),
        (first,                                (0,   0,      0,      0,    0,      0)),
        (replace(first, strength=0.5),         (0,   0,      2,      2,    1,      0)),
        (moved,                                (0,   1,      2,      2,    1,      0)),
        (replace(moved, seed=4),               (0,   0,      2,      2,    1,      1)),
        (prompt,                               (1,   1,      2,      2,    1,      1)),
        (replace(prompt, steps=1),             (0,   0,      1,      1,    1,      0)),
        (replace(prompt, strength=0.0),        (0,   0,      0,      2,    1,      0)),
        (replace(prompt, paint=PAINTED.paint), (0,   1,      2,      2,    1,      0)),
    )
    # fmt: on
    for frame, expected in steps:
        before = dict(calls)
        session.paint(frame)
        assert tuple(calls[name] - before[name] for name in calls) == expected, frame


def test_the_noise_of_later_steps_is_kept_too(session, monkeypatch):
    """Four steps draw three times; the same seed again, with fewer steps or more, draws no more of what it has."""
    drawn = []
    draw = sampler.StepNoise.__call__
    monkeypatch.setattr(sampler.StepNoise, "__call__", lambda self: drawn.append(1) or draw(self))
    for steps, total in ((2, 1), (4, 3), (3, 3), (1, 3)):
        session.paint(replace(DRAWN, steps=steps))
        assert len(drawn) == total


def test_black_lines_are_no_control(session, model):
    black = replace(DRAWN, lines=bytes(WIDTH * HEIGHT))
    assert black.empty and not session.steered(black) and session.steered(DRAWN)
    assert torch.equal(session.paint(black).image, session.paint(PLAIN).image)


def test_without_a_controlnet_lines_steer_nothing(model):
    session = LiveSession(PipelinePainter(model))
    assert torch.equal(session.paint(DRAWN).image, session.paint(PLAIN).image)


def test_stages_are_timed(session):
    first, again, moved = (session.paint(f).ms for f in (DRAWN, DRAWN, replace(DRAWN, seed=4)))
    assert list(first) == ["text", "control", "steps", "decode"] and min(first.values()) > 0
    assert not any(again.values())
    assert moved["steps"] > 0 and moved["text"] < first["text"]


class Timed:
    """A painter whose steps take so many milliseconds by torch's number of threads."""

    steers, on_cpu, networks = False, True, ()

    def __init__(self, ms: dict[int, float]):
        self.ms = ms
        self.counts: list[int] = []

    def encode_text(self, text):
        return text

    def encode_lines(self, image):
        raise AssertionError

    encode_paint = encode_lines

    def sample(self, frame, caption, noise, hint, start):
        self.counts.append(torch.get_num_threads())
        if frame.text == "broken":
            raise ValueError("broken")
        time.sleep(self.ms[self.counts[-1]] / 1000)
        return torch.full((1, 1), float(self.counts[-1]))

    def decode(self, latent):
        return latent

    def in_bf16(self):
        return None


@pytest.fixture
def two_threads():
    with threads.threads(2):
        yield


def test_hurried_frames_take_the_number_of_threads_that_is_fastest(two_threads, monkeypatch):
    """Each is tried twice, the slower again after a while; when the machine changes its mind, so does the choice."""
    monkeypatch.setattr(fastest, "AGAIN", 12)
    painter = Timed({1: 1.0, 2: 12.0})
    session = LiveSession(painter)
    frames = [replace(PLAIN, seed=seed) for seed in range(40)]
    for frame in frames[:13]:
        session.paint(frame, hurried=True)
    assert painter.counts == [1, 2, 1, 2, *[1] * 8, 2] and torch.get_num_threads() == 2
    painter.ms = {1: 24.0, 2: 12.0}
    for frame in frames[13:19]:
        session.paint(frame, hurried=True)
    assert painter.counts[13:] == [1] * 5 + [2]
    session.paint(frames[19], hurried=True)
    session.paint(frames[19], hurried=True)  # the same again is kept, and tells nothing
    assert painter.counts[19:] == [2]


def test_every_slower_way_has_its_turn_again():
    """So that what was slow while the machine was busy is found once it is not."""
    ways = fastest.Fastest(["a", "b", "c", "d"])
    ms = {"a": 100.0, "b": 120.0, "c": 150.0, "d": 200.0}
    for i in range(1200):
        if i == 20:
            ms = {"a": 95.0, "b": 110.0, "c": 60.0, "d": 40.0}
        chosen = ways.choice("kind")
        ways.note("kind", chosen, ms[chosen])
    assert chosen == "d"


def test_the_last_image_is_painted_by_all_threads(two_threads):
    painter = Timed({1: 0.0, 2: 9.0})
    session = LiveSession(painter)
    for seed in range(6):
        session.paint(replace(PLAIN, seed=seed), hurried=True)
    assert session.paint(replace(PLAIN, seed=5)).image.item() == 2.0
    assert painter.counts == [1, 2, 1, 2, 1, 1, 2]
    painter.on_cpu = False
    assert session.paint(replace(PLAIN, seed=6), hurried=True).image.item() == 2.0


def test_a_count_whose_frames_are_given_up_is_not_chosen_for_ever(two_threads):
    """One thread would take longer than any stroke; what is known by then is that it does."""
    painter = Timed({1: 500.0, 2: 4.0})
    painter.networks = [nn.ModuleList([nn.Identity()])]

    def sample(frame, caption, noise, hint, start):
        painter.counts.append(torch.get_num_threads())
        ends = time.monotonic() + painter.ms[painter.counts[-1]] / 1000
        while time.monotonic() < ends:
            painter.networks[0][0](caption)  # where it is asked whether the frame is still wanted
        return torch.zeros(1, 1)

    painter.sample = sample
    session = LiveSession(painter)
    for seed in range(20):
        ends = time.monotonic() + 0.03
        with contextlib.suppress(Outdated):
            frame = replace(PLAIN, seed=seed)
            session.paint(frame, hurried=True, wanted=lambda ends=ends: time.monotonic() < ends)
    assert painter.counts[:4] == [1, 2, 1, 2] and painter.counts.count(1) <= 4 and painter.counts[-8:] == [2] * 8


@pytest.mark.parametrize("bf16_ms", [1.0, 24.0])
def test_bf16_is_taken_where_it_is_faster(two_threads, bf16_ms):
    """By frames in flight, each way in its turn first; the last image of a run is never painted so."""
    painter, other = Timed({1: 8.0, 2: 12.0}), Timed({1: bf16_ms, 2: 40.0})
    painter.in_bf16 = lambda: other
    other.decode = lambda latent: latent + 0.5
    session = LiveSession(painter)
    images = [session.paint(replace(PLAIN, seed=seed), hurried=True).image.item() for seed in range(12)]
    assert images == [1.0, 2.0, 1.5, 2.5] * 2 + [1.5 if bf16_ms < 8 else 1.0] * 4
    assert session.paint(replace(PLAIN, seed=11)).image.item() == 2.0


def test_what_is_painted_in_bf16_is_asked_for_too(two_threads):
    painter, other = Timed({1: 0.0, 2: 0.0}), Timed({1: 0.0, 2: 0.0})
    painter.in_bf16 = lambda: other
    other.networks = [nn.ModuleList([nn.Identity()])]
    other.decode = other.networks[0][0]
    session = LiveSession(painter)
    for seed in range(2):
        session.paint(replace(PLAIN, seed=seed), hurried=True, wanted=lambda: False)
    with pytest.raises(Outdated):
        session.paint(replace(PLAIN, seed=2), hurried=True, wanted=lambda: False)


def test_only_the_auto_encoder_is_in_bf16(model, net, monkeypatch):
    monkeypatch.setattr(devices, "cpu_multiplies_bf16", lambda: True)
    painter = PipelinePainter(model, net)
    other = painter.in_bf16()
    dtypes = [next(network.parameters()).dtype for network in other.networks]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32] and other.in_bf16() is None
    assert next(model.autoencoder.parameters()).dtype == torch.float32
    images = [LiveSession(one).paint(replace(DRAWN, paint=PAINTED.paint)).image for one in (painter, other)]
    assert 0 < (images[0] - images[1]).abs().mean() < 0.01
    monkeypatch.setattr(devices, "cpu_multiplies_bf16", lambda: False)
    assert painter.in_bf16() is None


def test_threads_are_put_back_after_a_fault_and_others_keep_theirs(two_threads):
    session = LiveSession(Timed({1: 0.0, 2: 0.0}))
    with pytest.raises(ValueError, match="broken"):
        session.paint(replace(PLAIN, text="broken"), hurried=True)
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2
        with threads.threads(1):
            assert (torch.get_num_threads(), pool.submit(torch.get_num_threads).result()) == (1, 2)


def test_a_hurried_image_is_the_pipelines_but_for_rounding(session, two_threads):
    hurried = session.paint(DRAWN, hurried=True).image
    torch.testing.assert_close(hurried, session.paint(DRAWN).image, rtol=1e-3, atol=1e-4)


def test_a_frame_is_given_up_between_any_two_blocks(session, model, net):
    """After so many of them, whichever those are; what is painted next is as if nothing had been."""
    networks = (model.transformer, model.autoencoder.encoder, model.autoencoder.decoder, net)
    begun = dict.fromkeys(networks, 0)
    hooks = [one.register_forward_pre_hook(lambda m, _: begun.update({m: begun[m] + 1})) for one in networks]
    other, reached = replace(DRAWN, seed=9), set()
    expected = session.paint(other).image
    asked = []

    def hooked():
        return {m for one in networks for m in one.modules() if m._forward_pre_hooks}

    LiveSession(session.painter).paint(DRAWN, hurried=True, wanted=lambda: asked.append(hooked()) or True)
    blocks = [m for one in networks for m in one.modules() if isinstance(m, (ResBlock, EfficientViTBlock, SanaBlock))]
    assert len(asked) > len(blocks) > 10 and asked[0] >= {*blocks} - {net.base_block}  # with which a branch begins
    for count in range(len(asked)):
        left = iter(range(count))
        fresh = LiveSession(session.painter)
        begun.update(dict.fromkeys(networks, 0))
        with pytest.raises(Outdated):
            fresh.paint(DRAWN, hurried=True, wanted=lambda left=left: next(left, None) is not None)
        reached.add(max((i for i, one in enumerate((*networks[1:2], net, networks[0], networks[2])) if begun[one])))
    assert reached == {0, 1, 2, 3}  # in the encoder, the ControlNet, the transformer and the decoder
    assert torch.equal(fresh.paint(other).image, expected)
    for hook in hooks:
        hook.remove()
    assert not any(module._forward_pre_hooks for network in networks for module in network.modules())


def test_a_frame_on_a_gpu_is_not_asked_for(session, monkeypatch):
    """There the processor is far ahead of what is computed."""
    monkeypatch.setattr(session.painter, "on_cpu", False)
    session.paint(DRAWN, hurried=True, wanted=lambda: False)
