"""The recipe of emoji from sprites to files that load, a few steps long; where its art comes from."""

import base64
import hashlib
import http.server
import io
import json
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import shapes_model
import torch
from PIL import Image

from sprint_core.distill import __main__ as command
from sprint_core.distill import recipes
from sprint_core.distill.dataset import emoji_art, emoji_scenes, emoji_sources, emoji_text
from sprint_core.distill.dataset.emoji_images import CROP_PX, EmojiImages
from sprint_core.distill.engine.processes import SINGLE_PROCESS
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.runs import emoji, emoji_control, estimate
from sprint_core.distill.runs.control import ControlSources
from sprint_core.distill.stages import autoencoder as stages
from sprint_core.emoji import art, captions, scenes, templates
from sprint_core.emoji.art import SPRITE_PX, load
from sprint_core.emoji.concepts import common, concepts
from sprint_core.latent import SCALE
from sprint_core.models.autoencoder import Autoencoder
from sprint_core.pipeline import Pipeline
from sprint_core.text.loading import find_tokenizer
from sprint_core.weights import checkpoint, layouts, presets

POOL = 60


def draw_sprite(size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGBA", (256, 256))
    image.paste(Image.new("RGBA", size, (*colour, 255)), (40, 60))
    return image


@pytest.fixture
def sprites(tmp_path):
    """A file that has a few of the concepts: the others stay invisible."""
    path = tmp_path / "sprites.zip"
    with zipfile.ZipFile(path, "w") as file:
        for number in range(3):
            buffer = io.BytesIO()
            pixels = emoji_art.fit(draw_sprite((100, 50), (250, 20 * number, 30)))
            Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, exact=True)
            file.writestr(f"3d/{number}.webp", buffer.getvalue())
        file.writestr("concepts.json", json.dumps([concept.label for concept in concepts()]))
    return path


def test_fitted_art_is_centred_and_premultiplied():
    pixels = emoji_art.fit(draw_sprite((100, 50), (200, 100, 0)))
    assert pixels.shape == (SPRITE_PX, SPRITE_PX, 4)
    drawn = np.argwhere(pixels[..., 3] > 127)
    assert drawn.min(0).tolist() == [56, 0] and drawn.max(0).tolist() == [167, 223]
    assert pixels[112, 112].tolist() == [200, 100, 0, 255] and pixels[0, 0].tolist() == [0, 0, 0, 0]


def test_sprites_of_a_file(sprites):
    art = load(sprites)
    assert art.has[0, :3].all() and art.has.sum() == 3
    assert art.sprites[0, 2, :, 112, 112].tolist() == [250, 40, 30, 255]


def test_sprites_of_other_concepts_are_refused(tmp_path):
    path = tmp_path / "sprites.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("concepts.json", '["cat"]')
    with pytest.raises(ValueError, match="other concepts"):
        load(path)


def test_archives_are_checked(tmp_path, monkeypatch):
    """What lies in the cache is taken if it is what it should be; what cannot be fetched is named."""
    package = emoji_sources.Package("@someone/art", "1.0.0", base64.b64encode(hashlib.sha512(b"art").digest()).decode())
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", (tmp_path / "registry").as_uri())
    with pytest.raises(OSError, match=r"someone-art-1\.0\.0\.tgz: cannot fetch .*npm pack @someone/art@1\.0\.0"):
        emoji_sources.archive(package, tmp_path / "cache")
    published = tmp_path / "registry" / "@someone" / "art" / "-" / "art-1.0.0.tgz"
    published.parent.mkdir(parents=True)
    published.write_bytes(b"art")
    assert emoji_sources.archive(package, tmp_path / "cache").read_bytes() == b"art"
    (tmp_path / "cache" / package.file_name).write_bytes(b"other")
    with pytest.raises(ValueError, match="another sha512"):
        emoji_sources.archive(package, tmp_path / "cache")


def test_a_download_that_breaks_off_is_named(tmp_path, monkeypatch):
    """Nothing of it stays in the cache."""

    class Breaking(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"art")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Breaking) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(OSError, match=r"art-1\.0\.0\.tgz: cannot fetch .*IncompleteRead"):
            emoji_sources.archive(emoji_sources.Package("art", "1.0.0", ""), tmp_path / "cache")
    assert not list(tmp_path.rglob("*art*"))


def test_art_of_archives(tmp_path, monkeypatch):
    """Rendered drawings by the code of their character, with or without its variation selector."""
    hexcode = concepts()[0].hexcode

    def archive(package, cache):
        path = tmp_path / package.file_name
        with tarfile.open(path, "w:gz") as file:
            buffer = io.BytesIO()
            draw_sprite((20, 20), (0, 0, 255)).save(buffer, "WEBP", lossless=True)
            svg = {"icons": {"one": {"body": '<rect width="32" height="32" fill="#f00"/>'}}, "width": 32, "height": 32}
            contents = {f"package/assets/{hexcode}-fe0f.webp": buffer.getvalue()}
            contents |= {"package/icons.json": json.dumps(svg | {"aliases": {"two": {"parent": "one"}}}).encode()}
            contents |= {"package/chars.json": json.dumps({hexcode: "two"}).encode()}
            for name, content in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
        return path

    monkeypatch.setattr(emoji_sources, "archive", archive)
    assert emoji_art.prepare(tmp_path, tmp_path / "sprites.zip") == {"3d": 1, "flat": 1}
    art = load(tmp_path / "sprites.zip")
    assert art.sprites[0, 0, :, 100, 100].tolist() == [0, 0, 255, 255]
    assert art.sprites[1, 0, :, 100, 100].tolist() == [255, 0, 0, 255]


def test_crops_and_whole_images():
    images = EmojiImages(templates.load().art(), 4, 2)
    for step in range(3):
        crops = images.crops(SampleRandom(0, step, "", range(9)), step)
        assert crops.shape == (9, 3, CROP_PX, CROP_PX) and crops.abs().max() <= 1
        again = images.crops(SampleRandom(0, step, "", range(9)), step)
        assert torch.equal(crops, again)
    whole = images.whole(SampleRandom(0, 0, "", range(9)))
    assert any(torch.equal(whole[0], shape) for shape in images.shapes)  # one in eight shows plain shapes
    assert any(torch.equal(whole[1], image) for image in images.pool.float() / 127.5 - 1)


def test_labels_of_captions():
    """Left and right are one order of things, and so are above and below."""
    first = emoji_scenes.labels(captions.Requirement((4, 9), relation="right", style=1, ground="blue"))
    assert first == emoji_scenes.labels(captions.Requirement((9, 4), relation="left", style=1, ground="blue"))
    assert first[:2] == [10, 5] and first[4:6] == [2, 1 + list(captions.GROUNDS).index("blue")]
    shape = emoji_scenes.shape_labels("a red circle above a blue square")
    assert len(shape) == len(first) == len(emoji_scenes.QUESTIONS) and shape[:6] == [0] * 6


def test_drawn_scenes_are_the_same_for_any_number_of_processes(monkeypatch):
    monkeypatch.setattr(emoji_scenes, "CHUNK", 10)
    one, two = (emoji_scenes.draw(100, processes) for processes in (1, 2))
    for name in ("packed", "shapes", "tokens", "labels", "image"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert one.fingerprint == two.fingerprint and len(one.shapes) == 2


def test_pairs_of_the_command_line_are_those_of_the_scenes(sprites, tmp_path):
    args = command._arguments(["--out", str(tmp_path), "--data", str(sprites), "--pool", "60", "--pairs", "1"])
    drawn = command._emoji_run(args, recipes.RECIPES["demo"], SINGLE_PROCESS).draw_scenes()
    of_emoji = drawn.labels[: len(drawn.packed)]  # the second thing, and how both stand
    assert len(of_emoji) >= 50 and (of_emoji[:, 1] > 0).all() and (of_emoji[:, 7] > 0).all()


def test_pairs_of_a_controlnet_are_those_of_its_scenes(sprites, tmp_path, monkeypatch):
    encoded, settings = [], ["--set", "control.steps=1", "--set", "control.batch=2", "--pairs", "1"]
    encode = emoji_control.EmojiControlRun._encoded
    monkeypatch.setattr(
        emoji_control.EmojiControlRun, "_encoded", lambda *args: encoded.append(args[2]) or encode(*args)
    )
    arguments = ["--recipe", "demo-control", "--data", str(sprites), "--pool", "4", "--device", "cpu", *settings]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    things = (encoded[0].packed[:, 1::5] >= 0).sum(1)
    assert things.tolist() == [2] * 4


def test_the_patch_critic_bounds_its_gradient():
    critic = stages.PatchCritic(4)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = critic(image)
    assert [tuple(f.shape[1:]) for f in features] == [(4, 16, 16), (8, 8, 8), (16, 4, 4), (1, 4, 4)]


def test_a_decoder_learns_from_its_critic():
    """The decoder's phase moves the decoder alone, the critic's the critic alone."""
    model = Autoencoder(recipes.SHAPES_AUTOENCODER)
    images = EmojiImages(templates.load().art(), 2, 0)
    stage = stages.DecoderStage(model, images, stages.PatchCritic(4))
    assert [phase.module for phase in stage.phases(0)] == ["decoder", "critic"]
    for phase, other in (("decoder", "critic"), ("critic", "decoder")):
        for module in stage.modules.values():
            module.zero_grad()
        loss, _ = stage.loss(phase, stages.CRITIC_FROM, SampleRandom(0, 0, phase, range(1)))
        loss.backward()
        assert all(p.grad is not None for p in stage.modules[phase].parameters())
        assert other == "critic" or all(p.grad is None for p in stage.modules[other].parameters())


def test_from_sprites_to_a_model(sprites, tmp_path, monkeypatch):
    """Every stage for two steps; the file loads, paints, and says which world it knows; again, it is only exported."""
    monkeypatch.setattr(emoji, "WHOLE", 6)
    monkeypatch.setattr(emoji, "SHAPES", 2)
    monkeypatch.setattr(emoji, "FITTED", 4)
    monkeypatch.setattr(emoji, "JUDGED", 3)
    monkeypatch.setattr(estimate, "of_recipe", lambda *_: [])  # test_estimate.py has it
    settings = [f"--set={stage}.{key}=2" for stage in recipes.EMOJI for key in ("steps", "batch")]
    settings += [f"--set={stage}.precision=fp32" for stage in recipes.EMOJI] + ["--set=distill.ladd_from=1"]
    arguments = ["--recipe", "demo", "--data", str(sprites), "--pool", str(POOL), "--device", "cpu", *settings]
    assert command.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "sana_sprint_tiny.safetensors"
    pipeline = Pipeline.load(path)
    image = pipeline.generate(["a slice of pizza"], seeds=[0], steps=1)
    assert tuple(image.shape) == (1, 256, 256, 3) and image.isfinite().all()
    before = path.read_bytes()
    assert command.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert path.read_bytes() == before
    assert (tmp_path / "run" / "distill" / "best.safetensors").is_file()  # it was watched
    _train_a_controlnet(path, sprites, tmp_path / "control")


def _train_a_controlnet(trunk, sprites, out):
    """Two steps move what is the branch's own, and no more."""
    parts = [f"{option}={trunk}" for option in ("--student", "--vae", "--text-encoder")]
    settings = ["steps=2", "batch=2", "precision=fp32", "ladd_from=1"]
    arguments = [
        "--recipe",
        "demo-control",
        "--data",
        str(sprites),
        "--pool",
        "4",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert command.main([*arguments, *parts, *(f"--set=control.{one}" for one in settings)]) == 0
    branch = checkpoint.load(out / "sana_controlnet.safetensors", layouts.CONTROLNET).tensors
    shared = checkpoint.load(trunk, layouts.TRANSFORMER).tensors
    assert torch.equal(branch["caption_norm.weight"].float(), shared["caption_norm.weight"].float())
    assert branch["controlnet_blocks.0.weight"].abs().max() > 0


def test_the_bundled_models_controlnet(sprites, tmp_path, monkeypatch):
    """Trained on the bundled model unless told otherwise: the file has what is its own, and reads the rest there."""
    settings = [f"--set=control.{one}" for one in ("steps=2", "batch=2", "precision=fp32", "ladd_from=1")]
    monkeypatch.setattr(estimate, "of_recipe", lambda *_: [])  # test_estimate.py has it
    arguments = ["--recipe", "demo-control", "--data", str(sprites), "--pool", "4", "--device", "cpu", *settings]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    path = tmp_path / "sana_controlnet_tiny.safetensors"
    assert path.stat().st_size < 6e6
    net = checkpoint.build(checkpoint.load(path, layouts.CONTROLNET), dtype=torch.float32)
    trunk = checkpoint.load(presets.BUNDLED, layouts.TRANSFORMER).tensors
    assert torch.equal(net.caption_norm.weight, trunk["caption_norm.weight"].float())
    assert net.controlnet_blocks[0].weight.abs().max() > 0


def test_encoded_scenes_of_a_controlnet_are_kept(tmp_path, monkeypatch):
    """A shard that is missing is encoded, and no other; drawings that would be made otherwise all are."""
    monkeypatch.setattr(emoji_control, "SHARD", 4)
    monkeypatch.setattr(emoji_control, "CPU_BATCH", 4)
    monkeypatch.setattr(art, "load", lambda path: templates.load().art())
    encoded, encode = [], emoji_control.encode
    monkeypatch.setattr(emoji_control, "encode", lambda net, shown: encoded.append(shown) or encode(net, shown))
    sources = ControlSources(presets.BUNDLED, presets.BUNDLED, presets.BUNDLED, sprites=tmp_path)
    run = emoji_control.EmojiControlRun(tmp_path, recipes.RECIPES["demo-control"], sources, pool=6)
    whole = run.encode_dataset()
    images, hints = torch.cat(encoded[::2]), torch.cat(encoded[1::2])
    with torch.inference_mode():  # as there: norms take other ways where gradients are wanted
        assert torch.equal(whole.hints, encode(run.load_autoencoder(presets.BUNDLED), hints))
    assert len(images) == 6 and len({hint.sum().item() for hint in hints}) == 6
    (tmp_path / "latents" / "controlled_0001.safetensors").unlink()
    encoded.clear()
    again = run.encode_dataset()
    assert torch.equal(torch.cat(encoded), torch.cat([images[4:], hints[4:]]))
    assert torch.equal(again.latents, whole.latents) and torch.equal(again.hints, whole.hints)
    encoded.clear()
    monkeypatch.setattr(emoji_control, "WOBBLE_PX", 2 * emoji_control.WOBBLE_PX)
    run.encode_dataset()
    assert len(torch.cat(encoded)) == 12


def test_a_controlnet_of_another_world_is_refused(sprites, tmp_path, caplog):
    arguments = ["--recipe", "demo-control", "--data", str(sprites), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert command.main([*arguments, "--text-encoder", str(shapes_model.MODEL)]) == 1
    assert f"{shapes_model.MODEL}: has other words than scenes of emoji" in caplog.text
    assert command.main(["--recipe", "demo-control", "--out", str(tmp_path / "out")]) == 1
    assert "--recipe demo-control needs --data" in caplog.text


def test_the_bundled_encoders():
    """They are of this world: unit latents, and a text encoder that hears which thing is above which."""
    weights = checkpoint.load(presets.BUNDLED, layouts.AUTOENCODER)
    assert weights.config == recipes.EMOJI_AUTOENCODER
    autoencoder = checkpoint.build(weights, dtype=torch.float32, device="cpu")
    drawn = scenes.pack([scenes.scene_and_caption(seed)[0] for seed in range(12)])
    images = scenes.paint(drawn, templates.load().art()).float() / 127.5 - 1
    with torch.inference_mode():
        latents = autoencoder.encode(images)
        error = (autoencoder.decode(latents).clamp(-1, 1) - images).square().flatten(1).mean(1)
    assert 0.8 < (latents * SCALE).std() < 1.25
    assert (10 * (4 / error).log10()).mean() > 26  # of scenes from thumbnails; the true ones reach 30 dB
    text = checkpoint.load(presets.BUNDLED, layouts.TEXT_ENCODER)
    gemma = checkpoint.build(text, dtype=torch.float32, device="cpu")
    every_word = " ".join(emoji_text.tokenizer_vocabulary(common()))
    assert find_tokenizer(text).encode(every_word) == emoji_text.tokenizer().encode(every_word)
    with torch.inference_mode():
        ids = (emoji_text.prompts().tokens(f"a cat {way} a dog").ids for way in ("above", "below"))
        one, other = (gemma(torch.tensor([tokens])) for tokens in ids)
    assert (one[0, -1] - other[0, -1]).norm() > 0.3 * one[0, -1].norm()


def test_the_recipe_says_what_it_needs(tmp_path, caplog):
    assert command.main(["--recipe", "demo", "--out", str(tmp_path)]) == 1
    assert "sprint_core.distill.prepare makes it" in caplog.text
