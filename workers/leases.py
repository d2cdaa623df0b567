"""Jobs that a worker holds: taken, kept and given back on RQ's own keys, many at a time."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from uuid import uuid4

import redis.asyncio as aredis
from rq.job import Job
from rq.suspension import WORKERS_SUSPENDED
from rq.utils import as_text, now, parse_composite_key, utcformat, utcparse

from queue_api.connection.failures import raise_unless_key
from queue_api.store.jobs import BATCH_SIZE_FIELD, LANE_FIELD
from queue_api.store.keys import (
    RQ_KEY_PREFIX,
    RunKeys,
    execution_key,
    executions_key,
    finished_key,
    queue_key,
    return_values_key,
    strays_key,
    wip_key,
)
from queue_api.store.scripts import ScriptCall, Scripts

__all__ = ["Beat", "Claim", "Lease", "Leases"]

MOST_JOBS_PER_CLAIM = 128
MOST_LOOKS_PER_CLAIM = 1000
MOST_LANES = 4
"""That a worker remembers, of one run."""
RENEW_AT_ONCE = 500
# these bound the time that one script holds the server up
MOST_IN_A_STRETCH = 32
FAIR_EVERY = 16
"""Every so many claims begin with the next queue in turn instead of the best."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run one job until the lease ends; an execution in RQ's words."""

    job_id: str
    execution_id: str
    queue: str
    fields: dict[str, bytes]
    """The job's hash as it stood when claimed."""
    claimed_at: float
    """Epoch seconds."""

    @property
    def composite(self) -> str:
        return f"{self.job_id}:{self.execution_id}"

    @property
    def size(self) -> int:
        """How many requests it counts as. Jobs enqueued by stock RQ don't say: one."""
        return max(1, self.number(BATCH_SIZE_FIELD, 1))

    @property
    def is_first(self) -> bool:
        """True if nobody has worked on the job before."""
        return self.number("claims", 1) <= 1

    @property
    def attempt(self) -> int:
        """1 plus the retries spent and the workers that died; what was given back isn't one."""
        return max(1, self.number("claims", 1) - self.number("released", 0))

    @property
    def enqueued_at(self) -> float:
        """Epoch seconds; when claimed if the job doesn't say."""
        try:
            return utcparse(self.fields["enqueued_at"].decode()).timestamp()
        except (KeyError, ValueError):
            return self.claimed_at

    @property
    def deaths(self) -> int:
        """How many workers died, or whose engine failed, holding it."""
        return self.number("deaths", 0)

    def number(self, field: str, default: int) -> int:
        """A field of the job's hash, which anyone may have written, as a number."""
        try:
            return int(self.fields[field])
        except (KeyError, ValueError):
            return default


@dataclass(frozen=True, slots=True)
class Claim:
    """The outcome of one claim."""

    leases: list[Lease]
    is_suspended: bool
    waits_for_idle: bool
    """The next job has to run alone, on a worker that holds none."""
    may_be_more: bool
    """So many entries of the queues weren't jobs any more that some may stand behind them."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What the server said when leases were renewed."""

    is_known: bool
    """False if RQ had forgotten the worker, which has to register again."""
    lost: dict[str, str]
    """Execution ids no longer held, with the job's status now; empty if it was deleted."""


class Leases:
    """Claims, renews and ends executions for one worker."""

    def __init__(
        self,
        connection: aredis.Redis,
        scripts: Scripts,
        *,
        worker_name: str,
        worker_key: str,
        executions_key: str,
        queues: Sequence[str],
        lease_s: float,
        alone_after: int,
        worker_ttl_s: int,
        result_ttl_s: int,
    ) -> None:
        self._connection = connection
        self._scripts = scripts
        self._worker_name = worker_name
        self._worker_key = worker_key
        self._executions_key = executions_key
        self._queues = list(queues)
        self._lease_s = int(lease_s)
        self._alone_after = alone_after
        self._worker_ttl_s = worker_ttl_s
        self._result_ttl_s = result_ttl_s
        self._num_claims = 0
        self._lanes: list[bytes] = []
        """Of jobs that were taken, the first in front."""

    async def claim(self, want: int, held: int = 0, modest: int = 0) -> Claim:
        """Take jobs until they hold `want` requests or there are no more.

        :param held: jobs that the worker has; a job that has to run alone waits for none
        :param modest: while it wants no more requests than that, it leaves other workers' lanes
            to them
        """
        execution_ids = uuid4().hex[:24]
        lists = [
            (name, key) for name in self._in_order() for key in (strays_key(name), queue_key(name))
        ]
        list_keys = [key for name, list_key in lists for key in (list_key, wip_key(name))]
        queues = [name for name, _ in lists]
        keys = [self._worker_key, self._executions_key, WORKERS_SUSPENDED, *list_keys]
        args: list[str | int] = [utcformat(now()), self._lease_s, self._worker_name, want]
        limits = [MOST_JOBS_PER_CLAIM, self._alone_after, held, MOST_LOOKS_PER_CLAIM, modest]
        reply = await self._scripts.call(
            ("claim", keys, [*args, RQ_KEY_PREFIX, execution_ids, *limits, *self._lanes])
        )
        claimed_at = time.time()
        leases = [self._lease(entry, queues, claimed_at) for entry in reply[1:]]
        for lease in leases:
            self._note_lane(lease.fields.get(LANE_FIELD))
        return Claim(
            leases=leases,
            is_suspended=reply[0] == b"suspended",
            waits_for_idle=reply[0] == b"alone",
            may_be_more=reply[0] == b"more",
        )

    def _note_lane(self, lane: bytes | None) -> None:
        if lane is None or lane in self._lanes:
            return
        run = lane.rpartition(b"/")[0]
        known = [other for other in self._lanes if other.rpartition(b"/")[0] == run]
        self._lanes = [*known[: MOST_LANES - 1], lane]

    def _in_order(self) -> list[str]:
        """The queues, best first; now and then another first, so that none starves."""
        self._num_claims += 1
        turn, is_special = divmod(self._num_claims, FAIR_EVERY)
        start = turn % len(self._queues) if is_special == 0 else 0
        return self._queues[start:] + self._queues[:start]

    @staticmethod
    def _lease(entry: list[Any], queues: Sequence[str], claimed_at: float) -> Lease:
        job_id, execution_id, queue_number, flat = entry
        fields = {
            name.decode(errors="replace"): value
            for name, value in zip(flat[::2], flat[1::2], strict=True)
        }
        queue = queues[queue_number]
        return Lease(job_id.decode(), execution_id.decode(), queue, fields, claimed_at)

    async def renew(self, leases: Iterable[Lease], state: str) -> Beat:
        """Keep all of them for another lease; says which are lost."""
        waiting, is_known, lost = list(leases), True, dict[str, str]()
        args: list[str | int] = [utcformat(now()), self._lease_s, self._worker_ttl_s]
        for start in range(0, max(1, len(waiting)), RENEW_AT_ONCE):
            page = waiting[start : start + RENEW_AT_ONCE]
            reply = await self._scripts.call(
                (
                    "heartbeat",
                    [self._worker_key, self._executions_key],
                    [*args, RQ_KEY_PREFIX, state, *_named(page)],
                )
            )
            # the first call tells: it writes the worker's hash, so the others find one
            is_known = is_known and bool(reply[0])
            for execution, status in zip(reply[1::2], reply[2::2], strict=True):
                lost[execution.decode()] = status.decode()
        return Beat(is_known, lost)

    async def release_unknown(self, known: Container[str]) -> None:
        """Give back what the server holds for this worker but the worker doesn't know of.

        :param known: execution ids
        """
        members = await self._connection.smembers(self._executions_key)
        composites = [parse_composite_key(as_text(member)) for member in members]
        calls = [
            self.releasing(Lease(job_id, execution_id, queue, {}, 0.0))
            for job_id, execution_id in composites
            if execution_id not in known
            for queue in self._queues  # the release changes something in the right one only
        ]
        if calls:
            raise_unless_key(await self._scripts.call_many(calls))

    def finishing(
        self,
        lease: Lease,
        return_value: bytes,
        run: str | None = None,
        answered: Iterable[int] = (),
    ) -> ScriptCall:
        """The call that ends a job with success.

        :param return_value: base64 of JSON
        :param answered: which of the run's requests, in order, have to have results, or it isn't
            ended
        """
        job_key = Job.key_for(lease.job_id)
        keys = [
            *_job_keys(lease),
            self._worker_key,
            self._executions_key,
            return_values_key(lease.job_id),
            finished_key(lease.queue),
            f"{job_key}:dependents",
        ]
        args: list[Any] = [lease.job_id, lease.execution_id, utcformat(now()), self._worker_name]
        args += [return_value, lease.claimed_at, self._result_ttl_s]
        if run is not None:
            run_keys = RunKeys.of(run)
            keys += [run_keys.hash, run_keys.done]
            args += chain.from_iterable(_stretches(answered))
        return "finish", keys, args

    async def abandon(self, leases: Iterable[Lease]) -> None:
        """Let leases run out now; see abandon.lua."""
        await self._scripts.call(("abandon", [], [RQ_KEY_PREFIX, *_named(leases)]))

    def runs_alone(self, lease: Lease) -> bool:
        """True if nothing else may run beside this job."""
        return lease.deaths >= self._alone_after

    def releasing(self, lease: Lease) -> ScriptCall:
        """The call that gives a job back."""
        keys = [*_job_keys(lease), self._executions_key, queue_key(lease.queue)]
        return "release", keys, [lease.job_id, lease.execution_id]


def _named(leases: Iterable[Lease]) -> list[str]:
    return [part for one in leases for part in (one.queue, one.job_id, one.execution_id)]


def _stretches(indexes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, how many) of indexes that follow each other, as finish.lua looks at them."""
    first, end = 0, 0
    for index in indexes:
        if index != end or index - first == MOST_IN_A_STRETCH:
            if end > first:
                yield first, end - first
            first = index
        end = index + 1
    if end > first:
        yield first, end - first


def _job_keys(lease: Lease) -> list[str]:
    return [
        Job.key_for(lease.job_id),
        wip_key(lease.queue),
        execution_key(lease.job_id, lease.execution_id),
        executions_key(lease.job_id),
    ]
