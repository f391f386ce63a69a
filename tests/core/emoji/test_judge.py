"""The judge of emoji: true scenes are right, and whatever is wrong is refused for that reason alone."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.ExifTags import Base

from sprint_core.emoji import captions, judge, scenes, templates
from sprint_core.emoji.captions import Requirement
from sprint_core.emoji.concepts import concepts

REASONS = ("names", "ground", "style", "place", "order", "number")
LABELS = [concept.label for concept in concepts()]
CAT, PIZZA, ROCKET = (LABELS.index(label) for label in ("cat face", "pizza", "rocket"))
ONE = Requirement((PIZZA,), ground="teal", style=1)
PLACED = replace(ONE, place=(0, 2))
PAIR = Requirement((CAT, PIZZA), relation="left", ground="blue to purple")
THREE = Requirement((ROCKET,), count=3)


@pytest.fixture(scope="module")
def art():
    return templates.load().art()


@pytest.fixture(scope="module")
def paint(art):
    """True images of requirements, [b, 3, 256, 256], painted with sprites as coarse as the thumbnails."""

    def painted(*requirements, seed=0):
        rng = random.Random(seed)
        return scenes.paint(scenes.pack([scenes.compose(r, rng) for r in requirements]), art)

    return painted


def reasons(image, requirement):
    verdicts = judge.judge(image, [requirement])
    assert verdicts.right.item() == all(getattr(verdicts, name).item() for name in REASONS)
    return {name for name in REASONS if not getattr(verdicts, name).item()}


@pytest.fixture(scope="module")
def held_out(paint):
    requirements = [prompt.requirement for prompt in captions.prompts(120, seed=5)]
    return requirements, paint(*requirements).float() / 255.0


def test_true_scenes_are_right(held_out):
    requirements, images = held_out
    verdicts = judge.judge(images, requirements)
    assert verdicts.right.all() and (verdicts.ranks.amax(1) == 1).all()
    said = [(*r.concepts * r.count, -1, -1, -1, -1)[: scenes.THINGS] for r in requirements]
    assert verdicts.nearest.tolist() == [list(row) for row in said]


def test_blur_and_shift_do_no_harm(held_out):
    requirements, images = held_out
    blurred = F.interpolate(F.adaptive_avg_pool2d(images, 32), 256, mode="bilinear")
    verdicts = judge.judge(blurred, requirements)
    assert verdicts.names.float().mean() >= 0.98 and verdicts.right.float().mean() >= 0.95
    shifted = F.pad(images, (6, 6, 6, 6), mode="replicate")[..., 12:, :-12]
    assert judge.judge(shifted, requirements).names.float().mean() >= 0.98


def test_a_cast_of_colour_leaves_most_names(held_out):
    requirements, images = held_out
    cast = 0.15 * torch.randn(len(images), 3, 1, 1, generator=torch.Generator().manual_seed(0))
    assert judge.judge((images + cast).clamp(0, 1), requirements).names.float().mean() >= 0.8


def test_layouts_sizes_and_dtypes_are_alike(paint):
    image = paint(PAIR)
    channels_last = image.movedim(1, -1).float() / 255.0
    doubled = F.interpolate(channels_last.movedim(-1, 1), scale_factor=2.0)
    for other in (image, channels_last, channels_last.half(), doubled):
        assert reasons(other, PAIR) == set()


@pytest.mark.parametrize(
    ("shown", "said", "wrong"),
    [
        (ONE, replace(ONE, concepts=(CAT,)), {"names"}),
        (ONE, replace(ONE, ground="green"), {"ground"}),
        (replace(ONE, ground="purple to black"), replace(ONE, ground="purple"), {"ground"}),
        (ONE, replace(ONE, style=0), {"style"}),
        (replace(ONE, size="small"), ONE, {"place"}),
        (PLACED, replace(PLACED, place=(2, 0)), {"place"}),
        (PLACED, replace(PLACED, place=(0, 1)), {"place"}),
        (replace(PLACED, place=None), PLACED, {"place"}),
        (PAIR, replace(PAIR, concepts=(PIZZA, CAT)), {"order"}),
        (PAIR, replace(PAIR, relation="above"), {"order"}),
        (PAIR, replace(PAIR, concepts=(CAT, ROCKET)), {"names"}),
        (THREE, replace(THREE, count=2), {"number"}),
        (THREE, replace(THREE, count=4), {"number"}),
        (THREE, replace(THREE, count=1), {"number"}),
        (replace(THREE, count=1), THREE, {"number"}),
        (THREE, replace(THREE, concepts=(CAT,)), {"names"}),
    ],
)
def test_what_is_wrong_is_refused(paint, shown, said, wrong):
    image = paint(shown)
    assert reasons(image, shown) == set()
    assert wrong <= reasons(image, said)


@pytest.mark.parametrize("requirement", [ONE, PLACED, PAIR, THREE])
def test_images_of_nothing_are_refused(requirement):
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(1, 3, 256, 256, generator=generator)
    for image in (noise, torch.full_like(noise, 0.98), noise * torch.nan):
        assert "number" in reasons(image, requirement)


def test_one_thing_more_is_refused(paint, art):
    """Of another kind, in a free corner."""
    image = paint(replace(ONE, size="small"))
    intruder = scenes.Thing(ROCKET, 1, scenes.SMALL_PX, 10, 10)
    rng = random.Random(0)
    scene = scenes.compose(replace(ONE, size="small"), rng)
    both = scenes.paint(scenes.pack([replace(scene, things=(*scene.things, intruder))]), art)
    assert reasons(image, replace(ONE, size="small")) == set()
    assert reasons(both, replace(ONE, size="small")) == {"number"}


def test_two_of_four_are_too_few(paint, art):
    four = Requirement((CAT,), count=4)
    scene = scenes.compose(four, random.Random(0))
    image = scenes.paint(scenes.pack([replace(scene, things=scene.things[:3])]), art)
    assert "number" in reasons(image, four)


def test_chunks_do_not_matter(held_out, monkeypatch):
    requirements, images = held_out
    whole = judge.judge(images[:10], requirements[:10])
    monkeypatch.setattr(judge, "CHUNK", 3)
    parts = judge.judge(images[:10], requirements[:10])
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in ("nearest", "ranks", *REASONS))


def test_bad_images_are_told():
    with pytest.raises(ValueError, match=r"not \[3, 256, 256\]"):
        judge.judge(torch.zeros(3, 256, 256), [ONE])
    with pytest.raises(ValueError, match="2 images, but 1 requirements"):
        judge.judge(torch.zeros(2, 3, 256, 256), [ONE])


def test_thumbnails_of_another_world_or_damaged_are_refused(tmp_path):
    with Image.open(templates.FILE) as image:
        exif = image.getexif()
        image.crop((0, 0, image.width - 1, image.height)).save(tmp_path / "smaller.webp", lossless=True, exif=exif)
        image.save(tmp_path / "bare.webp", lossless=True)
        exif[Base.ImageDescription] = "of yesterday"
        image.save(tmp_path / "older.webp", lossless=True, exif=exif)
        image.save(tmp_path / "painting.png", exif=exif)
    for other in ("smaller", "bare", "older"):
        with pytest.raises(
            ValueError, match=rf"{other}\.webp holds thumbnails of other concepts; install the pack anew"
        ):
            templates.load(tmp_path / f"{other}.webp")
    damaged = tmp_path / "damaged.webp"
    for length in (0, 20, 1000, 400_000):
        damaged.write_bytes(templates.FILE.read_bytes()[:length])
        templates.load.cache_clear()
        with pytest.raises(ValueError, match=r"damaged\.webp: truncated"):
            templates.load(damaged)
    with pytest.raises(ValueError, match=r"painting\.png: truncated or no WebP image"):
        templates.load(tmp_path / "painting.png")


def test_thumbnails_survive_a_round_trip(tmp_path, art):
    """Made from sprites as coarse as themselves, nearly each is nearest to what it was."""
    path = tmp_path / "again.webp"
    templates.save(path, art)
    again, known = templates.load(path), templates.load()
    distances = torch.cdist(again.thumbnails.flatten(0, 1).flatten(1), known.thumbnails.flatten(0, 1).flatten(1))
    same = distances.argmin(1) == torch.arange(len(distances))
    assert same.float().mean() > 0.98 and torch.equal(again.has, known.has)
    assert templates.FILE.stat().st_size < 1e6 and again.has.all()
