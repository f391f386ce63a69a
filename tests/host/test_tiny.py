"""TAESANA in ComfyUI: a VAE for drafts, and what paints live previews."""

from pathlib import Path

import pytest
import standin
import torch

from sprint_core.models.tiny_autoencoder import HALVES, TinyAutoencoder

SCALE = 0.41407


@pytest.fixture(scope="module")
def tiny():
    """Of weights under which images follow their latents; with torch's first ones all look the same."""
    model = TinyAutoencoder()
    model.load_state_dict(standin.random_model(model))
    return model.eval().requires_grad_(False)


@pytest.fixture
def files(host, tiny):
    """Both files in models/vae_approx."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("vae_approx")[0])
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / f"taesana_{half}.pth" for half in HALVES]
    for half, path in zip(HALVES, made, strict=True):
        torch.save(getattr(tiny, half).state_dict(), path)
    folder_paths.filename_list_cache.clear()
    host.pack("nodes.adapters.preview")._loaded.cache_clear()
    yield folder
    for path in made:
        path.unlink(missing_ok=True)
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def method(monkeypatch):
    """Choose how ComfyUI paints previews."""
    import latent_preview

    return lambda name: monkeypatch.setattr(
        latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod(name)
    )


def test_a_vae_for_drafts(node, files, tiny):
    """The same raw latents on the wires as DC-AE's, images in [0, 1]."""
    vae = node("SanaSprintVAELoader", vae="taesana_decoder.pth")
    latent, image = torch.randn(2, 32, 2, 3), torch.rand(2, 64, 96, 3)
    decoded = (tiny.decode(latent) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(node("VAEDecode", vae=vae, samples={"samples": latent}), decoded, rtol=0, atol=1e-5)
    encoded = tiny.encode(image.movedim(-1, 1) * 2 - 1)
    torch.testing.assert_close(node("VAEEncode", vae=vae, pixels=image)["samples"], encoded, rtol=0, atol=1e-5)
    tiled = node("VAEDecodeTiled", vae=vae, samples={"samples": latent}, tile_size=64, overlap=32)
    assert tiled.shape == (2, 64, 96, 3)


def test_the_loader_lists_the_decoder_alone(host, files):
    from folder_paths import get_folder_paths

    Path(get_folder_paths("vae_approx")[0], "taesd_decoder.pth").write_bytes(b"")
    listed = host.pack("nodes.adapters.folders").choices("vae", "vae_approx")
    assert "taesana_decoder.pth" in listed and not {"taesana_encoder.pth", "taesd_decoder.pth"} & set(listed)
    Path(get_folder_paths("vae_approx")[0], "taesd_decoder.pth").unlink()


def test_without_its_encoder(node, files):
    (files / "taesana_encoder.pth").unlink()
    vae = node("SanaSprintVAELoader", vae="taesana_decoder.pth")
    with pytest.raises(ValueError, match=r"put taesana_encoder\.pth beside it"):
        node("VAEEncode", vae=vae, pixels=torch.rand(1, 64, 64, 3))


@pytest.mark.parametrize("by", ["ours", "KSampler"])
def test_it_paints_previews(sample, ksample, files, tiny, method, monkeypatch, caplog, by):
    """With the preview method TAESD: what ComfyUI sends is the decoder's image of x0."""
    import comfy.utils

    images = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: images.append(preview))
    method("taesd")
    result = sample(seed=1, steps=4, schedule="app") if by == "ours" else ksample()
    assert [image[1].size for image in images] == [(128, 96)] * 4
    shown = torch.frombuffer(bytearray(images[-1][1].tobytes()), dtype=torch.uint8).reshape(96, 128, 3).float() / 255
    expected = (tiny.decode(result[:1])[0] / 2 + 0.5).clamp(0, 1).movedim(0, -1)
    assert (shown - expected).abs().max() <= 1.5 / 255 and expected.std() > 0.1
    assert "SANA-Sprint paints the previews" in caplog.text


def test_previews_are_as_large_as_they_are_shown(host, tiny, monkeypatch):
    """Of an image that is decoded as it is, by tiles where it is large, and then shrunk."""
    import latent_preview

    monkeypatch.setattr(latent_preview, "MAX_PREVIEW_RESOLUTION", 48)
    x0 = torch.randn(2, 32, 2, 3)
    shown = host.pack("nodes.adapters.preview")._paint(tiny, x0)
    expected = torch.nn.functional.interpolate(tiny.decode(x0[:1] / SCALE), (32, 48), mode="area")
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-5)

    sides = []

    def decode(latent):
        sides.append(tuple(latent.shape[-2:]))
        return latent.new_zeros(1, 3, *(32 * side for side in latent.shape[-2:]))

    monkeypatch.setattr(tiny, "decode", decode)
    assert host.pack("nodes.adapters.preview")._paint(tiny, torch.randn(1, 32, 20, 40)).shape == (1, 3, 24, 48)
    assert sides == [(20, 32)] * 2


def test_other_methods_paint_colours(model, files, method, bundled_colours):
    import latent_preview

    for name in ("latent2rgb", "auto"):
        method(name)
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        assert previewer.decode_latent_to_preview(torch.randn(1, 32, 3, 4)).size == (4, 3)
    method("none")
    assert latent_preview.get_previewer(model.load_device, model.model.latent_format) is None


@pytest.fixture
def bundled_colours(host, monkeypatch):
    from sprint_core.images.preview import Factors

    factors = Factors([[0.1] * 3] * 32, [0] * 3)
    adapter = host.pack("nodes.adapters.preview")
    monkeypatch.setattr(adapter.Colours, "latest", adapter.Colours(factors))
    return factors


def test_a_missing_decoder_falls_back(model, method, bundled_colours, caplog):
    import latent_preview

    method("taesd")
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    assert previewer.decode_latent_to_preview(torch.randn(1, 32, 3, 4)).size == (4, 3)
    lines = [record.getMessage() for record in caplog.records if "vae_approx" in record.getMessage()]
    assert len(lines) == 1 and lines[0].endswith("models/vae_approx/taesana_decoder")


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_bad_decoder_falls_back(host, model, files, method, bundled_colours, caplog, content):
    import latent_preview

    path = files / "taesana_decoder.pth"
    if content is None:
        torch.save({"1.weight": torch.zeros(64, 4, 3, 3)}, path)  # a TAESD under our name
    else:
        path.write_bytes(content)
    method("taesd")
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    assert previewer.decode_latent_to_preview(torch.randn(1, 32, 3, 4)).size == (4, 3)
    assert caplog.text.count("previews in colours of the latent instead") == 1


def test_a_model_keeps_the_colours_of_its_own_vae(host, model, colours_of):
    """What the VAE of another model decodes does not change them."""
    own, other = colours_of(0.1), colours_of(0.2)
    painter = model.model.latent_format.painter
    assert painter.factors == other  # it knows none: those of the VAE that was used last
    painter.own = own
    try:
        assert model.model.latent_format.latent_rgb_factors == [list(row) for row in own.rows]
    finally:
        del painter.own


@pytest.fixture
def colours_of(host, monkeypatch):
    from sprint_core.images.preview import Factors

    adapter = host.pack("nodes.adapters.preview")
    monkeypatch.setattr(adapter.Colours, "latest", None)

    def make(value: float) -> Factors:
        factors = Factors([[value] * 3] * 32, [0] * 3)
        adapter.Colours(factors)
        return factors

    return make


# --- what lies beside a VAE -----------------------------------------------------------------------


@pytest.fixture
def fitted(host, pipeline_folder):
    """The stand-in's folder, copied, with preview colours beside its VAE."""
    import json
    import shutil

    folder = host.base / "models" / "diffusers" / "with-colours"
    shutil.copytree(pipeline_folder, folder)
    (folder / "vae" / "vae.preview.json").write_text(json.dumps({"rows": [[0.25] * 3] * 32, "bias": [0, 0, 0]}))
    yield folder
    shutil.rmtree(folder)


def test_models_and_vaes_take_the_colours_of_their_folder(node, fitted, vae):
    model, _, own = node("SanaSprintLoader", model=fitted.name)
    assert model.model.latent_format.latent_rgb_factors == [[0.25] * 3] * 32
    assert own.colours.stored.rows[0] == (0.25,) * 3 and vae.colours.stored is None
    before = own.colours.fit.cells
    node("VAEDecode", samples={"samples": torch.randn(1, 32, 3, 4)}, vae=own)
    assert own.colours.fit.cells == before  # what is stored is not learnt


def test_damaged_colours_are_no_reason_to_refuse_a_model(node, fitted, caplog):
    (fitted / "vae" / "vae.preview.json").write_text('{"rows": 1}')
    model, _, own = node("SanaSprintLoader", model=fitted.name)
    assert model.model.latent_format.painter.own is None and own.colours.stored is None
    assert "previews learn their colours anew" in caplog.text


def test_what_is_put_beside_a_file_is_seen(host, files, fitted):
    """A missing half, or colours that were fitted: ComfyUI has to load again."""
    import os

    folders = host.pack("nodes.adapters.folders")
    (files / "taesana_encoder.pth").rename(files / "later")
    stamps = [folders.stamp("taesana_decoder.pth", "vae_approx")]
    (files / "later").rename(files / "taesana_encoder.pth")
    stamps.append(folders.stamp("taesana_decoder.pth", "vae_approx"))
    (files / "taesana_decoder.preview.json").write_text("{}")
    stamps.append(folders.stamp("taesana_decoder.pth", "vae_approx"))
    os.remove(files / "taesana_decoder.preview.json")
    assert len(set(stamps)) == 3


def test_a_checkpoint_with_a_taesana_is_read_back(host, node, files, model, clip):
    vae = node("SanaSprintVAELoader", vae="taesana_decoder.pth")
    node("CheckpointSave", model=model, clip=clip, vae=vae, filename_prefix="tiny-all")
    (made,) = Path(host.base / "output").glob("tiny-all*.safetensors")
    (host.base / "models" / "checkpoints").mkdir(exist_ok=True)
    made.rename(host.base / "models" / "checkpoints" / "tiny-all.safetensors")
    again = node("SanaSprintLoader", model="tiny-all.safetensors")[2]
    latent = {"samples": torch.randn(1, 32, 2, 2)}
    decoded = [node("VAEDecode", vae=one, samples=latent) for one in (vae, again)]
    assert torch.equal(*decoded)
