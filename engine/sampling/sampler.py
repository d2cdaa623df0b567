"""Logits to the next tokens.

A drawn token is the one under which a counter-based uniform number falls when the kept
probabilities are laid end to end in the order of token ids. A difference in the last bits of the
logits moves the borders by as much and so hardly ever another token under the number; that is
what makes seeded text the same in every batch and partition.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from engine.sampling.logits import SamplingRow, change_logits
from engine.sampling.random_draws import uniform
from engine.transfer import moved

__all__ = ["NO_TOKEN", "choose_tokens", "margins_of"]

NO_TOKEN = -1
"""In place of a token where a row's logits aren't numbers."""
# Nucleus sampling looks at this many of the likeliest tokens before it sorts the vocabulary.
_NUCLEUS_CANDIDATES = 512


def choose_tokens(logits: torch.Tensor, rows: Seq[SamplingRow]) -> list[int]:
    """The next token of each row.

    :param logits: [B, V], any dtype and device
    :param rows: B, what the rows belong to
    :returns: B token ids; NO_TOKEN for a row with NaN or without a finite largest logit
    """
    logits = change_logits(logits, rows)
    best, tokens = logits.max(dim=-1)  # each [B]; NaN is the largest of all
    chosen = torch.where(best.isfinite(), tokens, NO_TOKEN)
    drawing = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawing:
        places = moved(torch.tensor(drawing), logits.device)
        drawn = _draw(logits[places].float(), [rows[i] for i in drawing])
        chosen[places] = torch.where(chosen[places] == NO_TOKEN, NO_TOKEN, drawn)
    ids: list[int] = chosen.tolist()  # what a step waits for on CUDA
    return ids


def _draw(logits: torch.Tensor, rows: Seq[SamplingRow]) -> torch.Tensor:
    """Draw a token of each row of `logits` [B, V]; anything for a row of no numbers."""
    cumulative, targets = _laid_out(logits, rows)
    # The first token whose cumulative probability exceeds the target; it has a share of its own.
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def _laid_out(logits: torch.Tensor, rows: Seq[SamplingRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept probabilities of `logits` [B, V] end to end, and where the number falls: [B, 1]."""
    device = logits.device
    params = [row.sampling for row in rows]
    temperature = moved(torch.tensor([p.temperature for p in params]), device)
    # From the row's largest down, so that a tiny temperature overflows to -inf and not to NaN.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    scores = keep_min_p(scores, [p.min_p for p in params])
    scores = keep_top_k(scores, [p.top_k for p in params])
    probabilities = keep_top_p(scores.softmax(dim=-1), [p.top_p for p in params])
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)  # [B, V]
    numbers = uniform(
        np.array([row.seed for row in rows], dtype=np.uint64),
        np.array([row.sample for row in rows], dtype=np.uint64),
        np.array([row.num_generated for row in rows], dtype=np.uint64),
    )
    return cumulative, moved(torch.from_numpy(numbers), device)[:, None] * cumulative[:, -1:]


def margins_of(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """By how much the logits of two tokens would have to differ for each to be the one chosen.

    Greedy: how far its logit, changed as the request asks, is below the largest. Drawn: a
    difference of d moves a border of the probabilities by d / 4T at most, at the temperature T; so
    it is 4T times how far the number is from the token's share, of all. A token that isn't kept
    has an infinite margin.

    :param logits: [V], any dtype
    :returns: [V], float64; 0 for the token that is chosen
    """
    scores = change_logits(logits[None], [row]).float()  # [1, V]
    if row.sampling.temperature <= 0:
        return (scores.amax() - scores)[0].double()
    cumulative, targets = _laid_out(scores, [row])
    ends = cumulative[0]  # [V]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    away = torch.maximum(starts - targets[0], targets[0] - ends).clamp(min=0.0) / ends[-1]
    away = away.masked_fill(ends <= starts, float("inf"))
    return 4.0 * row.sampling.temperature * away


def keep_min_p(scores: torch.Tensor, min_p: Seq[float]) -> torch.Tensor:
    """`scores` [B, V], each row's largest 0, with -inf below min_p times as likely as that."""
    if not any(min_p):
        return scores
    threshold = moved(torch.tensor(min_p, dtype=scores.dtype), scores.device).log()
    return scores.masked_fill(scores < threshold[:, None], float("-inf"))


def keep_top_k(scores: torch.Tensor, top_k: Seq[int]) -> torch.Tensor:
    """`scores` [B, V] with -inf below each row's k-th largest; k < 1 keeps all. Ties stay."""
    size = scores.shape[-1]
    limits = [min(k, size) if k > 0 else size for k in top_k]
    wanted = [k for k in limits if k < size]
    if not wanted:
        return scores
    largest = scores.topk(max(wanted), dim=-1).values  # [B, K], falling
    column = moved(torch.tensor([min(k, max(wanted)) - 1 for k in limits]), scores.device)
    threshold = largest.gather(-1, column[:, None])
    unlimited = moved(torch.tensor([k >= size for k in limits]), scores.device)
    threshold = threshold.masked_fill(unlimited[:, None], float("-inf"))
    return scores.masked_fill(scores < threshold, float("-inf"))


def keep_top_p(probabilities: torch.Tensor, top_p: Seq[float]) -> torch.Tensor:
    """`probabilities` [B, V] with 0 outside the fewest likeliest tokens that reach p."""
    if all(p >= 1.0 for p in top_p):
        return probabilities
    size = probabilities.shape[-1]
    share = moved(torch.tensor(top_p, dtype=torch.float64), probabilities.device)[:, None]
    num_candidates = min(_NUCLEUS_CANDIDATES, size)
    largest = probabilities.topk(num_candidates, dim=-1).values  # [B, K], falling
    reached = largest.sum(dim=-1, dtype=torch.float64)[:, None]
    if bool(((reached < share) & (share < 1)).any()):
        largest = probabilities.sort(dim=-1, descending=True).values
    before = largest.cumsum(dim=-1, dtype=torch.float64) - largest
    # A token stays if those ahead of it don't reach p; so the likeliest always stays.
    num_kept = (before < share).sum(dim=-1, keepdim=True)
    # (A row of no numbers keeps none, and has to point somewhere.)
    threshold = largest.gather(-1, (num_kept - 1).clamp(min=0))
    threshold = threshold.masked_fill(share >= 1.0, 0.0)
    return probabilities.masked_fill(probabilities < threshold, 0.0)
