"""Gemma's text against transformers' generate on the same weights, and the draws against its processors."""

import dataclasses
import inspect
import json

import pytest
import standin
import torch
from gemma_oracle import hf_config, random_weights
from tokenizers import Tokenizer
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast
from transformers.generation import logits_process

from sprint_core.models.gemma import Gemma, GemmaConfig
from sprint_core.text import generation
from sprint_core.text.generation import Sampling, chat_text, generate, probabilities, stop_ids
from sprint_core.text.tokenizers import EOS, HFTokenizer, decode

TINY = GemmaConfig(
    vocab=97, width=48, depth=4, heads=4, kv_heads=2, head_dim=16, ffn=80, query_scale=1, sliding_window=10
)
PROMPTS = [list(range(3, 3 + n)) for n in (1, 4, 9, 10, 11, 33)]  # below, at and beyond the window


def pair(seed: int = 3) -> tuple[Gemma, Gemma2ForCausalLM]:
    """Ours and the oracle, with equal weights whose logits of the next token reach their cap."""
    gemma, oracle = Gemma(TINY), Gemma2ForCausalLM(hf_config(TINY)).eval()
    random_weights(oracle, seed)
    oracle.model.embed_tokens.weight.data *= 0.1  # so that a token does not just follow itself
    oracle.model.norm.weight.data += 40
    state = {name: p for name, p in oracle.state_dict().items() if name != "lm_head.weight"}
    gemma.load_state_dict(state)
    return gemma, oracle


def written(gemma: Gemma, prompt: list[int], n: int = 40, **settings) -> list[int]:
    return list(generate(gemma, prompt, max_tokens=n, device="cpu", **settings))


def theirs(oracle: Gemma2ForCausalLM, prompt: list[int], n: int = 40, **settings) -> list[int]:
    ids = torch.tensor([prompt])
    full = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, **settings)
    return full[0, len(prompt) :].tolist()


CHAT = HFTokenizer(json.dumps(standin.byte_tokenizer(turns=True)).encode())


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("seed", [3, 4])
def test_greedy_text_is_that_of_transformers(prompt, seed):
    gemma, oracle = pair(seed)
    answer = written(gemma, prompt)
    assert answer == theirs(oracle, prompt, eos_token_id=None)
    assert len(set(answer)) > 3  # no single token over and over


def test_the_text_ends_with_a_stop_token_as_in_transformers():
    gemma, oracle = pair()
    free = written(gemma, PROMPTS[1])
    stop = {free[7], free[20]}
    assert written(gemma, PROMPTS[1], stop=stop) == theirs(oracle, PROMPTS[1], eos_token_id=sorted(stop))
    assert written(gemma, PROMPTS[1], stop=stop)[-1] in stop


def test_logits_are_capped_as_in_transformers():
    gemma, oracle = pair()
    ids = torch.tensor([PROMPTS[-1]])
    with torch.no_grad():
        want, hidden = oracle(ids).logits[0], oracle.model(ids).last_hidden_state[0]
        got = gemma.logits(hidden)
    assert torch.allclose(got, want, atol=1e-4)
    assert want.abs().max() > 25  # of 30
    assert gemma.logits(hidden.bfloat16()).dtype == torch.float32


def test_no_token_is_computed_twice():
    gemma, _ = pair()
    seen = []
    gemma.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    written(gemma, PROMPTS[-1], 5)
    assert seen == [33, 1, 1, 1, 1]


def test_the_context_has_an_end(monkeypatch):
    gemma, _ = pair()
    monkeypatch.setattr(generation, "CONTEXT", 40)
    assert len(written(gemma, PROMPTS[-1])) == 7
    with pytest.raises(ValueError, match="the prompt is 40 tokens long, and 39 are the most; shorten it"):
        written(gemma, [3] * 40)


def test_gradients_stay_on_for_who_reads():
    gemma, _ = pair()
    tokens = generate(gemma, PROMPTS[0], max_tokens=2, device="cpu")
    next(tokens)
    assert inspect.isgenerator(tokens) and torch.is_grad_enabled()


# --- the draws --------------------------------------------------------------------------------------

SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=5),
    Sampling(top_k=500),
    Sampling(top_p=0.8),
    Sampling(top_p=0.0),
    Sampling(min_p=0.1),
    Sampling(repetition_penalty=1.3),
    Sampling(repetition_penalty=0.8),
    Sampling(temperature=1.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.05),  # as Generate Text's, but hot
]


def processed(logits: torch.Tensor, seen: list[int], s: Sampling) -> torch.Tensor:
    """transformers' probabilities, by its own processors in its own order."""
    steps = [logits_process.TemperatureLogitsWarper(s.temperature)]
    steps += [logits_process.TopKLogitsWarper(s.top_k)] if s.top_k else []
    steps += [logits_process.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    steps += [logits_process.MinPLogitsWarper(s.min_p)] if s.min_p else []
    ids, scores = torch.tensor([seen]), logits[None].clone()
    if s.repetition_penalty != 1:
        scores = logits_process.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(ids, scores)
    for step in steps:
        scores = step(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda s: "-".join(map(str, dataclasses.astuple(s))))
def test_probabilities_are_those_of_transformers(sampling):
    for seed in range(5):
        logits = 3 * torch.randn(97, generator=torch.Generator().manual_seed(seed))
        seen = logits.topk(3).indices.tolist() + [int(logits.argmin())] * 2
        p, ids = probabilities(logits, seen, sampling)
        want = processed(logits, seen, sampling)
        assert torch.allclose(torch.zeros(97).index_copy(0, ids, p), want, atol=1e-6)
        assert p.sum().item() == pytest.approx(1)


def test_presence_is_subtracted_once_from_what_was_written():
    logits = torch.tensor([1.0, 2.0, 3.0])
    p, ids = probabilities(logits, [2, 2, 2], Sampling(presence_penalty=2.5))
    want = torch.tensor([1.0, 2.0, 0.5]).softmax(0)
    assert torch.allclose(p, want[ids], atol=1e-6) and ids.tolist() == [1, 0, 2]


def test_draws_follow_their_probabilities_and_their_seed():
    gemma, _ = pair()
    hot = Sampling(temperature=2.0, top_k=8)
    first = [written(gemma, PROMPTS[2], 1, sampling=hot, seed=seed)[0] for seed in range(400)]
    with torch.no_grad():
        p, ids = probabilities(gemma.logits(gemma(torch.tensor([PROMPTS[2]]))[:, -1])[0], [], hot)
    counts = torch.tensor([first.count(int(i)) for i in ids])
    assert counts.sum() == 400
    deviation = (counts - 400 * p).abs() / (400 * p * (1 - p)).sqrt().clamp(min=1)
    assert deviation.max() < 4 and (counts > 0).sum() > 1

    answers = [written(gemma, PROMPTS[2], sampling=hot, seed=seed) for seed in (5, 5, 6, 2**64 - 1)]
    assert answers[0] == answers[1] and answers[0] != answers[2] and len(answers[3]) == 40


def test_temperature_0_is_greedy():
    gemma, _ = pair()
    assert written(gemma, PROMPTS[2], sampling=Sampling(temperature=0.0)) == written(gemma, PROMPTS[2])


def test_settings_out_of_range_are_refused():
    for name, value in (("repetition_penalty", 0.0), ("top_p", 1.5), ("temperature", -1.0), ("min_p", float("nan"))):
        with pytest.raises(ValueError, match=f"Sampling.{name} is {value}; it must be"):
            Sampling(**{name: value})


# --- turns ------------------------------------------------------------------------------------------

CARD = (  # what apply_chat_template reads on gemma-2-2b-it's card, without its refusals
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


@pytest.mark.parametrize("prompt", ["Write a hello world program", "  two\nlines \n", ""])
def test_a_prompt_becomes_a_turn_as_on_the_model_card(prompt):
    backend = Tokenizer.from_str(CHAT.data.decode())
    card = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", chat_template=CARD)
    want = card.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert CHAT.encode(chat_text(prompt)) == want
    assert chat_text(chat_text(prompt)) == chat_text(prompt)


def test_an_answer_ends_with_the_turn_or_the_text():
    (end,) = CHAT.encode("<end_of_turn>")[1:]
    assert stop_ids(CHAT) == {EOS, end}


def test_a_tokenizer_without_turns_cannot_write():
    plain = HFTokenizer(json.dumps(standin.byte_tokenizer()).encode())
    with pytest.raises(ValueError, match="only reads, since its tokenizer has no <start_of_turn>; load gemma-2-2b-it"):
        stop_ids(plain)


def test_tokens_become_text_again():
    text = "a red circle, 猫 and 🐞\n"
    ids = CHAT.encode(f"{text}<end_of_turn>")
    assert decode(CHAT, ids) == text
    assert decode(CHAT, ids, marks=True) == f"<bos>{text}<end_of_turn>"
    assert decode(CHAT, [*ids, 319, 10**6]) == text  # no tokens of its
    cut = CHAT.encode("é")[:-1]
    assert decode(CHAT, cut) == "\ufffd"
