"""Results for requests that no job will answer any more, so that nobody waits for ever.

A worker answers every request that it can read. What remains: jobs in the dead letter, stopped
or cancelled with RQ's tools, deleted, or lost with a Redis that didn't keep them; and jobs whose
queue's list or registry somebody deleted under them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import redis
from rq.exceptions import NoSuchJobError
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from queue_api.connection.failures import raise_unless_key
from queue_api.store.jobs import GenerateJob, chunk_job_id, single_job_id
from queue_api.store.run_store import RunStore
from queue_api.store.runs import RunStatus
from queue_api.store.undone import pages, request_ids, undone
from queue_api.wire.schemas import ErrorDetail, FinishReason, GenerationResult

__all__ = ["Reconciler"]

logger = logging.getLogger(__name__)

_DEAD = {
    JobStatus.FAILED.value: "job_failed",
    JobStatus.STOPPED.value: "job_stopped",
    JobStatus.CANCELED.value: "cancelled",
}
# RQ's word for a job that ended well; if a request of it has no result, that was lost
_ENDED = {None, JobStatus.FINISHED.value}
# RQ's words for jobs that somebody will take up, if they are where they should be
_IN_PLACES = {JobStatus.QUEUED.value, JobStatus.STARTED.value, JobStatus.SCHEDULED.value}
LOST = "job_lost"
# both bound how long an event loop is kept from its other work
LOOK_AT_ONCE = 8192
END_AT_ONCE = 1024
STRAYED = "job_strayed"
Resubmit = Callable[[Sequence[int]], Awaitable[None]]


@dataclass
class Reconciler:
    """Looks now and then for requests of one run that were left without a job."""

    store: RunStore
    run: str
    id_of: Callable[[int], str | None] = lambda _: None
    """The id of the request at an index, if this process knows it."""
    resubmit: Resubmit | None = None
    """Puts requests whose jobs vanished on the queue again; without it they end in an error."""
    _misplaced: dict[int, str] = field(default_factory=dict)
    """By request, the job that seems alive and is nowhere."""
    _strayed: dict[int, str] = field(default_factory=dict)
    """By request, a job that a worker of another kind ended."""
    _suspects: dict[int, str] = field(default_factory=dict)
    _resubmitted: set[int] = field(default_factory=set)

    async def sweep(self, indexes: Iterable[int] | None = None) -> int:
        """Emit an error for each of these requests (default: all) that no job will answer.

        A request has to look abandoned in two sweeps running: one look may fall between two
        steps of a worker. Returns how many look so now: 0 means that nothing is amiss.
        """
        status = await self.store.status(self.run)
        abandoned: dict[int, str] = {}
        self._misplaced.clear()
        self._strayed.clear()
        found_in_place: set[str] = set()
        missing = await undone(self.store, status, None if indexes is None else sorted(indexes))
        for page in pages(missing, status.chunk_size, LOOK_AT_ONCE):
            abandoned |= await self._abandoned(status, page, found_in_place)
        rescued = await self._rescue(status.queue)
        abandoned = {i: code for i, code in abandoned.items() if i not in rescued}
        certain = {i: code for i, code in abandoned.items() if self._suspects.get(i) == code}
        self._suspects = {i: code for i, code in abandoned.items() if i not in certain}
        if certain:
            await self._settle(status, certain)
        return len(abandoned) + len(rescued)

    async def _rescue(self, queue: str) -> set[int]:
        """Give jobs that a worker of another kind has ended to ours; the requests in them."""
        jobs = set(await self.store.rescue(queue, set(self._strayed.values())))
        if jobs:
            logger.warning(
                "run %s: %d jobs were taken by a worker that isn't batchmill's and wait for one "
                "that is; stock RQ can't run them, so give batchmill a queue of its own",
                self.run,
                len(jobs),
            )
        return {index for index, job_id in self._strayed.items() if job_id in jobs}

    async def _abandoned(
        self, status: RunStatus, indexes: list[int], found_in_place: set[str]
    ) -> dict[int, str]:
        """Why nobody will answer, for those of these requests that it is so of."""
        chunks: dict[str, list[int]] = {}
        for index in indexes:
            chunks.setdefault(chunk_job_id(self.run, index // status.chunk_size), []).append(index)
        jobs = await self._states(chunks)
        # read after the chunks: a worker splits a chunk into singles before it ends the chunk
        gone = [i for job_id, inside in chunks.items() if jobs[job_id] in _ENDED for i in inside]
        singles = await self._states([single_job_id(self.run, index) for index in gone])
        lost = await self._nowhere(status.queue, jobs | singles, found_in_place)
        found: dict[int, str] = {}
        for job_id, inside in chunks.items():
            for index in inside:
                decides, state = job_id, jobs[job_id]
                single = single_job_id(self.run, index)
                if state in _ENDED and singles[single] not in _ENDED:
                    decides, state = single, singles[single]
                if decides in lost:
                    self._misplaced[index] = decides
                if decides in lost or state in _ENDED:
                    found[index] = LOST
                elif state == STRAYED:
                    self._strayed[index] = decides
                    found[index] = STRAYED
                elif state in _DEAD:
                    found[index] = _DEAD[state or ""]
        return found

    async def _nowhere(
        self, queue: str, jobs: Mapping[str, str | None], found_in_place: set[str]
    ) -> set[str]:
        """Jobs that seem alive but are on no queue and in no registry; see misplaced.lua.

        One job of each state is looked for, the one whose turn comes first; if it is there, so are
        the others, or their turn to be looked for comes.

        :param found_in_place: states of which that is known in this sweep; added to
        """
        lost: set[str] = set()
        for state in _IN_PLACES - found_in_place:
            those = [job_id for job_id, known in jobs.items() if known == state]
            if those and await self.store.misplaced(queue, those[:1]):
                lost.update(await self.store.misplaced(queue, those))
            elif those:
                found_in_place.add(state)
        return lost

    async def _states(self, job_ids: Collection[str]) -> dict[str, str | None]:
        rows = await self.store.job_fields(job_ids, "status", "worker_name", "claimed_by")
        return {job_id: _state(*row) for job_id, row in zip(job_ids, rows, strict=True)}

    async def _settle(self, status: RunStatus, abandoned: dict[int, str]) -> None:
        lost = [i for i, code in abandoned.items() if code == LOST and i not in self._resubmitted]
        again = set(lost if self.resubmit is not None else ())
        for page in pages(
            (index for index in abandoned if index not in again), status.chunk_size, END_AT_ONCE
        ):
            await self._end(status, {index: abandoned[index] for index in page})
        # else enqueue.lua would take them for alive
        there = {self._misplaced[index] for index in abandoned if index in self._misplaced}
        await self.store.misplaced(status.queue, there, forget=True)
        if self.resubmit is not None and again:
            logger.warning("run %s: %d requests lost their jobs; sent again", self.run, len(again))
            await self.resubmit(lost)
            self._resubmitted |= again

    async def _end(self, status: RunStatus, abandoned: dict[int, str]) -> None:
        ids = await request_ids(self.store, status, abandoned, self.id_of)
        causes = await asyncio.to_thread(self._causes, status, abandoned)
        results = [
            GenerationResult.failed(
                ids[index],
                ErrorDetail(code=code, message=causes[index]),
                finish_reason=FinishReason.CANCELLED if code == "cancelled" else FinishReason.ERROR,
                run=self.run,
                index=index,
            )
            for index, code in abandoned.items()
        ]
        await self.store.emit(self.run, results)

    def _causes(self, status: RunStatus, abandoned: dict[int, str]) -> dict[int, str]:
        """Why, in words; the last line of the traceback that RQ kept for a failed job."""
        texts: dict[str, str] = {}
        causes = {}
        for index, code in abandoned.items():
            if code == LOST:
                causes[index] = "the request's job is gone and left no result; submit it again"
                continue
            if code == "cancelled":
                causes[index] = "the request's job was cancelled"
                continue
            chunk = chunk_job_id(self.run, index // status.chunk_size)
            for job_id in (single_job_id(self.run, index), chunk):
                if job_id not in texts:
                    texts[job_id] = self._last_words(job_id)
                if texts[job_id]:
                    causes[index] = texts[job_id]
                    break
            else:
                causes[index] = f"job {chunk} ended: {code}"
        return causes

    def _last_words(self, job_id: str) -> str:
        try:
            job = GenerateJob.fetch(job_id, self.store.rq_connection, serializer=JSONSerializer)
            latest = job.latest_result()
        except NoSuchJobError:
            return ""
        except redis.ResponseError as error:
            raise_unless_key([error])
            return ""  # somebody's key of another type
        lines = ((latest and latest.exc_string) or "").strip().splitlines()
        return f"job {job_id} failed: {lines[-1][:1000]}" if lines else ""


def _state(status: bytes | None, worker_name: bytes | None, claimed_by: bytes | None) -> str | None:
    """RQ's word for a job's state; STRAYED if a worker of another kind ended it."""
    state = status.decode(errors="replace") if status is not None else None
    has_ended = state in (JobStatus.FAILED.value, JobStatus.FINISHED.value)
    return STRAYED if has_ended and worker_name and worker_name != claimed_by else state
