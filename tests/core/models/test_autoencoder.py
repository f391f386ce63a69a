"""DC-AE against diffusers' AutoencoderDC on the same seeded weights, and exact properties of the tiling."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from oracles import relative_error, shapes_of
from torch._subclasses import FakeTensorMode

from benchmarks.launches import Launches
from sprint_core.config import from_dict
from sprint_core.latent import SCALE
from sprint_core.models import autoencoder, layers
from sprint_core.models.autoencoder import Autoencoder, channel_norm
from sprint_core.models.autoencoder_config import SANA, AutoencoderConfig
from sprint_core.models.tiling import tile_windows
from sprint_core.weights.layouts.autoencoder import config_from_diffusers, infer_config

RES, VIT = "ResBlock", "EfficientViTBlock"
ROUNDED_ONCE = {torch.float64: {"rtol": 0, "atol": 1e-12}, torch.bfloat16: {"rtol": 2**-8, "atol": 1e-3}}
ROUNDED_MORE = ROUNDED_ONCE | {torch.bfloat16: {"rtol": 2**-6, "atol": 2e-2}}

# The published layout at a tiny width: 4 stages, 8 px to a cell, the last two with attention.
TINY = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": (RES, RES, VIT, VIT),
    "decoder_block_types": (RES, RES, VIT, VIT),
    "encoder_block_out_channels": (8, 16, 16, 32),
    "decoder_block_out_channels": (8, 16, 16, 32),
    "encoder_layers_per_block": (1, 1, 2, 1),
    "decoder_layers_per_block": (2, 1, 1, 2),
    "encoder_qkv_multiscales": ((), (), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,), (3, 5)),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",  # spelt as in the published file
    "decoder_act_fns": "silu",
    "decoder_norm_types": "rms_norm",
    "scaling_factor": SCALE,
}
LITE = {
    **TINY,
    "decoder_block_types": RES,
    "decoder_layers_per_block": (0, 2, 1, 2),
    "decoder_qkv_multiscales": ((), (), (), ()),
    "decoder_conv_act_fn": "silu",
}
LAYOUTS = {
    "sana": TINY,
    "lite": LITE,
    "no first stage": {**TINY, "encoder_layers_per_block": (0, 1, 2, 1), "decoder_layers_per_block": (0, 1, 1, 2)},
    "no shortcuts": {**TINY, "encoder_out_shortcut": False, "decoder_in_shortcut": False},
    "pixel shuffle": {**TINY, "upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"},
    "pixel shuffle lite": {
        **LITE,
        "encoder_layers_per_block": (0, 1, 1, 1),
        "upsample_block_type": "pixel_shuffle",
        "downsample_block_type": "pixel_unshuffle",
        "decoder_act_fns": ("silu", "relu", "silu", "relu"),
    },
}
FULL_SANA = {
    "encoder_block_types": (RES,) * 3 + (VIT,) * 3,
    "decoder_block_types": (RES,) * 3 + (VIT,) * 3,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",  # spelt as in the published file
    "scaling_factor": 0.41407,  # as published, too
}


def pair(layout: dict, seed: int = 0) -> tuple[Autoencoder, AutoencoderDC]:
    """Our model and diffusers' with the same random weights, norms and biases included."""
    theirs = AutoencoderDC(**layout).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            one_d = 1.0 if name.endswith("weight") else 0.0
            p.copy_(one_d + 0.3 * noise if p.ndim == 1 else noise / p[0].numel() ** 0.5)
    ours = Autoencoder(config_from_diffusers(dict(theirs.config)), device="meta")
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours, theirs


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- the model against diffusers ------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (24, 16)], ids=["linear", "few tokens"])
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_equals_diffusers(name, size):
    ours, theirs = pair(LAYOUTS[name])
    image = random(2, 3, *size)
    latent = theirs.encode(image).latent
    assert latent.shape == (2, 4, size[0] // 8, size[1] // 8)
    assert relative_error(ours.encode(image), latent) < 1e-5
    assert relative_error(ours.decode(latent), theirs.decode(latent).sample) < 1e-5


def test_full_size_has_the_names_and_shapes_of_diffusers():
    ours = Autoencoder(device="meta")
    with torch.device("meta"):
        theirs = AutoencoderDC(**FULL_SANA)
    assert shapes_of(ours) == shapes_of(theirs)
    assert sum(p.numel() for p in ours.parameters()) == 312_250_275
    assert infer_config(shapes_of(theirs)) == config_from_diffusers(dict(theirs.config)) == SANA == ours.config
    assert (SANA.downscale, SANA.latent_channels) == (32, 32)


@torch.no_grad()
def test_bf16_is_finite_and_near_fp32():
    ours, _ = pair(TINY)
    image = random(1, 3, 64, 64)
    latent = ours.encode(image)
    decoded = ours.decode(latent)
    ours.to(torch.bfloat16)
    for low, full in ((ours.encode(image.bfloat16()), latent), (ours.decode(latent.bfloat16()), decoded)):
        assert low.dtype == torch.bfloat16 and low.isfinite().all()
        assert relative_error(low.float(), full) < 0.1


def test_norm_has_weight_and_bias_with_any_ops():
    class HostRMSNorm(torch.nn.RMSNorm):
        def reset_parameters(self):  # as ComfyUI's
            torch.nn.init.ones_(self.weight)
            self.bias = None

    class host_ops:
        RMSNorm = HostRMSNorm

    x = random(2, 6, 3, 5)
    expected = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * 2 + 3
    for ops in (torch.nn, host_ops):
        norm = channel_norm(6, ops)
        assert isinstance(norm, ops.RMSNorm) and set(dict(norm.named_parameters())) == {"weight", "bias"}
        torch.nn.init.constant_(norm.weight, 2.0)
        torch.nn.init.constant_(norm.bias, 3.0)
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_norm_in_few_passes_is_the_norm(dtype, layout, monkeypatch):
    """As where gradients are wanted, which go through torch's own; what is left of the last block too."""
    monkeypatch.setattr(layers, "CACHE_ELEMENTS", 4 * 6)
    monkeypatch.setattr(layers, "FEW_ELEMENTS", 0)
    norm = channel_norm(6, torch.nn, dtype=dtype)
    weight, bias = random(6, seed=1).to(dtype), random(6, seed=2).to(dtype)
    norm.load_state_dict({"weight": weight, "bias": bias})
    x, residual = (1e-3 * random(2, 6, 3, 5).to(dtype), random(2, 6, 3, 5, seed=4).to(dtype))
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
    exact = exact * weight.double()[:, None, None] + bias.double()[:, None, None]
    for more, expected in ((None, exact), (residual, exact + residual.double())):
        with torch.inference_mode():
            got = norm(x.clone().contiguous(memory_format=layout), more)
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected.to(dtype), **ROUNDED_ONCE.get(dtype, {}))
        with torch.enable_grad():
            torch.testing.assert_close(norm(x.clone(), more).to(dtype), got, **ROUNDED_MORE.get(dtype, {}))


def test_a_norms_weight_is_found_by_what_a_host_makes_of_it():
    """Bit for bit, by a row of equal numbers."""
    for dtype in (torch.float32, torch.bfloat16):
        norm = torch.nn.RMSNorm(999, eps=1e-5, dtype=dtype)
        norm.weight.data = random(999).to(dtype)
        assert torch.equal(norm(torch.full((999,), layers.LARGE, dtype=dtype)), norm.weight)


@pytest.mark.parametrize("shape", [(1, 3, 60, 64), (1, 3, 64, 60), (1, 4, 64, 64), (3, 64, 64)])
def test_refuses_wrong_images(shape):
    model = Autoencoder(config_from_diffusers(TINY), device="meta")
    for encode in (model.encode, model.encode_tiled):
        with pytest.raises(ValueError, match="multiples of 8"):
            encode(torch.empty(shape, device="meta"))


def test_refuses_wrong_latents_and_tiles():
    model = Autoencoder(config_from_diffusers(TINY), device="meta")
    with pytest.raises(ValueError, match=r"latent must be \[b, 4, h, w\]"):
        model.decode(torch.empty(1, 3, 8, 8, device="meta"))
    for tile, overlap in ((60, 8), (64, 4), (64, 64), (64, -8)):
        with pytest.raises(ValueError, match="multiples of 8"):
            model.decode_tiled(torch.empty(1, 4, 8, 8, device="meta"), tile, overlap)


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - {"no shortcuts", "pixel shuffle lite"}))
def test_infers_the_configuration_from_shapes(name):
    layout = LAYOUTS[name]
    with torch.device("meta"):
        shapes = shapes_of(AutoencoderDC(**layout))
    assert infer_config(shapes) == config_from_diffusers(layout)


def test_inference_refuses_other_models():
    for shapes in ({}, {"encoder.down_blocks.0.0.conv1.weight": (8, 8, 3, 3)}, {"decoder.conv_in.weight": (1,)}):
        with pytest.raises(ValueError, match="not the tensors of a DC-AE"):
            infer_config(shapes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_configuration_survives_json(name):
    config = config_from_diffusers(json.loads(json.dumps({**LAYOUTS[name], "_class_name": "AutoencoderDC"})))
    assert from_dict(AutoencoderConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert hash(config) is not None


def test_absent_settings_mean_what_diffusers_means():
    with torch.device("meta"):
        theirs = AutoencoderDC()
    assert shapes_of(Autoencoder(config_from_diffusers({}), device="meta")) == shapes_of(theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": 0.3189}, "0.3189"),
        ({"decoder_norm_types": "batch_norm"}, "rms_norm"),
        ({"decoder_act_fns": "gelu"}, "'gelu'"),
        ({"decoder_block_types": "Other"}, "'Other'"),
        ({"upsample_block_type": "bilinear"}, "'bilinear'"),
        ({"decoder_layers_per_block": (2, 0, 1, 1)}, "only the first stage"),
        ({"decoder_layers_per_block": (2, 1)}, "decoder_layers describes 2 stages"),
        ({"novelty": 1}, "novelty"),
    ],
)
def test_refuses_configurations_it_cannot_build(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_diffusers({**TINY, **change})


# --- tiling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 32])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 2), (8, 0), (8, 7), (5, 1), (2, 1)])
def test_tile_weights_are_a_partition_of_unity(tile, overlap, scale):
    for cells in range(1, 41):
        windows = tile_windows(cells, tile, overlap, scale)
        total = torch.zeros(cells * scale)
        for start, weight in windows:
            assert (weight > 0).all() and len(weight) == min(tile, cells) * scale
            total[start * scale :][: len(weight)] += weight
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
        assert all(a + tile - b >= overlap for (a, _), (b, _) in pairwise(windows))
        assert (len(windows) == 1) == (cells <= tile)


def test_tiles_fade_in_and_out():
    """Over the overlap, in equal steps, so that no seam shows; at the borders of the image they do not."""
    (_, first), (_, second) = tile_windows(12, 8, 4, scale=2)
    ramp = (torch.arange(8) + 0.5) / 8
    torch.testing.assert_close(second[:8], ramp)
    torch.testing.assert_close(first[-8:], ramp.flip(0))
    assert (first[:8] == 1).all() and (second[8:] == 1).all()


def cell_local_model() -> Autoencoder:
    """A real model whose every latent cell depends on its own pixels only: centre taps, no attention."""
    model, _ = pair(TINY)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 4 and p.shape[-1] > 1:
                centre = p[:, :, p.shape[2] // 2, p.shape[3] // 2].clone()
                p.zero_()[:, :, p.shape[2] // 2, p.shape[3] // 2] = centre
            if name.endswith("to_out.weight"):
                p.zero_()
    return model


@pytest.mark.parametrize(("height", "width"), [(96, 40), (24, 104), (64, 72)])
@torch.no_grad()
def test_tiles_of_a_cell_local_model_add_up_to_the_whole(height, width):
    model = cell_local_model()
    image = random(2, 3, height, width)
    latent, calls, ticks = model.encode(image), [], []
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[-2:]))
    tiled = model.encode_tiled(image, tile_px=32, overlap_px=16, progress=lambda *tick: ticks.append(tick))
    assert relative_error(tiled, latent) < 1e-5
    assert len(calls) > 1 and all(h <= 32 and w <= 32 for h, w in calls)
    assert ticks == [(i + 1, len(calls)) for i in range(len(calls))]
    calls.clear()
    tiled = model.decode_tiled(latent, tile_px=32, overlap_px=16)
    assert len(calls) > 1 and all(h <= 4 and w <= 4 for h, w in calls)
    assert relative_error(tiled, model.decode(latent)) < 1e-5


@torch.no_grad()
def test_one_tile_is_the_untiled_path():
    model, _ = pair(TINY)
    image = random(1, 3, 48, 64)
    latent, ticks = model.encode(image), []
    assert torch.equal(model.encode_tiled(image, tile_px=64, overlap_px=16), latent)
    tiled = model.decode_tiled(latent, tile_px=64, overlap_px=16, progress=lambda *tick: ticks.append(tick))
    assert torch.equal(tiled, model.decode(latent)) and ticks == [(1, 1)]


@torch.no_grad()
def test_tiling_keeps_the_dtype():
    model, _ = pair(TINY)
    latent = model.bfloat16().encode_tiled(random(1, 3, 64, 64).bfloat16(), tile_px=32, overlap_px=8)
    assert latent.dtype == torch.bfloat16 and latent.shape == (1, 4, 8, 8)
    assert model.decode_tiled(latent, tile_px=32, overlap_px=8).isfinite().all()


# --- what saves passes over memory -------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 2)])
@pytest.mark.parametrize("small_px", [0, 15, 16 * 16])
def test_a_convolution_of_the_enlarged_without_enlarging(size, bias, small_px, monkeypatch):
    """In float64: the same sums in another order; a small image is enlarged, the same bits as by two operations."""
    monkeypatch.setattr(autoencoder, "SMALL_PX", small_px)
    torch.manual_seed(0)
    conv = autoencoder._enlarging_conv_class(torch.nn.Conv2d)(6, 4, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, conv.bias, padding=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        got = conv(x.contiguous(memory_format=layout))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        if layout == torch.contiguous_format and size[0] * size[1] <= small_px:
            assert torch.equal(got, expected)


@pytest.mark.parametrize("height", [1, 4, 5, 9, 12])
@torch.no_grad()
def test_a_band_of_rows_at_a_time(height, monkeypatch):
    """In float64, with bands of four rows: as at once, down to the rows at their seams and at the border."""
    torch.manual_seed(0)
    block = autoencoder.ResBlock(6, "silu", torch.nn, dtype=torch.float64)
    enlarge = autoencoder._enlarging_conv_class(torch.nn.Conv2d)(6, 4, 3, padding=1).double()
    torch.nn.init.normal_(block.norm.weight)
    calls = []
    block.conv1.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(autoencoder, "SMALL_PX", 0)
    monkeypatch.setattr(layers, "FEW_ELEMENTS", 0)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, height, 5, dtype=torch.float64).contiguous(memory_format=layout)
        expected = block(x.clone()), enlarge(x)
        with monkeypatch.context() as patch:
            patch.setattr(autoencoder, "BAND_ELEMENTS", 1)
            calls.clear()
            got = block(x.clone()), enlarge(x)
        assert len(calls) == (1 if height <= 4 else 2 * -(-height // 4))  # of each image
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_bands_are_equal_and_round_as_one(monkeypatch):
    """52 rows of 4096 elements by at most 24 at once: bands of 18, 18 and 16, none so small that its norm would round
    otherwise, and the same bits in bf16.
    """
    torch.manual_seed(0)
    block = autoencoder.ResBlock(64, "silu", torch.nn, dtype=torch.bfloat16)
    block.norm.bias.normal_()
    x = torch.randn(2, 64, 52, 64).bfloat16().contiguous(memory_format=torch.channels_last)
    expected = block(x.clone())
    monkeypatch.setattr(autoencoder, "BAND_ELEMENTS", 24 * 64 * 64)
    assert autoencoder.band_rows(x) == 18
    assert torch.equal(block(x.clone()), expected)
    with torch.enable_grad():
        assert autoencoder.band_rows(x) == 52


@pytest.mark.parametrize("channels", [2, 4, 8, 16, 32])
def test_shortcuts_in_one_pass(channels):
    """Of 8 channels: as pixel (un)shuffle with averages or repeats has it, whatever the ratio of widths."""
    torch.manual_seed(0)
    x, small, large = (torch.randn(2, *shape) for shape in ((8, 4, 6), (channels, 2, 3), (channels, 8, 12)))
    reduced = small + F.pixel_unshuffle(x, 2).unflatten(1, (channels, -1)).mean(2)
    torch.testing.assert_close(autoencoder.add_reduced(small.clone(), x), reduced)
    enlarged = large + F.pixel_shuffle(x.repeat_interleave(4 * channels // 8, dim=1), 2)
    torch.testing.assert_close(autoencoder.add_enlarged(large.clone(), x), enlarged)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_heads_are_mixed_by_one_product(layout):
    """On the CPU by a convolution, elsewhere by a product of all heads: the same."""
    x = random(2, 24, 3, 5).double().contiguous(memory_format=layout)
    mix = autoencoder.Aggregation(24, 3, 8, torch.nn).double().proj_out
    expected = F.conv2d(x, mix.weight, groups=3)
    assert torch.equal(mix(x), expected)
    torch.testing.assert_close(autoencoder.mix_heads(x, mix.weight[:, :, 0, 0], 3), expected, rtol=0, atol=1e-12)
    with FakeTensorMode(), torch.no_grad(), Launches() as elsewhere:
        mix = autoencoder.Aggregation(24, 3, 8, torch.nn, device="cuda").proj_out
        assert mix(torch.empty(x.shape, device="cuda")).shape == expected.shape
    assert elsewhere.names["bmm"] == 1 and "convolution" not in elsewhere.names
