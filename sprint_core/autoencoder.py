"""DC-AE, the deep-compression autoencoder of SANA (arXiv 2410.10733): 32 pixels to one latent cell.

A ladder of stages, each half as large as the one before. Shallow stages are residual blocks, deep
ones EfficientViT blocks (multi-scale linear attention and a gated convolution). The paper's idea is
the shortcut around every change of size: pixel (un)shuffle and channel averages or repeats carry
the signal without parameters, so that a stage learns only what this leaves out (section 3.1).

Images are [b, 3, h, w] in [-1, 1]; raw latents [b, 32, h/32, w/32]. Submodules carry the names of
the diffusers layout, so its state dicts load strictly. As in layers.py, `ops` is the host's torch.nn.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sprint_core.layers import GLUMBConv, relu_linear_attention

# latent = raw * SCALE. The pipeline or ComfyUI's latent format applies it, once; nothing here does.
SCALE = 0.41407
NORM_EPS = 1e-5
ATTENTION_EPS = 1e-15  # EfficientViT's value, under which DC-AE was trained; SANA's transformer has 1e-8
FFN_RATIO = 4.0

RES, VIT = "ResBlock", "EfficientViTBlock"
ACTIVATIONS = {"relu": F.relu, "silu": F.silu}

Progress = Callable[[int, int], None]


# --- configuration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of a DC-AE; the defaults are f32c32-sana. Per-stage tuples run from pixels to latents.

    A first stage without layers leaves its halving to `conv_in` and its doubling to `conv_out`.
    Raises ValueError where the fields do not describe a model.
    """

    in_channels: int = 3
    latent_channels: int = 32
    head_dim: int = 32
    encoder_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_blocks: tuple[str, ...] = (RES, RES, RES, VIT, VIT, VIT)
    decoder_blocks: tuple[str, ...] = (RES, RES, RES, VIT, VIT, VIT)
    encoder_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_acts: tuple[str, ...] = ("silu",) * 6
    decoder_conv_act: str = "relu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    downsample: str = "conv"
    upsample: str = "interpolate"

    def __post_init__(self) -> None:
        stages = len(self.encoder_channels)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple) and len(value) != stages:
                raise ValueError(f"{f.name} describes {len(value)} stages, encoder_channels {stages}")
        choices = (
            ((*self.encoder_blocks, *self.decoder_blocks), (RES, VIT)),
            ((*self.decoder_acts, self.decoder_conv_act), tuple(ACTIVATIONS)),
            ((self.downsample,), ("conv", "pixel_unshuffle")),
            ((self.upsample,), ("interpolate", "pixel_shuffle")),
        )
        for values, allowed in choices:
            for value in set(values) - set(allowed):
                raise ValueError(f"DC-AE has no {value!r}; known are {', '.join(allowed)}")
        if 0 in self.encoder_layers[1:] + self.decoder_layers[1:]:
            raise ValueError("only the first stage of a DC-AE may have no layers")

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.encoder_channels) - 1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AutoencoderConfig":
        """The inverse of `dataclasses.asdict`, also through JSON. Raises ValueError on unknown keys."""
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown autoencoder settings: {', '.join(sorted(unknown))}")
        return cls(**{key: _tuples(value) for key, value in data.items()})


SANA = AutoencoderConfig()


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


# Names in the config.json of a diffusers AutoencoderDC, and what it means by leaving one out.
_DIFFUSERS_KEYS = {
    "in_channels": ("in_channels", 3),
    "latent_channels": ("latent_channels", 32),
    "attention_head_dim": ("head_dim", 32),
    "encoder_block_out_channels": ("encoder_channels", SANA.encoder_channels),
    "decoder_block_out_channels": ("decoder_channels", SANA.decoder_channels),
    "encoder_layers_per_block": ("encoder_layers", SANA.encoder_layers),
    "decoder_layers_per_block": ("decoder_layers", SANA.decoder_layers),
    "encoder_block_types": ("encoder_blocks", RES),
    "decoder_block_types": ("decoder_blocks", RES),
    "encoder_qkv_multiscales": ("encoder_multiscales", SANA.encoder_multiscales),
    "decoder_qkv_multiscales": ("decoder_multiscales", SANA.decoder_multiscales),
    "decoder_act_fns": ("decoder_acts", "silu"),
    "decoder_conv_act_fn": ("decoder_conv_act", "relu"),
    "encoder_out_shortcut": ("encoder_out_shortcut", True),
    "decoder_in_shortcut": ("decoder_in_shortcut", True),
    "downsample_block_type": ("downsample", "pixel_unshuffle"),
    "upsample_block_type": ("upsample", "pixel_shuffle"),
}
_PER_STAGE = ("encoder_blocks", "decoder_blocks", "decoder_acts")  # one word there means all stages


def config_from_diffusers(data: Mapping[str, Any]) -> AutoencoderConfig:
    """The configuration that a diffusers AutoencoderDC config.json describes.

    Raises ValueError on settings that are unknown, and on the norms and latent scales of other
    DC-AE families, which this decoder would turn into plausible but wrong images.
    """
    data = {key: value for key, value in data.items() if not key.startswith("_")}
    scale, norms = data.pop("scaling_factor", SCALE), data.pop("decoder_norm_types", "rms_norm")
    if abs(scale - SCALE) > 1e-5 and scale != 1.0:  # diffusers writes 1 where nobody set a scale
        raise ValueError(f"this DC-AE scales its latents by {scale:g}; SANA's scale is {SCALE}")
    if set([norms] if isinstance(norms, str) else norms) != {"rms_norm"}:
        raise ValueError(f"this DC-AE has norms {norms!r}; only 'rms_norm' is supported")
    unknown = set(data) - set(_DIFFUSERS_KEYS)
    if unknown:
        raise ValueError(f"unknown settings in an AutoencoderDC config: {', '.join(sorted(unknown))}")
    ours = {name: data.get(key, default) for key, (name, default) in _DIFFUSERS_KEYS.items()}
    for name in _PER_STAGE:
        if isinstance(ours[name], str):
            ours[name] = (ours[name],) * len(ours["encoder_channels"])
    for name in ("downsample", "upsample"):
        ours[name] = ours[name].lower()  # published files have "Conv"
    for side in ("encoder", "decoder"):  # residual stages have no attention, whatever the file says
        pairs = zip(ours[f"{side}_blocks"], ours[f"{side}_multiscales"])
        ours[f"{side}_multiscales"] = tuple(scales if kind == VIT else () for kind, scales in pairs)
    return AutoencoderConfig.from_dict(ours)


def _infer_stage(shapes: Mapping[str, tuple], stage: str) -> tuple[str, int, int, tuple[int, ...]]:
    """Block type, channels, layers and attention kernels of the stage with this key prefix."""

    def found(suffix: str) -> list[tuple]:
        pattern = re.compile(re.escape(stage) + r"\d+\." + suffix)
        return [tuple(shapes[key]) for key in sorted(shapes) if pattern.fullmatch(key)]

    if to_q := found(r"attn\.to_q\.weight"):
        kernels = found(r"attn\.to_qkv_multiscale\.\d+\.proj_in\.weight")
        return VIT, to_q[0][1], len(to_q), tuple(kernel[-1] for kernel in kernels[: len(kernels) // len(to_q)])
    convs = found(r"conv1\.weight")
    return RES, convs[0][0] if convs else 0, len(convs), ()


def _infer_side(shapes: Mapping[str, tuple], side: str, root: str) -> dict[str, Any]:
    """Per-stage settings of the encoder or decoder, whose stages have keys beginning with `root`."""
    count = 1 + max(int(key[len(root) :].split(".")[0]) for key in shapes if key.startswith(root))
    blocks, channels, layers, scales = zip(*(_infer_stage(shapes, f"{root}{i}.") for i in range(count)))
    if not layers[0]:  # nothing reads its width; published files write half the next one
        channels = (channels[1] // 2, *channels[1:])
    values = {"blocks": blocks, "channels": channels, "layers": layers, "multiscales": scales}
    return {f"{side}_{name}": value for name, value in values.items()}


def _infer_fields(shapes: Mapping[str, tuple]) -> dict[str, Any]:
    down, up = "encoder.down_blocks.", "decoder.up_blocks."
    found = {**_infer_side(shapes, "encoder", down), **_infer_side(shapes, "decoder", up)}
    stages = len(found["encoder_channels"])
    lite = found["decoder_layers"][0] == 0 and VIT not in found["decoder_blocks"]
    heads = [shape[1] for key, shape in shapes.items() if key.endswith("to_qkv_multiscale.0.proj_out.weight")]
    last_down = shapes[f"{down}{stages - 2}.{found['encoder_layers'][-2]}.conv.weight"][0]
    last_up = shapes[f"{up}{stages - 2}.0.conv.weight"][0]
    return found | {
        "in_channels": (shapes.get("encoder.conv_in.weight") or shapes["encoder.conv_in.conv.weight"])[1],
        "latent_channels": shapes["encoder.conv_out.weight"][0],
        "head_dim": heads[0] if heads else SANA.head_dim,
        "decoder_acts": ("silu",) * stages,
        "decoder_conv_act": "silu" if lite else "relu",
        "downsample": "conv" if last_down == found["encoder_channels"][-1] else "pixel_unshuffle",
        "upsample": "interpolate" if last_up == found["decoder_channels"][-2] else "pixel_shuffle",
    }


def infer_config(shapes: Mapping[str, tuple]) -> AutoencoderConfig:
    """The configuration behind a state dict in diffusers naming, from {key: shape}.

    Three things leave no trace in shapes. Both latent shortcuts are taken to be there, as in every
    published model. Activations are SiLU, but ReLU before the last convolution; a decoder of
    residual blocks only, with an empty first stage, is taken to be dc-ae-lite, which has SiLU there
    too. Raises ValueError where `shapes` are not those of a DC-AE.
    """
    try:
        return AutoencoderConfig(**_infer_fields(shapes))
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError("these are not the tensors of a DC-AE in diffusers naming") from error


# --- blocks ---------------------------------------------------------------------------------------


@functools.cache
def _channel_norm_class(base: type) -> type:
    class ChannelNorm(base):
        """RMS norm with a bias over the channels of [b, c, h, w].

        The bias is added here, since no RMSNorm of torch or of a host applies one; it is created
        after the base class, as ComfyUI's sets `bias` to None.
        """

        def __init__(self, dim: int, dtype: torch.dtype | None, device: Any):
            super().__init__(dim, eps=NORM_EPS, dtype=dtype, device=device)
            self.bias = nn.Parameter(torch.zeros(dim, dtype=dtype, device=device))

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x.movedim(1, -1))
            return (x + self.bias.to(x)).movedim(-1, 1)

    return ChannelNorm


def channel_norm(dim: int, ops: Any, dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
    """An RMS norm with weight and bias over dim 1, whose weight belongs to `ops.RMSNorm`."""
    return _channel_norm_class(ops.RMSNorm)(dim, dtype, device)


class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x)))), [b, c, h, w]."""

    def __init__(self, dim: int, act: str, ops: Any, **factory: Any):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.conv1 = ops.Conv2d(dim, dim, 3, padding=1, **factory)
        self.conv2 = ops.Conv2d(dim, dim, 3, padding=1, bias=False, **factory)
        self.norm = channel_norm(dim, ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.act(self.conv1(x))))


class Aggregation(nn.Module):
    """Tokens of another scale: a depthwise convolution of all q, k, v channels, then a mix per group of d."""

    def __init__(self, dim: int, kernel: int, head_dim: int, ops: Any, **factory: Any):
        super().__init__()
        self.proj_in = ops.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False, **factory)
        self.proj_out = ops.Conv2d(dim, dim, 1, groups=dim // head_dim, bias=False, **factory)

    def forward(self, qkv: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(qkv))


class MultiscaleAttention(nn.Module):
    """x + norm(multi-scale ReLU linear attention of x), [b, c, h, w]; EfficientViT, arXiv 2205.14756.

    A head takes 3d neighbouring channels of the joint [q | k | v] as its q, k and v. So its q may
    lie in what `to_k` made: the published weights were trained this way.
    """

    def __init__(self, dim: int, head_dim: int, kernels: tuple[int, ...], ops: Any, **factory: Any):
        super().__init__()
        inner = dim // head_dim * head_dim
        self.head_dim = head_dim
        self.to_q = ops.Linear(dim, inner, bias=False, **factory)
        self.to_k = ops.Linear(dim, inner, bias=False, **factory)
        self.to_v = ops.Linear(dim, inner, bias=False, **factory)
        self.to_qkv_multiscale = nn.ModuleList(Aggregation(3 * inner, k, head_dim, ops, **factory) for k in kernels)
        self.to_out = ops.Linear(inner * (1 + len(kernels)), dim, bias=False, **factory)
        self.norm_out = channel_norm(dim, ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[-2]
        tokens = rearrange(x, "b c h w -> b (h w) c")
        qkv = torch.cat([self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)], dim=-1)
        qkv = rearrange(qkv, "b (h w) c -> b c h w", h=height)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], dim=1)
        q, k, v = rearrange(qkv, "b (g three d) h w -> three b g (h w) d", three=3, d=self.head_dim)
        out = relu_linear_attention(q, k, v, ATTENTION_EPS).to(x.dtype)
        out = self.to_out(rearrange(out, "b g n d -> b n (g d)"))
        return x + self.norm_out(rearrange(out, "b (h w) c -> b c h w", h=height))


class GatedConv(GLUMBConv):
    """x + norm(GLUMBConv(x)), [b, c, h, w]."""

    def __init__(self, dim: int, ops: Any, **factory: Any):
        super().__init__(dim, FFN_RATIO, ops, **factory)
        self.norm = channel_norm(dim, ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(super().forward(x))


class EfficientViTBlock(nn.Module):
    """Context from linear attention, then detail from a gated convolution; both keep [b, c, h, w]."""

    def __init__(self, dim: int, head_dim: int, kernels: tuple[int, ...], ops: Any, **factory: Any):
        super().__init__()
        self.attn = MultiscaleAttention(dim, head_dim, kernels, ops, **factory)
        self.conv_out = GatedConv(dim, ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


def average_channels(x: Tensor, channels: int) -> Tensor:
    """[b, g*channels, h, w] -> [b, channels, h, w], each the mean of g neighbouring channels."""
    return x.unflatten(1, (channels, -1)).mean(2)


def repeat_channels(x: Tensor, channels: int) -> Tensor:
    """[b, c, h, w] -> [b, channels, h, w], each input channel channels/c times in a row."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


class Downsample(nn.Module):
    """[b, c, h, w] -> [b, dim_out, h/2, w/2] by a convolution beside a shortcut of averages."""

    def __init__(self, dim: int, dim_out: int, mode: str, ops: Any, shortcut: bool = True, **factory: Any):
        super().__init__()
        self.dim_out, self.unshuffle, self.shortcut = dim_out, mode == "pixel_unshuffle", shortcut
        conv_out, stride = (dim_out // 4, 1) if self.unshuffle else (dim_out, 2)
        self.conv = ops.Conv2d(dim, conv_out, 3, stride=stride, padding=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        out = F.pixel_unshuffle(self.conv(x), 2) if self.unshuffle else self.conv(x)
        return out + average_channels(F.pixel_unshuffle(x, 2), self.dim_out) if self.shortcut else out


class Upsample(nn.Module):
    """[b, c, h, w] -> [b, dim_out, 2h, 2w] by a convolution beside a shortcut of repeats."""

    def __init__(self, dim: int, dim_out: int, mode: str, ops: Any, shortcut: bool = True, **factory: Any):
        super().__init__()
        self.dim_out, self.shuffle, self.shortcut = dim_out, mode == "pixel_shuffle", shortcut
        self.conv = ops.Conv2d(dim, 4 * dim_out if self.shuffle else dim_out, 3, padding=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        out = F.pixel_shuffle(self.conv(x), 2) if self.shuffle else self.conv(F.interpolate(x, scale_factor=2))
        return out + F.pixel_shuffle(repeat_channels(x, 4 * self.dim_out), 2) if self.shortcut else out


def _layers(c: AutoencoderConfig, side: str, i: int, ops: Any, **factory: Any) -> list[nn.Module]:
    """The blocks of stage i of the 'encoder' or 'decoder', without the change of size."""
    kind, dim, count, kernels = (getattr(c, f"{side}_{x}")[i] for x in ("blocks", "channels", "layers", "multiscales"))
    if kind == VIT:
        return [EfficientViTBlock(dim, c.head_dim, kernels, ops, **factory) for _ in range(count)]
    act = c.decoder_acts[i] if side == "decoder" else "silu"
    return [ResBlock(dim, act, ops, **factory) for _ in range(count)]


# --- the model ------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Image [b, 3, h, w] in [-1, 1] -> raw latent [b, 32, h/32, w/32]."""

    def __init__(self, c: AutoencoderConfig, ops: Any, **factory: Any):
        super().__init__()
        dims, self.latent_channels, self.shortcut = c.encoder_channels, c.latent_channels, c.encoder_out_shortcut
        if c.encoder_layers[0]:
            self.conv_in = ops.Conv2d(c.in_channels, dims[0], 3, padding=1, **factory)
        else:
            self.conv_in = Downsample(c.in_channels, dims[1], c.downsample, ops, shortcut=False, **factory)
        stages = [_layers(c, "encoder", i, ops, **factory) for i in range(len(dims))]
        for stage, dim, dim_out in zip(stages, dims, dims[1:]):
            if stage:
                stage.append(Downsample(dim, dim_out, c.downsample, ops, **factory))
        self.down_blocks = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.conv_out = ops.Conv2d(dims[-1], c.latent_channels, 3, padding=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        out = self.conv_out(x)
        return out + average_channels(x, self.latent_channels) if self.shortcut else out


class Decoder(nn.Module):
    """Raw latent [b, 32, h, w] -> image [b, 3, 32h, 32w] around [-1, 1], not clamped."""

    def __init__(self, c: AutoencoderConfig, ops: Any, **factory: Any):
        super().__init__()
        dims, self.dim_in, self.shortcut = c.decoder_channels, c.decoder_channels[-1], c.decoder_in_shortcut
        self.conv_in = ops.Conv2d(c.latent_channels, dims[-1], 3, padding=1, **factory)
        stages = [_layers(c, "decoder", i, ops, **factory) for i in range(len(dims))]
        for stage, dim, dim_in in zip(stages, dims, dims[1:]):
            if stage:
                stage.insert(0, Upsample(dim_in, dim, c.upsample, ops, **factory))
        self.up_blocks = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        last = dims[0] if c.decoder_layers[0] else dims[1]
        self.norm_out = channel_norm(last, ops, **factory)
        self.act = ACTIVATIONS[c.decoder_conv_act]
        if c.decoder_layers[0]:
            self.conv_out = ops.Conv2d(last, c.in_channels, 3, padding=1, **factory)
        else:
            self.conv_out = Upsample(last, c.in_channels, c.upsample, ops, shortcut=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_in(x)
        x = out + repeat_channels(x, self.dim_in) if self.shortcut else out
        for stage in reversed(self.up_blocks):
            x = stage(x)
        return self.conv_out(self.act(self.norm_out(x)))


class Autoencoder(nn.Module):
    """DC-AE with the names of diffusers' AutoencoderDC. Inputs must have the weights' dtype and device."""

    def __init__(
        self,
        config: AutoencoderConfig = SANA,
        *,
        ops: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, ops, dtype=dtype, device=device)
        self.decoder = Decoder(config, ops, dtype=dtype, device=device)

    def encode(self, image: Tensor) -> Tensor:
        """image [b, 3, h, w] in [-1, 1] -> raw latent [b, 32, h/32, w/32]. Raises ValueError on other shapes."""
        self._check_image(image)
        return self.encoder(image)

    def decode(self, latent: Tensor) -> Tensor:
        """Raw latent [b, 32, h, w] -> image [b, 3, 32h, 32w], not clamped. Raises ValueError on other shapes."""
        self._check_latent(latent)
        return self.decoder(latent)

    def encode_tiled(
        self, image: Tensor, tile_px: int = 1024, overlap_px: int = 256, progress: Progress | None = None
    ) -> Tensor:
        """`encode` by tiles, in the memory of one. Attention sees one tile at a time, so results differ a little.

        tile_px, overlap_px: multiples of 32 pixels, the overlap below the tile, else ValueError.
        progress: called with (done, total) after each tile.
        """
        self._check_image(image)
        tile, overlap = self._cells(tile_px, overlap_px)
        return _tiled(self.encoder, image, self.config.downscale, 1, tile, overlap, progress)

    def decode_tiled(
        self, latent: Tensor, tile_px: int = 1024, overlap_px: int = 256, progress: Progress | None = None
    ) -> Tensor:
        """`decode` by tiles; sizes are in pixels of the image, as in `encode_tiled`."""
        self._check_latent(latent)
        tile, overlap = self._cells(tile_px, overlap_px)
        return _tiled(self.decoder, latent, 1, self.config.downscale, tile, overlap, progress)

    def _check_image(self, image: Tensor) -> None:
        c, n = self.config.in_channels, self.config.downscale
        if image.ndim != 4 or image.shape[1] != c or image.shape[2] % n or image.shape[3] % n:
            raise ValueError(f"image must be [b, {c}, h, w] with h and w multiples of {n}, not {list(image.shape)}")

    def _check_latent(self, latent: Tensor) -> None:
        c = self.config.latent_channels
        if latent.ndim != 4 or latent.shape[1] != c:
            raise ValueError(f"latent must be [b, {c}, h, w], not {list(latent.shape)}")

    def _cells(self, tile_px: int, overlap_px: int) -> tuple[int, int]:
        n = self.config.downscale
        if tile_px % n or overlap_px % n or not 0 <= overlap_px < tile_px:
            raise ValueError(f"tile {tile_px} px and overlap {overlap_px} px must be multiples of {n}, overlap < tile")
        return tile_px // n, overlap_px // n


# --- tiling ---------------------------------------------------------------------------------------


def tile_windows(cells: int, tile: int, overlap: int, scale: int = 1) -> list[tuple[int, Tensor]]:
    """Tiles along one axis: (first cell, weights [min(tile, cells) * scale] in fp32) each.

    Tiles are spread evenly, overlapping by at least `overlap` cells. Weights rise and fall linearly
    over the overlap and sum to 1 at every one of the cells * scale output positions. Tiles of a
    plane are products of two axes, so their weights sum to 1 as well.
    """
    if cells <= tile:
        return [(0, torch.ones(cells * scale))]
    count = math.ceil((cells - overlap) / (tile - overlap))
    starts = [i * (cells - tile) // (count - 1) for i in range(count)]
    ramp = ((torch.arange(tile * scale) + 0.5) / max(overlap * scale, 1)).clamp(max=1.0)
    rise, fall = ramp, ramp.flip(0)
    shapes = [(rise if i > 0 else 1.0) * (fall if i < count - 1 else torch.ones_like(fall)) for i in range(count)]
    total = torch.zeros(cells * scale)
    for start, shape in zip(starts, shapes):
        total[start * scale : (start + tile) * scale] += shape
    return [(a, shape / total[a * scale : (a + tile) * scale]) for a, shape in zip(starts, shapes)]


def _tiled(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    unit: int,
    scale: int,
    tile: int,
    overlap: int,
    progress: Progress | None,
) -> Tensor:
    """Sum of `run` over feathered tiles of x [b, c, h*unit, w*unit] -> [b, c', h*scale, w*scale], in x's dtype.

    tile, overlap: in cells, of which x has h by w. A single tile is `run(x)` itself.
    """
    height, width = x.shape[-2] // unit, x.shape[-1] // unit
    rows, columns = (tile_windows(n, tile, overlap, scale) for n in (height, width))
    jobs = [(row, column) for row in rows for column in columns]
    out: Tensor | None = None
    for done, ((top, weight_y), (left, weight_x)) in enumerate(jobs, 1):
        part = run(x[..., top * unit :, left * unit :][..., : tile * unit, : tile * unit])
        if len(jobs) > 1:
            if out is None:
                out = part.new_zeros((*part.shape[:2], height * scale, width * scale), dtype=torch.float32)
            weight = weight_y.to(part.device)[:, None] * weight_x.to(part.device)
            h, w = part.shape[-2:]
            out[..., top * scale :, left * scale :][..., :h, :w] += part * weight
        if progress:
            progress(done, len(jobs))
    return part if out is None else out.to(part.dtype)
