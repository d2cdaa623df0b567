"""Writes what the engine completed: results first, then the jobs they belong to.

An idle worker answers at once. While the engine has more to do, what it completes is gathered for
a moment, and whatever piles up while one round trip is under way goes with the next. When Redis is
away all is kept and written later; both scripts may run twice without harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import redis.asyncio as aredis
from redis.exceptions import ResponseError

from queue_api.connection.failures import REDIS_ERRORS, Failure, failure_of, is_passing
from queue_api.store.keys import RunKeys
from queue_api.store.runs import result_args
from queue_api.store.scripts import ScriptCall, Scripts
from queue_api.wire.schemas import GenerationResult
from workers.leases import Lease, Leases
from workers.running.outcomes import Outcome

__all__ = ["Publisher"]

logger = logging.getLogger(__name__)

MOST_RESULTS_PER_FLUSH = 2000
MOST_RESULTS_PER_CALL = 500
RETRY_S = 0.5
GATHER_S = 0.03
"""From one round trip to the next while the engine has more to do: it delays the end of a job of
one request by no more than about a step of a model, and spares a worker of many small steps most
round trips."""
GATHER_PARTS_S = 0.25
"""The same while no such job has ended: who sent many at once waits for the rest of them."""
NEARLY = 0.75
"""What comes when so much of a pause is over is written at once: waking for nothing else costs a
worker that is else asleep more than a result does."""

LOST, LEFT_TO_RQ, RESULTS_LOST = 0, 2, 3


def _written(run: str, outcome: Outcome) -> tuple[str | int | bytes, ...]:
    """What emit.lua takes of it."""
    try:
        return outcome.args()
    except ValueError as error:  # pydantic's are; one odd result mustn't hold up all others
        logger.exception("a result of run %s can't be written", run)
        failed = GenerationResult.failed(outcome.id, error, run=run, index=outcome.index)
        return result_args(failed)


@dataclass(slots=True)
class _Ending:
    lease: Lease
    return_value: bytes | None
    """None to give the job back."""
    run: str | None = None
    answered: Sequence[int] = ()
    """Indexes of the run whose results were written before this."""


class Publisher:
    """Collects results and ended jobs; `run` writes them until cancelled."""

    def __init__(
        self,
        connection: aredis.Redis,
        scripts: Scripts,
        leases: Leases,
        *,
        run_ttl_s: int,
    ) -> None:
        self._connection = connection
        self._scripts = scripts
        self._leases = leases
        self._run_ttl_s = run_ttl_s
        self._results: list[tuple[str, Outcome]] = []
        self._endings: list[_Ending] = []
        self._callbacks: list[Callable[[], None]] = []
        self._needless: list[str] = []
        self._dirty = asyncio.Event()
        self._urgent = asyncio.Event()
        self._stop_gathering = asyncio.Event()
        self._wrote_at = float("-inf")
        self._is_stuck = False
        self._clean = asyncio.Event()
        self._clean.set()

    @property
    def num_stuck(self) -> int:
        """Results that Redis doesn't take at present; 0 while it takes what it is given."""
        if not self._is_stuck:
            return 0
        return len(self._results) + sum(ending.run is None for ending in self._endings)

    def add_result(self, run: str, outcome: Outcome) -> None:
        """Write it to its run, as of when that happens."""
        self._results.append((run, outcome))
        self._touch()

    def finish(
        self, lease: Lease, return_value: bytes, run: str | None, answered: Sequence[int]
    ) -> None:
        """End a job with success, after the results given so far.

        If Redis has lost some of them since, the job is given back instead.

        :param return_value: JSON
        :param answered: indexes of the run that have results
        """
        self._endings.append(_Ending(lease, return_value, run, answered))
        if len(answered) <= 1:
            self._stop_gathering.set()
        self._touch()

    def release(self, lease: Lease) -> None:
        """Give a job back, after the results given so far."""
        self._endings.append(_Ending(lease, None))
        self._touch()
        self.hurry()

    def then(self, callback: Callable[[], None]) -> None:
        """Call back once the results given so far are in Redis."""
        self._callbacks.append(callback)
        self._touch()
        self.hurry()

    def delete_after_results(self, keys: Iterable[str]) -> None:
        """Delete keys that the results given so far make needless."""
        self._needless.extend(keys)
        self._touch()

    async def flushed(self) -> None:
        """Wait until everything is written, however long Redis is away."""
        self.hurry()
        await self._clean.wait()

    def hurry(self) -> None:
        """Write what there is at once: nothing more will come soon."""
        self._urgent.set()
        self._stop_gathering.set()

    def nudge(self) -> None:
        """Write what there is if a pause is nearly over anyway."""
        if time.monotonic() > self._wrote_at + NEARLY * GATHER_PARTS_S:
            self._stop_gathering.set()

    async def _gather(self) -> None:
        """Wait for more to write along, unless it is urgent or the last write is long past."""
        await self._wait_since_write(self._stop_gathering, GATHER_PARTS_S)
        await self._wait_since_write(self._urgent, GATHER_S)
        self._urgent.clear()

    async def _wait_since_write(self, event: asyncio.Event, pause_s: float) -> None:
        left_s = self._wrote_at + pause_s - time.monotonic()
        if left_s > 0:
            # not wait_for: that of Python 3.11 may swallow a cancellation
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await event.wait()

    def _touch(self) -> None:
        self._clean.clear()
        self._dirty.set()

    async def run(
        self, on_left_to_rq: Callable[[Lease, bytes], None], on_ended: Callable[[Lease], None]
    ) -> None:
        """Write until cancelled.

        :param on_left_to_rq: called with a job whose end has to go through RQ's own handler
        :param on_ended: called with each job once it is finished, given back or found lost
        """
        self._on_left_to_rq = on_left_to_rq
        self._on_ended = on_ended
        while True:
            await self._dirty.wait()
            await self._gather()
            self._dirty.clear()
            self._stop_gathering.clear()
            self._wrote_at = time.monotonic()
            try:
                await self._flush()
                self._is_stuck = False
            except REDIS_ERRORS as error:
                if not is_passing(error):
                    raise
                logger.warning(
                    "Redis takes no writes (%s); %d results and %d jobs wait to be written",
                    error,
                    len(self._results),
                    len(self._endings),
                )
                self._is_stuck = True
                self._dirty.set()
                await asyncio.sleep(RETRY_S)
            if self._results or self._endings or self._callbacks or self._needless:
                self._dirty.set()
            else:
                self._clean.set()

    async def _flush(self) -> None:
        endings, callbacks, needless = self._endings[:], self._callbacks[:], self._needless[:]
        while len(self._results) > MOST_RESULTS_PER_FLUSH:
            await self._write(self._results[:MOST_RESULTS_PER_FLUSH], [])
        if self._results or endings:
            await self._write(self._results[:], endings)
        if needless:
            await self._connection.unlink(*needless)
            del self._needless[: len(needless)]
        for callback in callbacks:
            callback()
        del self._callbacks[: len(callbacks)]

    async def _write(self, results: list[tuple[str, Outcome]], endings: list[_Ending]) -> None:
        """Results and then the ends of their jobs, in one round trip.

        Should results not be written, finish.lua doesn't end a job that needs them.
        """
        emits = self._emits(results)
        replies = await self._scripts.call_many([*emits, *map(self._end_call, endings)])
        self._check_written(emits, replies)
        del self._results[: len(results)]
        ends = replies[len(emits) :]
        for reply in ends:
            if isinstance(reply, Exception) and failure_of(reply) is not Failure.KEY:
                raise reply
        for ending, reply in zip(endings, ends, strict=True):
            self._settle(ending, reply)
        del self._endings[: len(endings)]

    def _emits(self, batch: list[tuple[str, Outcome]]) -> list[ScriptCall]:
        by_run: dict[str, list[Outcome]] = {}
        for run, outcome in batch:
            by_run.setdefault(run, []).append(outcome)
        calls: list[ScriptCall] = []
        for run, outcomes in by_run.items():
            for start in range(0, len(outcomes), MOST_RESULTS_PER_CALL):
                part = outcomes[start : start + MOST_RESULTS_PER_CALL]
                args: list[str | int | bytes] = [self._run_ttl_s]
                for outcome in part:
                    args += _written(run, outcome)
                calls.append(("emit", RunKeys.of(run), args))
        return calls

    def _check_written(self, emits: list[ScriptCall], replies: list[Any]) -> None:
        for (_, keys, _), reply in zip(emits, replies, strict=False):
            if not isinstance(reply, Exception):
                continue
            if failure_of(reply) is not Failure.KEY:
                raise reply
            # such as WRONGTYPE: somebody else wrote to the run's keys; nobody can read them
            logger.error("results of %s can't be written: %s", keys[0], reply)

    def _end_call(self, ending: _Ending) -> ScriptCall:
        if ending.return_value is None:
            return self._leases.releasing(ending.lease)
        value = b64encode(ending.return_value)
        return self._leases.finishing(ending.lease, value, ending.run, ending.answered)

    def _settle(self, ending: _Ending, reply: int | ResponseError) -> None:
        if isinstance(reply, ResponseError):
            # somebody's key of another type in the job's place: RQ's handler buries it
            logger.error("job %s can't be ended: %s", ending.lease.job_id, reply)
            reply = LEFT_TO_RQ
        if reply == LEFT_TO_RQ and ending.return_value is not None:
            self._on_left_to_rq(ending.lease, ending.return_value)
            return
        if reply == RESULTS_LOST:
            logger.warning("job %s: Redis lost results of it; given back", ending.lease.job_id)
            self.release(ending.lease)
            return
        if reply == LOST:
            logger.info("job %s ended here, but its lease was lost", ending.lease.job_id)
        self._on_ended(ending.lease)
