"""Partial texts in Redis, so that a long generation survives the worker that began it.

A request's new tokens are appended to a string key now and then. Whoever claims the request
again hands them to its engine, which computes them as it does a prompt and goes on behind them.
Draws depend on the position alone, so the text is the one an undisturbed run would have given.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import redis.asyncio as aredis

from queue_api.connection.failures import raise_unless_key
from queue_api.store.keys import partial_key
from queue_api.store.scripts import ScriptCall, Scripts

__all__ = ["Checkpoints", "Place"]

logger = logging.getLogger(__name__)

PARTIAL_TTL_S = 6 * 3600
"""How long a partial text waits for somebody to go on with it."""
TOKEN_BYTES = 4


class Place(NamedTuple):
    """Where a request's partial text is kept."""

    owner: str
    """Its run; the job's id where there is none."""
    number: int
    """Index of the request in its run or job."""


class Checkpoints:
    """Saves and loads partial texts of one model.

    :param every_tokens: a worker's death costs a request at most so many of its tokens
    :param model: what the tokens mean: a text begun by another model is left alone
    """

    def __init__(
        self, connection: aredis.Redis, scripts: Scripts, every_tokens: int, model: str
    ) -> None:
        self._connection = connection
        self._scripts = scripts
        self._model = hashlib.blake2b(model.encode(), digest_size=6).hexdigest()
        self._saved: dict[Place, int] = {}
        # Looked at every quarter and written from half on, no more than three quarters are
        # unsaved at any time; the rest is for the way to Redis.
        self.steps_between = max(1, every_tokens // 4)
        self._worth_saving = max(1, every_tokens // 2)

    def _key(self, place: Place) -> str:
        return partial_key(place.owner, place.number, self._model)

    async def load(self, places: Sequence[Place]) -> dict[Place, list[int]]:
        """The partial texts that there are of these."""
        if not places:
            return {}
        pipeline = self._connection.pipeline(transaction=False)
        for place in places:
            pipeline.get(self._key(place))
        replies = await pipeline.execute(raise_on_error=False)
        raise_unless_key(replies)
        return {
            place: _unpacked(raw)
            for place, raw in zip(places, replies, strict=True)
            if isinstance(raw, bytes) and raw
        }

    def begin(self, place: Place, num_tokens: int) -> None:
        """Expect progress of a request that begins, or goes on behind so many tokens."""
        self._saved[place] = num_tokens

    async def save(self, progress: Mapping[Place, Sequence[int]], *, at_least: int = 0) -> None:
        """Append what is new.

        :param at_least: leave out requests with fewer new tokens; half the interval by default
        """
        worth_saving = at_least or self._worth_saving
        for place, tokens in progress.items():
            if len(tokens) < self._saved.get(place, 0):
                self._saved[place] = 0  # the engine began anew
        due = {
            place: tokens
            for place, tokens in progress.items()
            if len(tokens) - self._saved.get(place, 0) >= worth_saving
        }
        if not due:
            return
        calls = [self._saving(place, tokens) for place, tokens in due.items()]
        replies = await self._scripts.call_many(calls)
        for place, reply in zip(due, replies, strict=True):
            if isinstance(reply, Exception):
                raise reply
            # less than was sent if the key is gone: the next time it is written from its start
            self._saved[place] = min(reply // TOKEN_BYTES, len(due[place]))

    def _saving(self, place: Place, tokens: Sequence[int]) -> ScriptCall:
        # written by offset, so that writing it twice is no harm
        start = self._saved.get(place, 0)
        packed = array("I", tokens[start:]).tobytes()
        return "checkpoint", [self._key(place)], [start * TOKEN_BYTES, packed, PARTIAL_TTL_S]

    def forgetting(self, places: Iterable[Place]) -> list[str]:
        """Forget these requests; returns the keys that are to be deleted."""
        return [self._key(place) for place in places if self._saved.pop(place, 0) > 0]


def _unpacked(raw: bytes) -> list[int]:
    tokens = array("I")
    tokens.frombytes(raw[: len(raw) // TOKEN_BYTES * TOKEN_BYTES])
    return tokens.tolist()
