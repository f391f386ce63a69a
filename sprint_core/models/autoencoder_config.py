"""What tells one DC-AE (arXiv 2410.10733) from another; weights/layouts reads it off config.json or tensor shapes."""

from dataclasses import dataclass, fields
from typing import Annotated, Final, Literal

from ..config import Count, Range, check_fields

RES: Final = "ResBlock"
VIT: Final = "EfficientViTBlock"

Activation = Literal["relu", "silu"]
BlockType = Literal["ResBlock", "EfficientViTBlock"]
Channels = Annotated[int, Range(1, 65536)]
Layers = Annotated[int, Range(0, 100)]
Kernel = Annotated[int, Range(1, 100)]


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of a DC-AE; the defaults are f32c32-sana. Per-stage tuples run from pixels to latents.

    A first stage without layers leaves its halving to `conv_in` and its doubling to `conv_out`.
    Raises ValueError where the fields do not describe a model.
    """

    in_channels: Count = 3
    latent_channels: Count = 32
    head_dim: Count = 32
    encoder_channels: tuple[Channels, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_channels: tuple[Channels, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers: tuple[Layers, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers: tuple[Layers, ...] = (3, 3, 3, 3, 3, 3)
    encoder_blocks: tuple[BlockType, ...] = (RES, RES, RES, VIT, VIT, VIT)
    decoder_blocks: tuple[BlockType, ...] = (RES, RES, RES, VIT, VIT, VIT)
    encoder_multiscales: tuple[tuple[Kernel, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_multiscales: tuple[tuple[Kernel, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_acts: tuple[Activation, ...] = ("silu",) * 6
    decoder_conv_act: Activation = "relu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    downsample: Literal["conv", "pixel_unshuffle"] = "conv"
    upsample: Literal["interpolate", "pixel_shuffle"] = "interpolate"

    def __post_init__(self) -> None:
        check_fields(self)
        stages = len(self.encoder_channels)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple) and len(value) != stages:
                raise ValueError(f"{f.name} describes {len(value)} stages, encoder_channels {stages}")
        if stages < 2:
            raise ValueError(f"encoder_channels describes {stages} stages; a DC-AE has at least two")
        if 0 in self.encoder_layers[1:] + self.decoder_layers[1:]:
            raise ValueError("only the first stage of a DC-AE may have no layers")

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.encoder_channels) - 1)


SANA = AutoencoderConfig()
