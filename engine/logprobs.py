"""Log-probabilities of the chosen tokens and of the likeliest in their places."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.tokenizer import Tokenizer
from queue_api.schemas import TokenLogprob, TokenLogprobs

if TYPE_CHECKING:
    from engine.sequence import Sequence

__all__ = ["Chosen", "described", "logprobs_of", "note_prompt_logprobs"]

# JSON has no infinity; what stands for it is vLLM's and OpenAI's.
_LEAST = -9999.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """One chosen token among the likeliest."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


def logprobs_of(
    logits: torch.Tensor, tokens: Seq[int], sequences: Seq[Sequence]
) -> dict[int, Chosen]:
    """By row, the log-probabilities of the rows that ask for them.

    :param logits: [B, V], as the model gave them: before any sampling field
    :param tokens: B chosen token ids; rows without one (negative) are left out
    """
    rows = [
        row
        for row, sequence in enumerate(sequences)
        if sequence.logprobs is not None and tokens[row] >= 0
    ]
    if not rows:
        return {}
    return {
        row: _chosen(logits[row], tokens[row], sequences[row].sampling.logprobs or 0)
        for row in rows
    }


def note_prompt_logprobs(logits: torch.Tensor, scored: Seq[tuple[Sequence, range]]) -> None:
    """Add to the sequences what the model thought of their prompts' next tokens.

    :param logits: [N, V], the rows of all the ranges, one after the other
    :param scored: sequences, and the places in their prompts that the rows belong to
    """
    rows = iter(logits)
    for text, places in scored:
        assert text.prompt_logprobs is not None
        count = text.sampling.prompt_logprobs or 0
        for place, row in zip(places, rows, strict=False):
            token = int(text.token_ids[place + 1])
            text.prompt_logprobs.append(_chosen(row, token, count))


def _chosen(logits: torch.Tensor, token: int, num_top: int) -> Chosen:
    """`logits` is [V]: row by row, so that no batch mate has a part in the sums."""
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
