"""DC-AE, the deep-compression autoencoder of SANA (arXiv 2410.10733): 32 pixels to one latent cell.

A ladder of stages, each half as large as the one before. Shallow stages are residual blocks, deep
ones EfficientViT blocks (multi-scale linear attention and a gated convolution). The paper's idea is
the shortcut around every change of size: pixel (un)shuffle and channel averages or repeats carry
the signal without parameters, so that a stage learns only the rest (section 3.1).

Both halves run in the memory format channels_last, in which norms, linear layers and shortcuts copy nothing.
Images are [b, 3, h, w] in [-1, 1]; raw latents [b, 32, h/32, w/32]. Submodules carry the names of
the diffusers layout, so its state dicts load strictly. As in layers.py, `ops` is the host's torch.nn.
"""

import functools
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..devices import fp32
from ..kernels import fused
from .autoencoder_config import SANA, VIT, AutoencoderConfig
from .layers import GLUMBConv, relu_linear_attention, rms_norm, rows_per_block, uses_its_weight, works_in_blocks
from .tiling import TiledCodec

NORM_EPS = 1e-5
ATTENTION_EPS = 1e-15  # EfficientViT's value, under which DC-AE was trained; SANA's transformer has 1e-8
FFN_RATIO = 4.0
BAND_ELEMENTS = 2**23  # of a band of rows; fewer would take less memory, but two rows beside a band are done twice
SMALL_PX = 16 * 16  # of an image that is enlarged before its convolution, in 16 bits four times as many

ACTIVATIONS = {"relu": F.relu, "silu": F.silu}


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

        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            """The norm, plus the residual [b, c, h, w]. x may be overwritten."""
            x, more, bias = x.movedim(1, -1), None if residual is None else residual.movedim(1, -1), self.bias.to(x)
            if fused.serves(x) and uses_its_weight(self, x.device):
                return fused.rms_norm(x, self.weight, NORM_EPS, bias=bias, residual=more).movedim(-1, 1)
            return rms_norm(self, NORM_EPS, x, bias, more, run=super().forward).movedim(-1, 1)

    return ChannelNorm


def channel_norm(dim: int, ops: Any, dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
    """An RMS norm with weight and bias over dim 1, whose weight belongs to `ops.RMSNorm`."""
    return _channel_norm_class(ops.RMSNorm)(dim, dtype, device)


def band_rows(x: Tensor) -> int:
    """How many rows of each image of x [b, c, h, w] are worked on at once: on a CPU some, else all.

    Bands are about equal, as a norm of few elements would round otherwise.
    """
    height, row_elements = x.shape[2], x.shape[1] * x.shape[3]
    if not works_in_blocks(x) or height * row_elements <= BAND_ELEMENTS:
        return height
    return max(4, math.ceil(height / math.ceil(height * row_elements / BAND_ELEMENTS)))


class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x)))), [b, c, h, w]."""

    def __init__(self, dim: int, act: str, ops: Any, **factory: Any):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.conv1 = ops.Conv2d(dim, dim, 3, padding=1, **factory)
        self.conv2 = ops.Conv2d(dim, dim, 3, padding=1, bias=False, **factory)
        self.norm = channel_norm(dim, ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """x may be overwritten, so that bands need no second one: what a hook sees lasts to the next block."""
        rows = band_rows(x)
        if rows >= x.shape[2]:
            y = self.act(self.conv1(x), inplace=not torch.is_grad_enabled())
            return self.norm(self.conv2(y), x)
        for image in x.split(1):
            self._fill_in_bands(image, rows)
        return x

    def _fill_in_bands(self, x: Tensor, rows: int) -> None:
        height, done = x.shape[2], x[:, :, :0]
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            # Each convolution takes a row beside the band, and what it makes of its first and last row is dropped.
            first, last = max(top - 2, 0), min(bottom + 2, height)
            y = self.act(self.conv1(x[:, :, first:last]), inplace=True)
            x[:, :, max(top - rows, 0) : top] = done  # what this band had to read of it is read
            start, end = max(top - 1, 0), min(bottom + 1, height)
            y = self.conv2(y[:, :, start - first : end - first])[:, :, top - start : bottom - start]
            done = self.norm(y, x[:, :, top:bottom])
        x[:, :, top:] = done


@functools.cache
def _head_mix_class(base: type) -> type:
    class HeadMix(base):
        """A 1x1 convolution in groups. Overridden where hosts have cast and moved the weights."""

        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if x.device.type == "cpu":
                # Dilation changes nothing of a 1x1 kernel; but without it torch takes group by group on one thread.
                return F.conv2d(x, weight, bias, dilation=2, groups=self.groups)
            mixed = mix_heads(x, weight[:, :, 0, 0], self.groups)
            return mixed if bias is None else mixed + bias[:, None, None]

    return HeadMix


def mix_heads(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """A 1x1 convolution in `heads` groups as one product of all: x [b, c, h, w], weight [c, c / heads] -> x's shape.

    An H100 seems to launch three kernels for each group of a convolution (docs/benchmarks.md).
    """
    pixels = x.movedim(1, -1)
    per_head = pixels.unflatten(-1, (heads, -1)).flatten(0, 2).transpose(0, 1)  # heads, pixels, channels of a head
    mixed = per_head @ weight.unflatten(0, (heads, -1)).mT
    return mixed.transpose(0, 1).reshape(pixels.shape).movedim(-1, 1)


class Aggregation(nn.Module):
    """Tokens of another scale, [b, c, h, w]: a depthwise convolution of all q, k, v channels, then a mix per head."""

    def __init__(self, dim: int, kernel: int, head_dim: int, ops: Any, **factory: Any):
        super().__init__()
        self.proj_in = ops.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False, **factory)
        self.proj_out = _head_mix_class(ops.Conv2d)(dim, dim, 1, groups=dim // head_dim, bias=False, **factory)

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
        out = self.to_out(relu_linear_attention(q, k, v, ATTENTION_EPS))
        return self.norm_out(rearrange(out, "b (h w) c -> b c h w", h=height), x)


class GatedConv(GLUMBConv):
    """x + norm(GLUMBConv(x)), [b, c, h, w]."""

    def __init__(self, dim: int, ops: Any, **factory: Any):
        super().__init__(dim, FFN_RATIO, ops, **factory)
        self.norm = channel_norm(dim, ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x), x)


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


def add_reduced(out: Tensor, x: Tensor) -> Tensor:
    """out [b, o, h, w] plus a pixel unshuffle of x [b, c, 2h, 2w] with its channels averaged to o.

    Runs in bands of rows that fit a CPU's cache, in the format channels_last. out is overwritten and returned.
    """
    channels = x.shape[1]
    each = 4 * channels // out.shape[1]  # how many of the four pixels of a cell are averaged: all, or two in a row
    if each not in (2, 4):
        return out.add_(average_channels(F.pixel_unshuffle(x, 2), out.shape[1]))
    rows = rows_per_block(out, 4 * channels * out.shape[-1])
    target, source = out.movedim(1, -1), x.movedim(1, -1)
    for y in range(0, target.shape[1], rows):
        band = source[:, 2 * y : 2 * (y + rows)]
        band = band[:, :, ::2] + band[:, :, 1::2]  # b 2r w c
        upper, lower = band[:, ::2], band[:, 1::2]
        total = upper + lower if each == 4 else torch.stack((upper, lower), dim=-1).flatten(-2)
        target[:, y : y + rows].add_(total, alpha=1 / each)
    return out


def add_enlarged(out: Tensor, x: Tensor) -> Tensor:
    """out [b, o, 2h, 2w] plus a pixel shuffle of x [b, c, h, w] with its channels repeated to 4 o, in one pass.

    out is overwritten and returned.
    """
    o, (h, w) = out.shape[1], x.shape[2:]
    each = 4 * o // x.shape[1]  # how many of the four pixels of a cell show one channel
    if each not in (1, 2, 4):
        return out.add_(F.pixel_shuffle(repeat_channels(x, 4 * o), 2))
    rows = 1 if each == 4 else 2  # and columns of a cell whose pixels show different channels
    columns = 2 if each == 1 else 1
    x = x.unflatten(1, (o, rows, columns)).permute(0, 1, 4, 2, 5, 3)
    out.unflatten(2, (h, 2)).unflatten(-1, (w, 2)).add_(x)
    return out


@functools.cache
def _enlarging_conv_class(base: type) -> type:
    class EnlargingConv(base):
        """A 3x3 convolution of x enlarged to its double, without enlarging it.

        A new pixel's 3x3 neighbours lie in 2x2 old ones, so that four sums of weights do the work of nine weights,
        for each of the four new pixels in an old one. A small image has fewer pixels than there are weights to add up:
        it is enlarged. Overridden where hosts have cast and moved the weights.
        """

        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if x.shape[2] * x.shape[3] <= SMALL_PX * (4 if x.dtype.itemsize == 2 else 1):
                return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
            first, middle, last = fp32(weight).unbind(2)
            columns = torch.stack([first, middle + last, first + middle, last])  # [(i tap), o, c, 3]
            first, middle, last = columns.unbind(-1)
            taps = torch.stack([first, middle + last, first + middle, last])  # [(j tap), (i tap), o, c]
            kernels = rearrange(taps.to(weight), "(j q) (i p) o c -> (i j o) c p q", j=2, i=2)
            b, _, h, w = x.shape
            biases = None if bias is None else bias.repeat(4)
            out = x.new_empty((b, 2 * h, 2 * w, len(weight))).movedim(-1, 1)  # channels last
            rows = band_rows(out) // 2
            for source, target in [(x, out)] if rows >= h else zip(x.split(1), out.split(1), strict=True):
                for top in range(0, h, rows):
                    bottom, above = min(top + rows, h), min(top, 1)
                    y = F.conv2d(source[:, :, top - above : bottom + 1], kernels, biases, padding=1)
                    y = y.unflatten(1, (2, 2, -1))[:, :, :, :, above:]  # [b, i, j, o, rows and more, w + 1]
                    band = target[:, :, 2 * top : 2 * bottom]
                    for i in (0, 1):
                        for j in (0, 1):
                            band[:, :, i::2, j::2] = y[:, i, j, :, i : i + bottom - top, j : j + w]
            return out

    return EnlargingConv


class Downsample(nn.Module):
    """[b, c, h, w] -> [b, dim_out, h/2, w/2] by a convolution beside a shortcut of averages."""

    def __init__(self, dim: int, dim_out: int, mode: str, ops: Any, shortcut: bool = True, **factory: Any):
        super().__init__()
        self.unshuffle = mode == "pixel_unshuffle"
        self.shortcut = shortcut
        conv_out, stride = (dim_out // 4, 1) if self.unshuffle else (dim_out, 2)
        self.conv = ops.Conv2d(dim, conv_out, 3, stride=stride, padding=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        out = F.pixel_unshuffle(self.conv(x), 2) if self.unshuffle else self.conv(x)
        return add_reduced(out, x) if self.shortcut else out


class Upsample(nn.Module):
    """[b, c, h, w] -> [b, dim_out, 2h, 2w] by a convolution beside a shortcut of repeats."""

    def __init__(self, dim: int, dim_out: int, mode: str, ops: Any, shortcut: bool = True, **factory: Any):
        super().__init__()
        self.shuffle = mode == "pixel_shuffle"
        self.shortcut = shortcut
        if self.shuffle:
            self.conv = ops.Conv2d(dim, 4 * dim_out, 3, padding=1, **factory)
        else:
            self.conv = _enlarging_conv_class(ops.Conv2d)(dim, dim_out, 3, padding=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        out = F.pixel_shuffle(self.conv(x), 2) if self.shuffle else self.conv(x)
        return add_enlarged(out, x) if self.shortcut else out


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
        dims = c.encoder_channels
        self.latent_channels = c.latent_channels
        self.shortcut = c.encoder_out_shortcut
        if c.encoder_layers[0]:
            self.conv_in = ops.Conv2d(c.in_channels, dims[0], 3, padding=1, **factory)
        else:
            self.conv_in = Downsample(c.in_channels, dims[1], c.downsample, ops, shortcut=False, **factory)
        stages = [_layers(c, "encoder", i, ops, **factory) for i in range(len(dims))]
        for stage, (dim, dim_out) in zip(stages[:-1], itertools.pairwise(dims), strict=True):
            if stage:
                stage.append(Downsample(dim, dim_out, c.downsample, ops, **factory))
        self.down_blocks = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.conv_out = ops.Conv2d(dims[-1], c.latent_channels, 3, padding=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for stage in self.down_blocks:
            x = stage(x)
        out = self.conv_out(x)
        return out + average_channels(x, self.latent_channels) if self.shortcut else out


class Decoder(nn.Module):
    """Raw latent [b, 32, h, w] -> image [b, 3, 32h, 32w] around [-1, 1], not clamped."""

    def __init__(self, c: AutoencoderConfig, ops: Any, **factory: Any):
        super().__init__()
        dims = c.decoder_channels
        self.dim_in = dims[-1]
        self.shortcut = c.decoder_in_shortcut
        self.conv_in = ops.Conv2d(c.latent_channels, dims[-1], 3, padding=1, **factory)
        stages = [_layers(c, "decoder", i, ops, **factory) for i in range(len(dims))]
        for stage, (dim, dim_in) in zip(stages[:-1], itertools.pairwise(dims), strict=True):
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
        x = x.contiguous(memory_format=torch.channels_last)
        out = self.conv_in(x)
        x = out + repeat_channels(x, self.dim_in) if self.shortcut else out
        for stage in reversed(self.up_blocks):
            x = stage(x)
        return self.conv_out(self.act(self.norm_out(x), inplace=not torch.is_grad_enabled()))


class Autoencoder(TiledCodec):
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
        self.image_channels = config.in_channels
        self.latent_channels = config.latent_channels
        self.cell_px = config.downscale
        self.encoder = Encoder(config, ops, dtype=dtype, device=device)
        self.decoder = Decoder(config, ops, dtype=dtype, device=device)

    def encode(self, image: Tensor) -> Tensor:
        """image [b, 3, h, w] in [-1, 1] -> raw latent [b, 32, h/32, w/32]. Raises ValueError on other shapes."""
        self.check_image(image)
        return self.encoder(image)

    def decode(self, latent: Tensor) -> Tensor:
        """Raw latent [b, 32, h, w] -> image [b, 3, 32h, 32w], not clamped. Raises ValueError on other shapes."""
        self.check_latent(latent)
        return self.decoder(latent)
