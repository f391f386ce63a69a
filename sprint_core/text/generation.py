"""Text from Gemma, the language model that SANA's text encoder is: token by token, each computed once.

A chat model reads turns: `chat_text` puts a prompt into one, as Gemma's model card has it, and `stop_ids` are the
tokens that end its answer.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ..config import Range, check_fields
from ..models.gemma import Gemma, KVPrefix
from .tokenizers import BOS, EOS, TURN, TURN_END, Tokenizer

CONTEXT = 8192  # tokens, of prompt and answer together, that Gemma 2 was trained on


def chat_text(prompt: str) -> str:
    """The prompt as a user's turn, and the start of the model's; a text of turns as it is."""
    return prompt if prompt.startswith(TURN) else f"{TURN}user\n{prompt.strip()}{TURN_END}\n{TURN}model\n"


def stop_ids(tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer. Raises ValueError for a tokenizer without turns, whose model cannot answer."""
    marks = [tokenizer.encode(mark)[1:] for mark in (TURN, TURN_END)]
    if [[tokenizer.piece(i) for i in ids] for ids in marks] != [[TURN], [TURN_END]]:
        raise ValueError(
            f"this text encoder only reads, since its tokenizer has no {TURN}; load gemma-2-2b-it to write"
        )
    return {EOS, *marks[1]}


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: of the `top_k` most likely (0: of all), of those that make up `top_p` of the probability
    together, and of those at least `min_p` times as likely as the first.

    repetition_penalty divides the positive logits of tokens that were written before, and multiplies the negative ones
    (arXiv 1909.05858); presence_penalty is subtracted from them. Temperature 0 takes the most likely token. Raises
    ValueError on values out of range.
    """

    temperature: Annotated[float, Range(0, 100)] = 1.0
    top_k: Annotated[int, Range(0, 1e9)] = 0
    top_p: Annotated[float, Range(0, 1)] = 1.0
    min_p: Annotated[float, Range(0, 1)] = 0.0
    repetition_penalty: Annotated[float, Range(1e-3, 100)] = 1.0
    presence_penalty: Annotated[float, Range(-100, 100)] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)


def probabilities(logits: Tensor, written: Collection[int], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities of the tokens that may be drawn, most likely first, and their ids: logits [vocab] -> two [k].

    written: the tokens of the answer so far. sampling: of a temperature above 0.
    """
    if written:
        ids = torch.tensor(sorted(set(written)), device=logits.device)
        old, penalty = logits[ids], sampling.repetition_penalty
        new = torch.where(old < 0, old * penalty, old / penalty) - sampling.presence_penalty
        logits = logits.index_copy(0, ids, new)
    k = min(sampling.top_k or len(logits), len(logits))
    logits, ids = (logits / sampling.temperature).topk(k)
    p = logits.softmax(0)
    kept = p >= sampling.min_p * p[0]
    if sampling.top_p < 1:
        before = p.cumsum(0) - p
        kept &= before < sampling.top_p
        kept[0] = True
    p = p * kept
    return p / p.sum(), ids


def _next_token(logits: Tensor, written: Sequence[int], sampling: Sampling | None, generator: torch.Generator) -> int:
    if sampling is None or sampling.temperature == 0:
        return int(logits.argmax())
    p, ids = probabilities(logits, written, sampling)
    return int(ids[int(torch.multinomial(p.cpu(), 1, generator=generator))])


def generate(
    gemma: Gemma,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    stop: Collection[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    logits: Callable[[Tensor], Tensor] | None = None,
) -> Generator[int, None, None]:
    """The tokens of an answer to the prompt's, one by one; a token of `stop` is the last.

    sampling: None takes the most likely token each time. seed: of the draws, which are made on the CPU. logits: what a
    host has in place of `gemma.logits`. dtype: see `Gemma`. Raises ValueError for a prompt that fills the context.
    """
    room = CONTEXT - len(prompt)
    if room < 1:
        raise ValueError(f"the prompt is {len(prompt)} tokens long, and {CONTEXT - 1} are the most; shorten it")
    generator = torch.Generator().manual_seed(seed)
    text: KVPrefix | None = None
    new, written = list(prompt) or [BOS], []
    for _ in range(min(max_tokens, room)):
        with torch.no_grad():  # not around the loop: that would reach into what the caller does between tokens
            text = gemma.prefill(torch.tensor([new], device=device), prefix=text, dtype=dtype)
            token = _next_token((logits or gemma.logits)(text.hidden[:, -1])[0], written, sampling, generator)
        written.append(token)
        yield token
        if token in stop:
            return
        new = [token]
