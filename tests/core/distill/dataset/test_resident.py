"""A dataset on the training's device: tokens say what texts say, and a batch belongs together."""

import json

import pytest
import standin
import torch

from sprint_core.distill.dataset.batch import Batch, without
from sprint_core.distill.dataset.resident import ResidentLatents
from sprint_core.distill.dataset.tokenized import tokenize
from sprint_core.distill.engine.processes import ProcessGroup
from sprint_core.distill.engine.randomness import SampleRandom
from sprint_core.distill.engine.trainer import Trainer
from sprint_core.distill.recipes import Objective, Schedule
from sprint_core.distill.stages.base import Captioned, Watch
from sprint_core.distill.stages.student import DistillStage
from sprint_core.distill.stages.teacher import TeacherStage
from sprint_core.models.gemma import Gemma
from sprint_core.models.transformer import SanaTransformer
from sprint_core.text.formats import TextPreset
from sprint_core.text.prompts import PromptTokenizer
from sprint_core.text.tokenizers import HFTokenizer

CAPTIONS = ("red", "a blue thing", "no", "")
LATENTS = torch.randn((4, 32, 2, 2), generator=torch.Generator().manual_seed(0)).half()


@pytest.fixture(params=[None, "Paint: "], ids=["plain", "instruction"])
def model(request) -> Captioned:
    tokenizer = HFTokenizer(json.dumps(standin.byte_tokenizer()).encode())
    prompts = PromptTokenizer(tokenizer, TextPreset(instruction=request.param, max_tokens=16))
    model = Captioned(SanaTransformer(standin.TEACHER), Gemma(standin.TEXT), prompts)
    for network in (model.transformer, model.gemma):
        network.load_state_dict(standin.random_model(network))
    return model


class Texts:
    """The same samples with captions as texts."""

    fingerprint = "texts"

    def batch(self, random: SampleRandom) -> Batch:
        chosen = random.integers(4).tolist()
        return Batch(LATENTS[chosen].float(), [CAPTIONS[i] for i in chosen])


def velocity(model: Captioned, text: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x = torch.randn((4, 32, 2, 2), generator=torch.Generator().manual_seed(1))
    return model.transformer(x, torch.full((4,), 0.5), text[0], mask=text[1])


def test_the_transformer_reads_the_same(model):
    """Tokens' embeddings hold padding, and the instruction's, which the mask hides."""
    tokens = tokenize(model.prompts, CAPTIONS)
    torch.testing.assert_close(velocity(model, model.encode(tokens)), velocity(model, model.encode(CAPTIONS)))
    dropped = torch.tensor([True, False, True, False])
    assert without(CAPTIONS, dropped) == ["", "a blue thing", "", ""]
    texts, tokens = (model.encode(without(captions, dropped)) for captions in (CAPTIONS, tokens))
    torch.testing.assert_close(velocity(model, tokens), velocity(model, texts))


def test_the_empty_caption_is_encoded_once_until_the_weights_change(model):
    first, again = model.encode_empty(4), model.encode_empty(2)
    assert again[0].data_ptr() == first[0].data_ptr()
    torch.testing.assert_close(velocity(model, first), velocity(model, model.encode([""] * 4)))
    model.gemma.load_state_dict(standin.random_model(model.gemma, seed=1))
    torch.testing.assert_close(velocity(model, model.encode_empty(4)), velocity(model, model.encode([""] * 4)))
    assert not torch.equal(model.encode_empty(1)[0], first[0][:1])


def test_the_empty_caption_stays_where_it_lies(model):
    """A recorded loss under autocast reads it there, after a check without, too."""
    kept = []  # held, so that nothing else comes to lie in their places
    for precise in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            kept.append(model.encode_empty(1)[0])
    places = [embedding.data_ptr() for embedding in kept]
    assert places[0] == places[2] != places[1]


@pytest.mark.parametrize("phase", ["teacher", "student", "critic"])
def test_losses_are_those_of_texts(model, phase):
    stages = []
    for data in (Texts(), ResidentLatents(LATENTS, tokenize(model.prompts, CAPTIONS), "tokens")):
        stages.append(TeacherStage(model, data) if phase == "teacher" else DistillStage(model, data, Objective()))
    texts, tokens = (stage.loss(phase, 0, SampleRandom(0, 0, "", range(12)))[0] for stage in stages)
    torch.testing.assert_close(tokens, texts, rtol=1e-4, atol=1e-5)


def test_the_guard_may_watch_tokens(model):
    tokens = tokenize(model.prompts, CAPTIONS)
    data = ResidentLatents(LATENTS, tokens, "tokens")
    checks = []
    for captions in (CAPTIONS, tokens):
        stage = DistillStage(model, data, Objective(), watch=Watch(captions, (32, 2, 2), 3.0))
        checks.append(stage.check(stage.student)["error"])
    assert checks[0] == pytest.approx(checks[1], rel=1e-4) and checks[0] > 0


def test_captions_hints_and_latents_belong_together(model):
    """Two wordings of each latent, each about as often."""
    data = ResidentLatents(LATENTS[:2], tokenize(model.prompts, CAPTIONS), "two", hints=-LATENTS[:2])
    batch = data.batch(ProcessGroup(draws_on_device=True).random(0, 0, "", range(400)))
    assert len(batch.captions) == 400 and batch.latents.dtype == torch.float32
    torch.testing.assert_close(batch.hints, -batch.latents)
    latents = [next(i for i, x in enumerate(LATENTS) if torch.equal(x.float(), latent)) for latent in batch.latents]
    rows = [next(k for k, ids in enumerate(data.captions.ids) if torch.equal(ids, row)) for row in batch.captions.ids]
    assert [row // 2 for row in rows] == latents and {*rows} == {0, 1, 2, 3}
    assert min(rows.count(k) for k in range(4)) > 60


@pytest.mark.parametrize(("latents", "captions", "hints"), [(3, 4, None), (4, 2, None), (4, 4, 3)])
def test_what_does_not_belong_together_is_refused(model, latents, captions, hints):
    with pytest.raises(ValueError, match=f"{latents} latents, {captions} captions"):
        ResidentLatents(LATENTS[:latents], tokenize(model.prompts, CAPTIONS[:captions]), "", hints and LATENTS[:hints])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_on_it_moves_the_weights(model, tmp_path, optimizer):
    """Teacher and student, with numbers drawn on the device and in bf16, as on a GPU."""
    data = ResidentLatents(LATENTS, tokenize(model.prompts, CAPTIONS), "tokens")
    schedule = Schedule(3, 8, 1e-3, 1, precision="bf16", optimizer=optimizer)
    device = ProcessGroup(draws_on_device=True)
    model.requires_grad_(True).gemma.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    teacher = Trainer(TeacherStage(model, data), schedule, tmp_path, 0, device).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) > 0.8 * len(list(model.transformer.parameters()))
    assert all(name.startswith("transformer.") for name in moved)
    stage = DistillStage(teacher, data, Objective(tangent_warmup_steps=2))
    start = {name: p.clone() for name, p in stage.student.transformer.named_parameters()}
    student = Trainer(stage, schedule, tmp_path, 0, device)
    student.train()
    moved = [not torch.equal(p, start[name]) for name, p in stage.student.transformer.named_parameters()]
    assert student.skipped == 0 and sum(moved) > 0.8 * len(moved)
