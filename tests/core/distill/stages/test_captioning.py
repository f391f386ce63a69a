"""Pre-training of a small text encoder by captioning questions."""

import pytest
import torch

from sprint_core.distill.dataset import scenes as data
from sprint_core.distill.engine.randomness import SampleRandom, initialise
from sprint_core.distill.runs import shapes
from sprint_core.distill.stages.captioning import QUESTIONS, CaptioningModel, CaptioningStage, labels
from sprint_core.shapes import captions, examples


@pytest.fixture
def stage() -> CaptioningStage:
    model = CaptioningModel(shapes.fresh_gemma(0))
    initialise(model.heads, 0)
    return CaptioningStage(model, shapes.prompts(), pool=20)


def test_labels_are_all_that_a_caption_says():
    named = [
        question[i]
        for question, i in zip(
            QUESTIONS, labels("a small blue cross below a red circle on a grey background"), strict=True
        )
    ]
    assert named[:8] == ["circle", "red", None, None, "cross", "blue", "small", None]
    assert named[8:] == [1, "above", "grey"]
    named = [question[i] for question, i in zip(QUESTIONS, labels("three white squares"), strict=True)]
    assert named == ["square", "white", None, None, None, None, None, None, 3, None, None]


def test_labels_tell_captions_apart():
    texts = {prompt.text for name in captions.CATEGORIES for prompt in examples.prompts(name, 40)}
    said = {str(captions.parse(text)) for text in texts}
    assert len({tuple(labels(text)) for text in texts}) == len(said)


def test_loss_is_the_mean_over_captions(stage):
    """And in each over its tokens: captions of different lengths against each on its own, without padding."""
    loss, metrics = stage.loss("captioning", 3, SampleRandom(0, 3, "", range(5)))
    random = SampleRandom(0, 3, "", range(5))
    captions = data.captions(random.integers(20).tolist(), random)
    total, right = 0.0, 0
    for caption in captions:
        ids = torch.tensor([shapes.prompts().tokens(caption).ids])
        heads = stage.modules["captioning"](stage.modules["captioning"].gemma(ids))
        chances = [logits[0].log_softmax(-1)[:, i] for logits, i in zip(heads, labels(caption), strict=True)]
        total -= sum(chances).mean()
        right += all(int(logits[0, -1].argmax()) == i for logits, i in zip(heads, labels(caption), strict=True))
    torch.testing.assert_close(loss, total / 5, rtol=1e-5, atol=1e-5)
    assert float(metrics["right"]) == pytest.approx(right / 5)


def test_it_learns(stage):
    """A minute of it reads every caption; a few seconds already lower the loss by more than guessing could."""
    model = stage.modules["captioning"]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for step in range(40):
        loss, _ = stage.loss("captioning", step, SampleRandom(0, step, "", range(16)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
