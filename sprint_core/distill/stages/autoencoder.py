"""Training a small DC-AE: first whole, then the decoder alone on the encoder's normalised latents."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...latent import SCALE
from ...models.autoencoder import Autoencoder, Decoder
from ..engine.randomness import SampleRandom
from ..engine.stage import Stage

CROP_PX, CROP_SHARE = 128, 0.5  # the first half of the steps sees crops: a quarter of the cost
NOISE = 0.05  # on the latents, in their own standard deviations, so that the decoder forgives the sampler
EDGE_WEIGHT = 0.5
Images = Callable[[Sequence[int]], Tensor]  # seeds -> images [b, 3, px, px] in [-1, 1]
SHOWN = 8  # images in the sample grids


def image_loss(image: Tensor, target: Tensor) -> Tensor:
    """L1 + squared error + L1 of neighbouring differences, [b, 3, h, w] in [-1, 1]."""
    edges = sum(F.l1_loss(image.diff(dim=d), target.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(image, target) + F.mse_loss(image, target) + EDGE_WEIGHT * edges


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Decibels for images in [-1, 1]."""
    return 10 * torch.log10(4.0 / F.mse_loss(image.clamp(-1, 1), target))


def displayed(images: Tensor) -> Tensor:
    """[b, 3, h, w] in [-1, 1] -> [b, h, w, 3] in [0, 1]."""
    return images.clamp(-1, 1).add(1).div(2).movedim(1, -1)


class WholeStage(Stage[Autoencoder]):
    """Encoder and decoder together, on the images with seeds below `pool`.

    Its noise follows the spread of the whole batch's latents, so that a batch must not be split.
    """

    name = averaged = "autoencoder"

    def __init__(self, model: Autoencoder, images: Images, steps: int, pool: int):
        super().__init__({self.name: model}, {"pool": str(pool)})
        self.model, self.images = model, images
        self.steps, self.pool = steps, pool

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        target = self.images(random.integers(self.pool).tolist()).to(self.device)
        if step < CROP_SHARE * self.steps:
            target = crop(target, random)
        latent = self.model.encode(target)
        noise = NOISE * latent.detach().std(dim=(0, 2, 3), keepdim=True) * random.normal(*latent.shape[1:]).to(latent)
        image = self.model.decode(latent + noise)
        return image_loss(image, target), {"psnr": psnr(image.detach(), target), "latent_std": latent.detach().std()}

    def samples(self, average: Autoencoder) -> Tensor:
        """Round trips."""
        return displayed(average.decode(average.encode(self.images(range(SHOWN)).to(self.device))))


def crop(images: Tensor, random: SampleRandom) -> Tensor:
    """One square of CROP_PX from each image."""
    room = images.shape[-1] - CROP_PX + 1
    corners = zip(random.integers(room).tolist(), random.integers(room).tolist(), strict=True)
    return torch.stack([x[:, i : i + CROP_PX, j : j + CROP_PX] for x, (i, j) in zip(images, corners, strict=True)])


class DecoderStage(Stage[Decoder]):
    """The decoder on a frozen encoder, after `fold`: exact again at the borders, and sharper."""

    name = averaged = "decoder"

    def __init__(self, model: Autoencoder, images: Images, pool: int):
        self.model = model.requires_grad_(False)
        super().__init__({self.name: model.decoder.requires_grad_(True)}, {"pool": str(pool)})
        self.images, self.pool = images, pool

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        target = self.images(random.integers(self.pool).tolist()).to(self.device)
        with torch.no_grad():
            latent = self.model.encode(target)
            latent = latent + NOISE / SCALE * random.normal(*latent.shape[1:]).to(latent)
        image = self.model.decode(latent)
        return image_loss(image, target), {"psnr": psnr(image.detach(), target)}

    def samples(self, average: Decoder) -> Tensor:
        """Round trips."""
        return displayed(average(self.model.encode(self.images(range(SHOWN)).to(self.device))))


@torch.no_grad()
def fold(model: Autoencoder, mean: Tensor, std: Tensor) -> None:
    """Fold each latent channel's mean and std [c] into the nearest convolutions, so that latent * SCALE is unit normal.

    Exact but for the mean at the image's borders, where the decoder's zero padding now means the mean: DecoderStage
    learns that. Needs a DC-AE without shortcuts at the latent.
    """
    out, into = model.encoder.conv_out, model.decoder.conv_in
    gain = 1.0 / (std * SCALE)
    out.weight.mul_(gain[:, None, None, None])
    out.bias.sub_(mean).mul_(gain)
    into.bias.add_((into.weight * mean[None, :, None, None]).sum((1, 2, 3)))
    into.weight.div_(gain[None, :, None, None])


@torch.no_grad()
def latent_statistics(model: Autoencoder, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and std per channel of the encoder's latents over batches of images."""
    latents = torch.cat([model.encode(batch).movedim(1, -1).flatten(0, -2) for batch in batches])
    return latents.mean(0), latents.std(0)
