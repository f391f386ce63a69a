"""The contrastive network of emoji: its loss and recall reckoned in other ways, what it hears, and what it finds."""

import numpy as np
import pytest
import torch

from sprint_core.distill.dataset import emoji_scenes, emoji_text
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.stages.contrastive import NOISE, ContrastiveStage
from sprint_core.emoji import captions, concepts, templates
from sprint_core.evaluate import contrastive, emoji, frechet
from sprint_core.text.tokenizers import PAD
from sprint_core.weights.tensorfile import CheckpointError


@pytest.fixture
def network():
    torch.manual_seed(0)
    return contrastive.ContrastiveNetwork(emoji_text.tokenizer().size)


def tokens(*texts: str) -> torch.Tensor:
    return contrastive.padded([emoji_text.prompts().tokens(text).ids for text in texts])


def test_padded_tokens_are_those_of_training():
    texts = ["pizza", "two cats to the left of a dog on a red background"]
    assert np.array_equal(tokens(*texts).numpy(), emoji_scenes.tokens(texts))


def test_padding_is_not_heard_and_order_is(network):
    network.text.positions.data.normal_()
    row = tokens("a cat above a dog")
    length = int((row != PAD).sum())
    whole = network.embed_captions(row)
    torch.testing.assert_close(network.embed_captions(row[:, :length]), whole)
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(1))
    assert (network.embed_captions(tokens("a dog above a cat")) - whole).norm() > 1e-3


def test_the_loss_is_both_cross_entropies(network):
    """Reckoned anew in float64, with the noise that the stage draws."""
    images = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    stage = ContrastiveStage(network, images, tokens("cat", "dog", "pizza", "tree", "car"), "")
    loss, metrics = stage.loss("features", 0, SampleRandom(1, 0, "features", range(4)))
    random = SampleRandom(1, 0, "features", range(4))
    chosen = random.integers(5)
    seen = images[chosen].permute(0, 2, 3, 1) / 255.0 + NOISE * random.normal(64, 64, 3)
    shown, said = (
        x.detach().double() for x in (network.embed_images(seen), network.embed_captions(stage.tokens[chosen]))
    )
    closeness = (shown @ said.T) / contrastive.TEMPERATURE
    both = [-(rows - rows.logsumexp(1, keepdim=True)).diagonal().mean() for rows in (closeness, closeness.T)]
    assert loss.item() == pytest.approx(sum(both).item() / 2, rel=1e-5)
    expected = (closeness.argmax(1) == torch.arange(4)).double().mean()
    assert metrics["right"].item() == pytest.approx(expected.item())


def test_the_temperature_has_a_floor(network):
    network.log_scale.data.fill_(9.0)
    stage = ContrastiveStage(network, torch.zeros(2, 3, 64, 64, dtype=torch.uint8), tokens("cat", "dog"), "")
    stage.loss("features", 0, SampleRandom(1, 0, "features", range(2)))
    assert network.log_scale.exp().item() == pytest.approx(100.0, rel=1e-5)


def test_recall_is_how_often_the_own_caption_is_found(network):
    images = torch.randint(256, (30, 64, 64, 3), dtype=torch.uint8)
    texts = tokens(*(prompt.text for prompt in captions.prompts(30)))
    with torch.no_grad():
        closest = network(images / 255.0, texts).topk(5, dim=1).indices
    found = closest == torch.arange(30)[:, None]
    expected = {"R@1": found[:, 0].double().mean().item(), "R@5": found.any(1).double().mean().item()}
    assert contrastive.recall(network, images, texts) == pytest.approx(expected, abs=1e-4)


def test_it_learns_which_caption_an_image_has(network):
    """Sixteen true scenes, told apart after some steps."""
    prompts = captions.prompts(16, split="train", among=concepts.common())
    images = emoji.true_images(prompts, templates.load().art(), 0).movedim(-1, 1)
    images = torch.nn.functional.interpolate(images.float(), (64, 64), mode="area").byte()
    stage = ContrastiveStage(network, images, tokens(*(prompt.text for prompt in prompts)), "")
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for step in range(40):
        loss, _ = stage.loss("features", step, SampleRandom(0, step, "features", range(16)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert contrastive.recall(network, images.movedim(1, -1), stage.tokens)["R@1"] > 0.9


def test_the_bundled_one_finds_captions_of_true_scenes():
    """Of 120 held-out ones, painted from thumbnails; shuffled, it finds next to none."""
    network = contrastive.load()
    prompts = captions.prompts(120, 5, among=concepts.common())
    images = emoji.true_images(prompts, templates.load().art(), 5)
    texts = tokens(*(prompt.text for prompt in prompts))
    found = contrastive.recall(network, images, texts)
    assert found["R@1"] > 0.6 and found["R@5"] > 0.9
    assert contrastive.recall(network, images, texts.roll(1, 0))["R@5"] < 0.2
    assert network.image.features(images[:2] / 255.0).shape == (2, frechet.WIDTH)
    assert contrastive.FILE.stat().st_size < 3e6


def test_other_files_are_refused(network, tmp_path):
    path = tmp_path / "features.safetensors"
    network.text.out.bias.data = torch.zeros(3)
    contrastive.save(network, path, "")
    with pytest.raises(CheckpointError, match=r"its tensors are not those of a contrastive network; train it anew"):
        contrastive.load(path)
