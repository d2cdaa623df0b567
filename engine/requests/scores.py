"""Log-probabilities of prompts, noted as their chunks come back."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from engine.requests.sequence import Sequence
from engine.sampling.logprobs import chosen_among

__all__ = ["score_prompts"]


def score_prompts(logits: torch.Tensor, scored: Seq[tuple[Sequence, range]]) -> None:
    """Add the log-probabilities of their prompts' tokens to the sequences.

    :param logits: [N, V], the rows of all the ranges, one after the other
    :param scored: sequences, and the places in their prompts that the rows belong to
    """
    rows = iter(logits)
    for sequence, places in scored:
        assert sequence.prompt_logprobs is not None
        count = sequence.sampling.prompt_logprobs or 0
        for place, row in zip(places, rows, strict=False):
            token = int(sequence.token_ids[place + 1])
            sequence.prompt_logprobs.append(chosen_among(row, token, count))
