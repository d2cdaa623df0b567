"""Log-probabilities of the chosen tokens and of the likeliest in their places."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from engine.models.tokenizer import Tokenizer
from queue_api.wire.errors import RequestTooLargeError
from queue_api.wire.sampling import SamplingParams
from queue_api.wire.schemas import TokenLogprob, TokenLogprobs

__all__ = ["Chosen", "check_amount", "chosen_among", "described", "logprobs_of"]

MOST = 2**20
"""Of one request: some 100 MB of its result, and several times as much memory while it runs."""

# JSON has no infinity; what stands for it is vLLM's and OpenAI's.
_LEAST = -9999.0


def check_amount(sampling: SamplingParams, num_prompt: int, num_new: int) -> None:
    """Refuse a request that may ask for more log-probabilities than a result can hold.

    :param num_prompt: tokens of its prompt
    :param num_new: tokens that a sample of it may get
    :raises RequestTooLargeError: there may be more than a result can hold
    """
    amount = 0
    if sampling.logprobs is not None:
        amount += sampling.n * num_new * (1 + sampling.logprobs)
    if sampling.prompt_logprobs is not None:
        amount += num_prompt * (1 + sampling.prompt_logprobs)
    if amount > MOST:
        raise RequestTooLargeError(
            f"the result may hold {amount} log-probabilities ('n' is {sampling.n}, 'max_tokens' "
            f"{num_new}, and the prompt has {num_prompt} tokens); the limit is {MOST}"
        )


@dataclass(frozen=True, slots=True)
class Chosen:
    """One chosen token among the likeliest."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


def logprobs_of(
    logits: torch.Tensor, tokens: Seq[int], num_top: Seq[int | None]
) -> dict[int, Chosen]:
    """By row, the log-probabilities of the rows that ask for them.

    :param logits: [B, V], as the model gave them: before any sampling field
    :param tokens: B chosen token ids; rows without one (negative) are left out
    :param num_top: B, how many of the likeliest tokens a row asks for besides; None: it asks for
        nothing
    """
    return {
        row: chosen_among(logits[row], token, count)
        for row, (token, count) in enumerate(zip(tokens, num_top, strict=True))
        if count is not None and token >= 0
    }


def chosen_among(logits: torch.Tensor, token: int, num_top: int) -> Chosen:
    """A token among the likeliest of `logits` [V].

    Row by row, so that no batch mate has a part in the sums.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs[token]
    rank = int((logprobs > own).sum()) + 1
    count = min(num_top, len(logprobs))
    values, ids = logprobs.topk(count)
    top = list(zip(ids.tolist(), values.clamp(min=_LEAST).tolist(), strict=True))
    return Chosen(token, max(float(own), _LEAST), rank, top)


def described(chosen: Seq[Chosen], tokenizer: Tokenizer) -> list[TokenLogprobs]:
    """The wire form, with the tokens' texts."""
    ids = {token.token_id for token in chosen}.union(i for token in chosen for i, _ in token.top)
    texts = {token_id: tokenizer.text_of(token_id) for token_id in ids}
    return [
        TokenLogprobs(
            token_id=token.token_id,
            token=texts[token.token_id],
            logprob=token.logprob,
            rank=token.rank,
            top=[TokenLogprob(token_id=i, token=texts[i], logprob=p) for i, p in token.top],
        )
        for token in chosen
    ]
