"""Runs in Redis: every command that a client sends about them, except the reader's."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import redis
import redis.asyncio as aredis
from pydantic import ValidationError

from queue_api.connection.connect import check_server, connect, connect_async
from queue_api.connection.failures import (
    REDIS_ERRORS,
    friendly,
    is_answer,
    is_passing,
    raise_unless_key,
)
from queue_api.connection.settings import QueueSettings
from queue_api.store.bitmap import Bitmap
from queue_api.store.enqueue import EnqueueCall, JobTemplate
from queue_api.store.jobs import GenerateJob
from queue_api.store.keys import (
    MODEL_FIELD,
    RQ_KEY_PREFIX,
    RunKeys,
    canceled_key,
    executions_key,
    failed_key,
    finished_key,
    queue_key,
    scheduled_key,
    strays_key,
    wip_key,
    workers_key,
)
from queue_api.store.owner import Owner
from queue_api.store.runs import UNKNOWN_TOTAL, RunStatus, check_run_id, emit_args
from queue_api.store.scripts import ScriptCall, Scripts, load_scripts
from queue_api.wire.errors import InvalidRequestError, RedisAccessError, RunNotFoundError
from queue_api.wire.schemas import ErrorDetail, GenerationResult, describe

__all__ = [
    "CANCELLED",
    "LEFT_TO_RQ",
    "Entry",
    "RunStore",
    "cancellations",
    "if_possible",
    "parse_result",
    "read_entries",
]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
Entry = tuple[str, int, bytes]
"""(id in the stream, index in the run, result as JSON); results written together share the id."""

CANCELLED, LEFT_TO_RQ = 1, 2
"""What cancel.lua returns; 0 is a job that ended."""

# these bound the time that one script holds the server up
EMIT_AT_ONCE = 250
CANCEL_AT_ONCE = 250
QUEUE_ENTRIES_AT_ONCE = 1_000_000
READ_AT_ONCE = 100
"""Entries; each holds up to 64 results (emit.lua)."""
JOBS_AT_ONCE = 1000
MOST_REQUESTS, MOST_DIGITS = 2**31, 10
"""Of a run: its bitmap has no more places (decode_chunk)."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 3.0


class RunStore:
    """Talks to one Redis about runs. Every call may be repeated after a lost connection."""

    def __init__(self, settings: QueueSettings) -> None:
        self.settings = settings
        self.owner = Owner()
        self.redis: aredis.Redis = connect_async(settings.redis_url, settings.max_connections)
        self.rq_connection: redis.Redis = connect(settings.redis_url, max_connections=2)
        """For RQ's own API, which isn't asyncio; used in threads."""
        self._templates: dict[tuple[str, int], JobTemplate] = {}
        self._scripts = Scripts(self.redis, load_scripts())
        self._connected = False

    def within(self, patience_s: float) -> RunStore:
        """The same Redis over the same connections, tried no longer than that."""
        hasty = copy.copy(self)
        hasty.settings = self.settings.model_copy(update={"reconnect_s": patience_s})
        return hasty

    async def connect(self) -> None:
        """Check the server once; what is wrong with it is told before any work is.

        One that answers but isn't ready, as while it loads its data, is waited for.

        :raises RedisAccessError: see queue_api.connection.connect.check_server
        """
        give_up_at = time.monotonic() + self.settings.reconnect_s
        while not self._connected:
            try:
                info = await asyncio.to_thread(check_server, self.rq_connection)
                break
            except REDIS_ERRORS as error:
                waits = is_passing(error) and is_answer(error)
                if not waits or time.monotonic() + LONGEST_PAUSE_S > give_up_at:
                    raise friendly(error, self.settings.redis_url) from None
                logger.warning("Redis isn't ready (%s); trying again", error)
            await asyncio.sleep(LONGEST_PAUSE_S)
        else:
            return
        for warning in info.warnings():
            logger.info("%s", warning)  # workers warn of it; a client can do nothing about it
        self._connected = True

    async def close(self) -> None:
        """Let go of the connections; whoever still calls is told so."""
        is_gone, self.owner.is_closed = self.owner.is_gone, True
        if not is_gone:
            await self.redis.aclose()
            await self.redis.connection_pool.disconnect()
        self.rq_connection.close()

    def template(self, queue: str, job_ttl_s: int | None = None) -> JobTemplate:
        """What makes the jobs of that queue; `job_ttl_s` in place of the settings' if given."""
        ttl_s = self.settings.job_ttl_s if job_ttl_s is None else job_ttl_s
        if (queue, ttl_s) not in self._templates:
            settings = self.settings.model_copy(update={"job_ttl_s": ttl_s})
            self._templates[queue, ttl_s] = JobTemplate(self.rq_connection, queue, settings)
        return self._templates[queue, ttl_s]

    async def call(self, talk: Callable[[], Awaitable[_T]]) -> _T:
        """Send commands that may be sent twice; go on trying while the connection is lost.

        :raises RedisAccessError: the server refuses, or doesn't come back within `reconnect_s`
        :raises RuntimeError: closed, or it belongs to another process or event loop
        """
        self.owner.check()
        await self.connect()
        before = cancellations()
        give_up_at = time.monotonic() + self.settings.reconnect_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                got = await talk()
                if cancellations() > before:
                    raise asyncio.CancelledError
                return got
            except REDIS_ERRORS as error:
                if not is_passing(error) or time.monotonic() + pause_s > give_up_at:
                    raise friendly(error, self.settings.redis_url) from None
                logger.warning("Redis is away (%s); trying again", error)
            self.owner.check()  # closed meanwhile
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _run(self, script: ScriptCall) -> Any:
        return await self.call(lambda: self._scripts.call(script))

    async def open(self, run: str, *, queue: str, **fields: str | int) -> dict[str, str]:
        """Create the run with these fields, or leave what is there; returns what is there.

        :raises InvalidRequestError: it is there, on another queue: no worker of this one, which may
            have another model, would ever see it
        """
        made = {"queue": queue, "created_at": str(time.time()), "total": UNKNOWN_TOTAL, **fields}
        there = await self._fields(check_run_id(run), "make", made)
        if there["queue"] != queue:
            raise InvalidRequestError(
                f"run {run!r} is on queue {there['queue']!r}, not on {queue!r}: go on with it "
                "there, or choose another run id"
            )
        return there

    async def add(self, run: str, **fields: str | int) -> dict[str, str]:
        """Write fields that the run's hash doesn't have yet; returns what is there.

        :raises RunNotFoundError: no such run
        """
        return await self._fields(run, "add", fields)

    async def set(self, run: str, **fields: str | int) -> None:
        """Write fields of the run's hash.

        :raises RunNotFoundError: no such run
        """
        await self._fields(run, "set", fields)

    async def _fields(self, run: str, how: str, fields: Mapping[str, str | int]) -> dict[str, str]:
        pairs = [part for pair in fields.items() for part in pair]
        flat = await self._run(("fields", RunKeys.of(run), [self.settings.run_ttl_s, how, *pairs]))
        if not flat:
            raise self._not_found(run)
        texts = [part.decode() for part in flat]
        return dict(zip(texts[::2], texts[1::2], strict=True))

    def _not_found(self, run: str) -> RunNotFoundError:
        return RunNotFoundError(
            f"no run {run!r} in this Redis: never submitted to it, or forgotten "
            f"{self.settings.run_ttl_s / 86_400:g} days after its last change"
        )

    async def status(self, run: str) -> RunStatus:
        """:raises RunNotFoundError: no such run"""
        key = RunKeys.of(check_run_id(run)).hash
        raw = await self.call(
            lambda: cast("Awaitable[dict[bytes, bytes]]", self.redis.hgetall(key))
        )
        if b"queue" not in raw:
            raise self._not_found(run)
        return RunStatus.from_hash(run, raw)

    async def done(self, run: str) -> Bitmap:
        """The indexes that have a result."""
        key = RunKeys.of(run).done
        raw = await self.call(lambda: cast("Awaitable[bytes | None]", self.redis.get(key)))
        return Bitmap(raw or b"")

    async def enqueue(self, calls: Sequence[EnqueueCall]) -> list[int]:
        """Enqueue jobs in one round trip; returns what enqueue.lua did for each."""

        async def talk() -> list[int]:
            replies = await self._scripts.call_many(
                [("enqueue", call.keys, call.args) for call in calls]
            )
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            return replies

        return await self.call(talk) if calls else []

    async def cancel_queued(self, queue: str, job_ids: Iterable[str]) -> dict[str, int]:
        """Cancel those of these jobs that wait on the queue; what cancel.lua says of each."""
        waiting, answers = list(job_ids), dict[str, int]()
        keys = [self.template(queue).queue.key, canceled_key(queue)]
        limits: list[str | int] = [queue, self.settings.job_ttl_s, QUEUE_ENTRIES_AT_ONCE]
        limits.append(RQ_KEY_PREFIX)
        while page := waiting[:CANCEL_AT_ONCE]:
            jobs = [
                key
                for job_id in page
                for key in (GenerateJob.key_for(job_id), GenerateJob.dependents_key_for(job_id))
            ]
            got = await self._run(("cancel", [*keys, *jobs], [*limits, *page]))
            answers |= zip(page, got, strict=False)
            del waiting[: len(got)]
        return answers

    async def misplaced(
        self, queue: str, job_ids: Iterable[str], *, forget: bool = False
    ) -> list[str]:
        """Those of these jobs that seem alive but are nowhere; see misplaced.lua.

        :param forget: delete their hashes, so that they may be enqueued anew
        """
        waiting, found = list(job_ids), list[str]()
        places = [queue_key(queue), f"{queue_key(queue)}:intermediate", strays_key(queue)]
        keys = [*places, wip_key(queue), scheduled_key(queue)]
        limits: list[str | int] = [queue, int(forget), QUEUE_ENTRIES_AT_ONCE]
        while page := waiting[:CANCEL_AT_ONCE]:
            jobs = [
                key
                for job_id in page
                for key in (GenerateJob.key_for(job_id), executions_key(job_id))
            ]
            got = await self._run(("misplaced", [*keys, *jobs], [*limits, *page]))
            found += [job_id for job_id, answer in zip(page, got, strict=False) if answer]
            del waiting[: len(got)]
        return found

    async def rescue(self, queue: str, job_ids: Iterable[str]) -> list[str]:
        """Those of these jobs that a worker of another kind had ended, and ours get now.

        See rescue.lua.
        """
        waiting, found = list(job_ids), list[str]()
        keys = [strays_key(queue), failed_key(queue), finished_key(queue)]
        for start in range(0, len(waiting), CANCEL_AT_ONCE):
            page = waiting[start : start + CANCEL_AT_ONCE]
            jobs = [GenerateJob.key_for(job_id) for job_id in page]
            got = await self._run(("rescue", [*keys, *jobs], page))
            found += [job_id for job_id, answer in zip(page, got, strict=True) if answer]
        return found

    async def emit(self, run: str, results: Sequence[GenerationResult]) -> int:
        """Append results, at most one per request ever; returns how many were the first.

        :raises RunNotFoundError: the run has been deleted or has expired
        """
        new = 0
        for start in range(0, len(results), EMIT_AT_ONCE):
            args = emit_args(results[start : start + EMIT_AT_ONCE], self.settings.run_ttl_s)
            got = await self._run(("emit", RunKeys.of(run), args))
            if got < 0:
                raise RunNotFoundError(f"run {run!r} is gone: deleted or past its time to live")
            new += got
        return new

    async def entries(self, run: str, after: str = "0") -> list[Entry]:
        """The results in the stream behind the entry `after`, a page of them, without waiting."""
        key = RunKeys.of(run).results
        raw = await self.call(
            lambda: cast(
                "Awaitable[list[Any]]",
                self.redis.xrange(key, min=f"({after}", count=READ_AT_ONCE),
            )
        )
        return read_entries(raw)

    async def trim(self, run: str, through: str) -> None:
        """Forget the results up to and with the entry `through`: they are safe elsewhere."""
        milliseconds, number = through.split("-")
        minid = f"{milliseconds}-{int(number) + 1}"
        key = RunKeys.of(run).results
        await self.call(lambda: self.redis.xtrim(key, minid=minid, approximate=False))

    async def reopen(self, run: str, indexes: Sequence[int]) -> None:
        """Let these requests have a result again, because theirs was lost."""
        args = [self.settings.run_ttl_s, *indexes]
        await self._run(("reopen", RunKeys.of(run), args))

    async def models(self, queue: str) -> frozenset[tuple[str, str]]:
        """Model and revision of each worker that serves the queue and says so."""

        async def talk() -> list[Any]:
            names = await cast("Awaitable[Iterable[Any]]", self.redis.smembers(workers_key(queue)))
            async with self.redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.hmget(name, [MODEL_FIELD, "death"])
                replies = await pipe.execute(raise_on_error=False)
            raise_unless_key(replies)
            return [reply for reply in replies if not isinstance(reply, Exception)]

        told = [model for model, death in await self.call(talk) if model and death is None]
        parts = (model.decode(errors="replace").partition("\n") for model in told)
        return frozenset((name, revision) for name, _, revision in parts)

    async def delete(self, run: str) -> None:
        """Forget a run. Results that still come for it are dropped."""
        await self.call(lambda: self.redis.delete(*RunKeys.of(run)))

    async def job_fields(self, job_ids: Iterable[str], *fields: str) -> list[list[bytes | None]]:
        """These fields of the jobs' hashes; None where there is no such job or field."""
        keys = [GenerateJob.key_for(job_id) for job_id in job_ids]
        found: list[list[bytes | None]] = []
        for start in range(0, len(keys), JOBS_AT_ONCE):
            page = keys[start : start + JOBS_AT_ONCE]

            async def talk(page: Sequence[Any] = page) -> list[list[bytes | None]]:
                async with self.redis.pipeline(transaction=False) as pipe:
                    for key in page:
                        pipe.hmget(key, fields)
                    replies = await pipe.execute(raise_on_error=False)
                raise_unless_key(replies)
                # somebody's key of another type is no job
                none: list[bytes | None] = [None] * len(fields)
                return [none if isinstance(reply, Exception) else reply for reply in replies]

            found += await self.call(talk)
        return found


async def if_possible(work: Awaitable[object]) -> None:
    """Do what can be done later as well, of a store `within` little time: it must not hold up
    those who read, from a full Redis say, which only readers can empty.

    :raises RedisAccessError: it never will be possible
    """
    try:
        await work
    except RedisAccessError as error:
        if not error.may_pass:
            raise
        logger.info("put off: %s", error)


def cancellations() -> int:
    """How often the current task was asked to stop; if that grew over a command, stop.

    redis-py sends with asyncio.wait_for, and that of Python 3.11 loses a cancellation that
    arrives just as the command has been sent: the task would go on for ever.
    """
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def read_entries(items: Iterable[tuple[bytes, Mapping[bytes, bytes]]]) -> list[Entry]:
    """The results in entries of a stream as redis-py returns them; what isn't ours is left out."""
    found: list[Entry] = []
    for raw_id, fields in items:
        entry_id = raw_id.decode()
        named = fields.items()
        if b"result" in fields:  # one to an entry, as they were written once
            named = {fields.get(b"index", b""): fields[b"result"]}.items()
        for name, raw in named:
            if (index := _index(name)) is not None:
                found.append((entry_id, index, raw))
            else:
                logger.warning(
                    "skipped a field of entry %s of a result stream: %.40r is no index",
                    entry_id,
                    name,
                )
    return found


def _index(name: bytes) -> int | None:
    """What a worker writes as an index; None for what anyone else may have written."""
    if not name.isdigit() or len(name) > MOST_DIGITS or (name[:1] == b"0" and name != b"0"):
        return None
    index = int(name)
    return index if index < MOST_REQUESTS else None


def parse_result(run: str, index: int, raw: bytes) -> GenerationResult:
    """The result of an entry; an error result if it can't be read."""
    try:
        return GenerationResult.model_validate_json(raw)
    except ValidationError as error:
        detail = ErrorDetail(code="unreadable_result", message=describe(error))
        return GenerationResult.failed(str(index), detail, run=run, index=index)
