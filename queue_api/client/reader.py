"""One connection that waits for the results of all runs a client listens to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, cast
from uuid import uuid4

from queue_api.connection.connect import LONGEST_BLOCK_S
from queue_api.connection.failures import (
    REDIS_ERRORS,
    Failure,
    failure_of,
    friendly,
    is_passing,
)
from queue_api.connection.tasks import end
from queue_api.store.keys import RunKeys, wake_key
from queue_api.store.run_store import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    READ_AT_ONCE,
    Entry,
    RunStore,
    cancellations,
    read_entries,
)
from queue_api.wire.errors import BatchmillError, ClientClosedError, RedisAccessError

__all__ = ["ResultReader", "Subscription", "stream_order"]

logger = logging.getLogger(__name__)

MOST_UNREAD = 4000
"""A stream whose results nobody takes is left alone from here on."""
WAKE_TTL_S = 60
UNHEARD_BLOCK_S = 1.0
"""The longest that a read waits while it can't be woken."""


class Subscription:
    """The results of one run from some point on, in completion order."""

    def __init__(self, reader: ResultReader, run: str, after: str) -> None:
        self.run = run
        self.last = after
        """Id of the last entry taken."""
        self._reader = reader
        self.fetched = after
        """Id of the last entry that is here, taken or not."""
        self._unread: list[Entry] = []
        self._news = asyncio.Event()
        self._error: Exception | None = None

    async def take(self, timeout_s: float) -> list[Entry]:
        """What has come, once there is something; empty after the timeout.

        :raises RedisAccessError: the server refuses us
        :raises ClientClosedError: nobody reads any more
        :raises Exception: whatever else ended the reading
        """
        if not self._unread and self._error is None:
            # not wait_for: that of Python 3.11 may swallow a cancellation
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
        if not self._unread and self._error is not None:
            raise self._error
        entries, self._unread = self._unread, []
        self._news.clear()
        if entries:
            self.last = entries[-1][0]
        if len(entries) >= MOST_UNREAD:
            await self._reader.wake()
        return entries

    def poke(self) -> None:
        """Let `take` return now, with what there is."""
        self._news.set()

    def close(self) -> None:
        """Listen no more."""
        self._reader.drop(self)

    @property
    def is_open(self) -> bool:
        """Nothing has gone wrong with it."""
        return self._error is None

    @property
    def full(self) -> bool:
        return len(self._unread) >= MOST_UNREAD

    def feed(self, items: list[Any]) -> None:
        """Take entries of the stream that were read from here or further back.

        What can't be taken is this reader's trouble, not that of all the others.
        """
        try:
            self._feed(items)
        except Exception as error:
            logger.exception("run %s: its results can't be read", self.run)
            self.fail(error)

    def _feed(self, items: list[Any]) -> None:
        behind = stream_order(self.fetched)
        new = [item for item in items if stream_order(item[0].decode()) > behind]
        if new:
            self._unread += read_entries(new)
            self.fetched = new[-1][0].decode()
            self._news.set()

    def fail(self, error: Exception) -> None:
        """Let `take` raise this once what is here has been taken; the first error counts."""
        self._error = self._error or error
        self._news.set()


class ResultReader:
    """Reads the streams of all subscriptions with one XREAD that blocks until there is news.

    The read also covers a stream of the reader's own, which lasts a minute: an entry there wakes
    it when a subscription comes or has room again.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._subscriptions: set[Subscription] = set()
        self._wake_key = wake_key(uuid4().hex)
        self._wake_after: str = "0"
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self._block_s = LONGEST_BLOCK_S / 2

    async def subscribe(self, run: str, after: str = "0") -> Subscription:
        """Listen to a run, from behind the entry `after`; "0" is the start.

        :raises ClientClosedError: closed
        :raises WrongOwnerError: another process or event loop
        """
        self._store.owner.check()
        if self._is_closed:
            raise ClientClosedError("the client is closed; make another one")
        subscription = Subscription(self, run, after)
        self._subscriptions.add(subscription)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._read_on(), name="batchmill result reader")
            self._task.add_done_callback(self._on_end)
        else:
            await self.wake()
        return subscription

    def drop(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)

    async def wake(self) -> None:
        """Make the blocked read begin again, with the streams that count now."""
        self._changed.set()

        async def talk() -> list[Any]:
            async with self._store.redis.pipeline(transaction=False) as pipe:
                pipe.xadd(self._wake_key, {"wake": "1"}, maxlen=1, approximate=False)
                pipe.expire(self._wake_key, WAKE_TTL_S)
                return await pipe.execute()

        try:
            await self._store.within(0.0).call(talk)
            self._block_s = LONGEST_BLOCK_S / 2
        except RedisAccessError as error:
            if not error.may_pass:
                raise
            # a full Redis, for one, has no room for a word: the read has to come round by itself
            self._block_s = UNHEARD_BLOCK_S

    async def close(self) -> None:
        """Read no more; whoever waits for results is told."""
        self._is_closed = True
        task, self._task = self._task, None
        self._fail_all(ClientClosedError("the client was closed while results were waited for"))
        if task is not None:
            await end([task])

    async def _read_on(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not cancellations():
            try:
                await self._read_once()
                pause_s = FIRST_PAUSE_S
            except REDIS_ERRORS as error:
                if not is_passing(error) and not await self._leave_unreadable(error):
                    raise friendly(error, self._store.settings.redis_url) from None
                logger.warning("Redis is away while results are waited for (%s)", error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _leave_unreadable(self, error: Exception) -> bool:
        """Whether the error is that of some streams, which are given up; the others are read on."""
        if failure_of(error) is not Failure.KEY:
            return False
        unreadable = []
        for subscription in list(self._subscriptions):
            with contextlib.suppress(*REDIS_ERRORS):
                kind = await self._store.redis.type(RunKeys.of(subscription.run).results)
                if kind not in (b"stream", b"none"):
                    unreadable.append(subscription)
        for subscription in unreadable:
            subscription.fail(friendly(error, self._store.settings.redis_url))
            self.drop(subscription)
        return bool(unreadable)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """Whatever ended the reading, nobody goes on waiting for what nobody reads."""
        if task.cancelled():
            self._fail_all(ClientClosedError("the task that reads results was cancelled"))
        elif isinstance(error := task.exception(), Exception):
            if not isinstance(error, BatchmillError):
                logger.error("the reader of results ended: %r", error, exc_info=error)
            self._fail_all(error)

    def _fail_all(self, error: Exception) -> None:
        for subscription in self._subscriptions:
            subscription.fail(error)

    async def _read_once(self) -> None:
        self._changed.clear()
        by_key: dict[str, list[Subscription]] = {}
        for subscription in self._subscriptions:
            if subscription.is_open and not subscription.full:
                by_key.setdefault(RunKeys.of(subscription.run).results, []).append(subscription)
        if not by_key:
            await self._changed.wait()
            return
        # one stream may have several readers; it is read from behind the slowest of them
        streams = {
            key: min((s.fetched for s in on), key=stream_order) for key, on in by_key.items()
        }
        got = await self._store.redis.xread(
            cast("Any", {**streams, self._wake_key: self._wake_after}),
            count=READ_AT_ONCE,
            block=int(self._block_s * 1000),
        )
        for raw_key, items in cast("list[tuple[bytes, list[Any]]]", got or []):
            key = raw_key.decode()
            if key == self._wake_key:
                self._wake_after = items[-1][0].decode()
            for subscription in by_key.get(key, []):
                subscription.feed(items)


def stream_order(entry_id: str) -> tuple[int, int]:
    """What orders the ids of stream entries."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)
