"""What tells one DC-AE from another, and how to read that off a config.json or off tensor shapes."""

from dataclasses import dataclass, fields

from ..config import check_numbers

RES, VIT = "ResBlock", "EfficientViTBlock"
ACTIVATIONS = ("relu", "silu")


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
        check_numbers(self, ("in_channels", "latent_channels", "head_dim"))
        for name, largest in (("channels", 65536), ("layers", 100)):
            for side in (getattr(self, f"{side}_{name}") for side in ("encoder", "decoder")):
                if not all(isinstance(n, int) and 0 <= n <= largest for n in side):
                    raise ValueError(f"{name} are {side!r}")
        stages = len(self.encoder_channels)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple) and len(value) != stages:
                raise ValueError(f"{f.name} describes {len(value)} stages, encoder_channels {stages}")
        choices = (
            ((*self.encoder_blocks, *self.decoder_blocks), (RES, VIT)),
            ((*self.decoder_acts, self.decoder_conv_act), ACTIVATIONS),
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


SANA = AutoencoderConfig()
