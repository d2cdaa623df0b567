"""Room for a micro-batch: smaller after one that memory didn't hold, then slowly larger again."""

from __future__ import annotations

import logging

__all__ = ["BatchBudget"]

logger = logging.getLogger(__name__)

BATCHES_BEFORE_GROWTH = 64
"""Batches that have to go well before the budget grows by an eighth."""


class BatchBudget:
    """Tokens that a micro-batch may have: at most `limit`, halved when memory runs out."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tokens = limit
        self._num_good = 0

    def shrink(self, num_tokens: int, reason: str) -> None:
        """Halve it, after a micro-batch of `num_tokens` that memory didn't hold."""
        self.tokens = max(1, min(self.tokens, num_tokens) // 2)
        self._num_good = 0
        logger.warning(
            "out of memory with %d tokens at once; going on with at most %d: %s",
            num_tokens,
            self.tokens,
            reason,
        )

    def went_well(self) -> None:
        """Count a micro-batch that memory held."""
        if self.tokens == self.limit:
            return
        self._num_good += 1
        if self._num_good == BATCHES_BEFORE_GROWTH:
            self._num_good = 0
            self.tokens = min(self.limit, self.tokens + max(1, self.tokens // 8))
            if self.tokens == self.limit:
                logger.info("micro-batches may have %d tokens again", self.limit)
