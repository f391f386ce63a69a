"""Training a small DC-AE: first whole, then the decoder alone on the encoder's normalised latents."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ...latent import SCALE
from ...models.autoencoder import Autoencoder, Decoder
from ..engine.phase import Phase
from ..engine.randomness import SampleRandom
from ..engine.stage import Stage

NOISE = 0.05  # on the latents, in their own standard deviations, so that the decoder forgives the sampler
EDGE_WEIGHT = 0.5
CROP_PX = 128
SHOWN = 8  # images in the sample grids
FEATURE_WEIGHT, CRITIC_WEIGHT = 1.0, 0.05
CRITIC_FROM = 300  # steps; the critic learns first


class Images(Protocol):
    """Training images, [b, 3, px, px] in [-1, 1]."""

    fingerprint: str
    crop_share: float  # of the steps of the first stage that see crops, at a quarter of the cost

    def crops(self, random: SampleRandom, step: int) -> Tensor:
        """A square of half the side from each image."""
        ...

    def whole(self, random: SampleRandom) -> Tensor: ...

    def shown(self, count: int) -> Tensor:
        """Always the same ones, for sample grids."""
        ...


class SeededImages:
    """Images that follow from seeds 0 to pool - 1 by `draw`: [b, 3, px, px] in [-1, 1]."""

    crop_share = 0.5

    def __init__(self, draw: Callable[[Sequence[int]], Tensor], pool: int):
        self.draw, self.pool = draw, pool
        self.fingerprint = str(pool)

    def crops(self, random: SampleRandom, step: int) -> Tensor:
        return crop(self.whole(random), random)

    def whole(self, random: SampleRandom) -> Tensor:
        return self.draw(random.integers(self.pool).tolist())

    def shown(self, count: int) -> Tensor:
        return self.draw(range(count))


def crop(images: Tensor, random: SampleRandom) -> Tensor:
    """One square of CROP_PX from each image."""
    room = images.shape[-1] - CROP_PX + 1
    corners = zip(random.integers(room).tolist(), random.integers(room).tolist(), strict=True)
    return torch.stack([x[:, i : i + CROP_PX, j : j + CROP_PX] for x, (i, j) in zip(images, corners, strict=True)])


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
    """Encoder and decoder together.

    Its noise follows the spread of the whole batch's latents, so that a batch must not be split.
    """

    name = averaged = "autoencoder"

    def __init__(self, model: Autoencoder, images: Images, steps: int):
        super().__init__({self.name: model}, {"images": images.fingerprint})
        self.model, self.images, self.steps = model, images, steps

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        is_crop = step < self.images.crop_share * self.steps
        target = self.images.crops(random, step) if is_crop else self.images.whole(random)
        target = target.to(self.device)
        latent = self.model.encode(target)
        noise = NOISE * latent.detach().std(dim=(0, 2, 3), keepdim=True) * random.normal(*latent.shape[1:]).to(latent)
        image = self.model.decode(latent + noise).to(target)
        return image_loss(image, target), {"psnr": psnr(image.detach(), target), "latent_std": latent.detach().std()}

    def samples(self, average: Autoencoder) -> Tensor:
        """Round trips."""
        return displayed(average.decode(average.encode(self.images.shown(SHOWN).to(self.device))))


class PatchCritic(nn.Module):
    """Tells true from decoded patches of images [b, 3, h, w]: features of each layer, the last one logits.

    Spectral norms keep its gradient bounded (arXiv 1802.05957), so that its weight need not adapt.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width)
        down = [nn.Conv2d(*pair, 4, stride=2, padding=1) for pair in itertools.pairwise(sizes)]
        self.layers = nn.ModuleList(spectral_norm(layer) for layer in (*down, nn.Conv2d(4 * width, 1, 3, padding=1)))

    def forward(self, image: Tensor) -> list[Tensor]:
        features = [image]
        for layer in self.layers:
            features.append(layer(F.leaky_relu(features[-1], 0.2) if len(features) > 1 else image))
        return features[1:]


class DecoderStage(Stage[Decoder]):
    """The decoder on a frozen encoder, after `fold`: exact again at the borders, and sharper.

    critic: a patch critic that learns with it (as DC-AE's third phase, arXiv 2410.10733, section 3.3); the decoder
    is to match its features of the true image, and after a while to convince it.
    """

    name = averaged = "decoder"

    def __init__(self, model: Autoencoder, images: Images, critic: PatchCritic | None = None):
        self.model = model.requires_grad_(False)
        modules: dict[str, nn.Module] = {self.name: model.decoder.requires_grad_(True)}
        if critic is not None:
            modules["critic"] = critic
        plan = [Phase(name, averaged=name == self.averaged) for name in modules]
        super().__init__(modules, {"images": images.fingerprint}, plan)
        self.images, self.critic = images, critic

    def loss(self, phase: str, step: int, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        target = self.images.whole(random).to(self.device)
        with torch.no_grad():
            latent = self.model.encode(target)
            latent = latent + NOISE / SCALE * random.normal(*latent.shape[1:]).to(latent)
        if phase == "critic":
            return self._critic_loss(latent, target)
        image = self.model.decode(latent).to(target)
        loss, metrics = image_loss(image, target), {"psnr": psnr(image.detach(), target)}
        if self.critic is not None:
            with torch.no_grad():
                true = self.critic(target)
            decoded = self.critic(image)
            matching = sum(F.l1_loss(a, b) for a, b in zip(decoded[:-1], true[:-1], strict=True))
            convincing = -decoded[-1].mean() if step >= CRITIC_FROM else 0.0
            loss = loss + FEATURE_WEIGHT * matching + CRITIC_WEIGHT * convincing
            metrics["features"] = torch.as_tensor(matching).detach()
        return loss, metrics

    def _critic_loss(self, latent: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge loss of true and decoded patches."""
        assert self.critic is not None
        with torch.no_grad():
            image = self.model.decode(latent).to(target)
        real, fake = self.critic(target)[-1], self.critic(image)[-1]
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean(), {"real": real.detach().mean()}

    def samples(self, average: Decoder) -> Tensor:
        """Round trips."""
        return displayed(average(self.model.encode(self.images.shown(SHOWN).to(self.device))))


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
