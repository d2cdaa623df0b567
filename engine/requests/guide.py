"""Guide: leads a sequence along a text that was written before, as far as rounding may have led it.

Where the model's own choice leaves that text, the nearest token that stays on it is taken instead,
if it was as good as chosen; what follows shows whether the two came apart there alone.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from engine.models.tokenizer import Tokenizer
from engine.requests.detokenizer import Detokenizer
from engine.sampling.logits import SamplingRow
from engine.sampling.sampler import margins_of

__all__ = ["Fork", "Guide"]

MOST_TRIED = 64
"""Tokens that are compared with the text at a fork, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Fork:
    """Where the model's own choice wasn't what is written."""

    place: int
    """Of the new token, from 0."""
    chosen: int
    written: int | None
    """None if none of the tokens that were tried leads to what is written."""
    margin: float | None
    """By how much their logits would have to differ for the other to be chosen."""


class Guide:
    """What one sequence is to follow.

    :param token_ids: the new tokens, if they are known; else `text` tells
    :param ended: whether an ending token or a stop string ended it, rather than its length
    :param bound: forks of no larger margin are followed
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text: str,
        token_ids: Seq[int] | None = None,
        *,
        ended: bool,
        bound: float,
    ) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._token_ids = token_ids
        self._ended = ended
        self._bound = bound
        self._detokenizer: Detokenizer | None = None
        self.forks: list[Fork] = []
        """The last one may be where it was lost."""
        self.is_lost = False
        """The model's choice can't be what is written, and was left to go its own way."""

    def choose(self, logits: torch.Tensor, row: SamplingRow, chosen: int) -> int:
        """The token to go on with.

        :param logits: [V], as the model gave them
        :param chosen: what the model's own choice is
        """
        if self.is_lost or chosen < 0 or self._follows(row, chosen):
            return chosen
        margins = margins_of(logits, row)  # [V]
        other = self._likeliest(logits.masked_fill(margins > self._bound, float("-inf")), row)
        if other is None:
            kept = logits.masked_fill(margins == float("inf"), float("-inf"))
            other = self._likeliest(kept, row)
        margin = None if other is None else float(margins[other])
        self.forks.append(Fork(row.num_generated, chosen, other, margin))
        if other is None or margin is None or margin > self._bound:
            self.is_lost = True
            return chosen
        return int(other)

    def _likeliest(self, logits: torch.Tensor, row: SamplingRow) -> int | None:
        """Of the likeliest tokens the first that follows: between two of them in the order of ids
        there may be many that are hardly ever drawn, and all of those are near a border."""
        values, ids = logits.topk(min(MOST_TRIED, len(logits)))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return next((i for i, v in pairs if v > float("-inf") and self._follows(row, i)), None)

    def _follows(self, row: SamplingRow, token: int) -> bool:
        """Whether what is written may go on with that token."""
        place = row.num_generated
        if self._token_ids is not None:
            return place < len(self._token_ids) and self._token_ids[place] == token
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(
                self._tokenizer, row.token_ids[: row.num_prompt].tolist()
            )
        new = [*row.token_ids[row.num_prompt :].tolist(), token]
        text = self._detokenizer.text(new).rstrip("\N{REPLACEMENT CHARACTER}")
        sampling = row.sampling
        is_eos = token in self._tokenizer.eos_token_ids and not sampling.ignore_eos
        if is_eos or token in sampling.stop_token_ids:
            return self._ended and text == self._text
        # a stop string, which isn't in the text, may be what goes on behind it
        return self._text.startswith(text) or (
            bool(sampling.stop) and self._ended and text.startswith(self._text)
        )
