"""Where a worker's jobs come from: claimed when there is room, read, and sorted out.

What has a result already isn't done again; what a client has cancelled isn't begun; a chunk that
a worker died of is split into singles instead of run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from time import monotonic

import redis.asyncio as aredis

from queue_api.connection.failures import REDIS_ERRORS
from queue_api.store.jobs import JobPayloadError, decode_chunk
from queue_api.wire.errors import InvalidRequestError
from queue_api.wire.schemas import ErrorDetail
from workers.claim.doorbell import Doorbell
from workers.claim.run_lookup import look_up
from workers.leases import Lease, Leases
from workers.patience import OUTAGE_S, patiently, raise_if_fatal
from workers.running.active import ActiveJob, ActiveRequest
from workers.running.checkpoints import Checkpoints
from workers.running.runner import Runner

__all__ = ["Intake"]

logger = logging.getLogger(__name__)

SUSPENDED_S = 0.5
"""How often to look whether a suspension has ended."""
FRESH_S = 2.0
YIELD_S = 0.05
"""So long reading jobs may keep the event loop from its other work, but for a single large one."""


class Intake:
    """Claims jobs for a runner while it has room."""

    def __init__(
        self,
        connection: aredis.Redis,
        leases: Leases,
        checkpoints: Checkpoints,
        runner: Runner,
    ) -> None:
        self._connection = connection
        self._leases = leases
        self._checkpoints = checkpoints
        self._runner = runner
        self._looked_up: dict[str, float] = {}
        """By run, when it was last seen not to be cancelled."""
        self._may_hold_unknown = False
        self._is_closing = False

    async def claim_forever(self, doorbell: Doorbell) -> None:
        """Keep the engine supplied until told to stop."""
        while not self._is_closing:
            try:
                await self._claim_once(doorbell)
            except REDIS_ERRORS as error:
                raise_if_fatal(error)
                logger.warning("no claim (%s); the model stays loaded", error)
                # it may have been carried out although its answer got lost
                self._may_hold_unknown = True
                await asyncio.sleep(OUTAGE_S)

    def stop(self) -> None:
        """Let `claim_forever` return once it has started what it has; ring its doorbell, too."""
        self._is_closing = True
        self._runner.freed.set()

    async def _claim_once(self, doorbell: Doorbell) -> None:
        active = self._runner.active
        if self._may_hold_unknown:
            await self._leases.release_unknown(active)
            self._may_hold_unknown = False
        want = self._runner.room
        runs_alone = any(self._leases.runs_alone(job.lease) for job in active.values())
        if want <= 0 or runs_alone:
            await self._something_ends()
            return
        claim = await self._leases.claim(want, len(active), self._runner.modest_room)
        self._runner.is_suspended = claim.is_suspended
        if claim.leases:
            await self._take(claim.leases)
        elif claim.is_suspended:
            await asyncio.sleep(SUSPENDED_S)
        elif claim.waits_for_idle:
            await self._something_ends()
        elif not claim.may_be_more:
            await doorbell.wait()

    async def _something_ends(self) -> None:
        self._runner.freed.clear()
        if self._runner.active and not self._is_closing:
            await self._runner.freed.wait()

    async def _take(self, leases: Sequence[Lease]) -> None:
        """Hold these jobs, leave out what has a result already, and start the rest."""
        jobs = await self._read_all(self._runner.hold(leases))
        # a run cancelled a moment ago is noticed by the next heartbeat
        self._looked_up = {r: t for r, t in self._looked_up.items() if t > monotonic() - FRESH_S}
        old = [job for job in jobs if not job.lease.is_first or self._may_be_cancelled(job)]
        runs = sorted({job.run for job in old if job.run is not None})
        again = [job for job in jobs if not job.lease.is_first]
        indexes: dict[str, list[int]] = {}
        for job in again:
            if job.run is not None:
                indexes.setdefault(job.run, []).extend(job.left)
        begun = [active.place for job in again for active in job.left.values()]
        found = await patiently(lambda: look_up(self._connection, runs, indexes))
        self._looked_up |= dict.fromkeys(set(runs) - found.cancelled, monotonic())
        partial = await patiently(lambda: self._checkpoints.load(begun))
        for job in jobs:
            if job.is_ending:
                continue  # lost, stopped or cancelled meanwhile
            for index in found.done.get(job.run or "", ()):
                if job.left.pop(index, None) is not None:
                    job.answered.add(index)
            if job.run in found.cancelled:
                self._runner.cancel(job)
            elif job.run is not None and job.lease.deaths > 0 and len(job.left) > 1:
                self._runner.split_suspects(job, job.run)
            else:
                self._runner.start(job, partial)

    async def _read_all(self, held: Iterable[ActiveJob]) -> list[ActiveJob]:
        """Read the jobs and leave out those that end here; leases are renewed in between."""
        jobs, yielded_at = [], monotonic()
        for job in held:
            if self._read(job):
                jobs.append(job)
            if monotonic() - yielded_at > YIELD_S:
                await asyncio.sleep(0)
                yielded_at = monotonic()
        return jobs

    def _may_be_cancelled(self, job: ActiveJob) -> bool:
        return job.age_s > FRESH_S and job.run not in self._looked_up

    def _read(self, job: ActiveJob) -> bool:
        """Put the job's requests into `left`; False if the job ends here."""
        try:
            # popped: it may be large, and nobody needs it again
            chunk = decode_chunk(job.lease.job_id, job.lease.fields.pop("data", b""))
        except JobPayloadError as error:
            self._runner.fail(job, str(error), may_retry=False)
            return False
        except InvalidRequestError as error:
            only = ActiveRequest(job, 0, {"id": job.lease.job_id})
            self._runner.refuse(only, ErrorDetail.of(error))
            return False
        job.run = chunk.run
        job.left = {index: ActiveRequest(job, index, item) for index, item in chunk.items}
        job.size = len(job.left)
        return True
