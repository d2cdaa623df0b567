"""What a worker does with the jobs it holds: feed the engine, publish, end early, give back.

All of it happens on the event loop, in callbacks; only leases are renewed by a task. A job is held
from its claim until Redis has confirmed its end, and its lease is renewed all the while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from redis.exceptions import RedisError

from queue_api.store.jobs import parse_items
from queue_api.wire.errors import InvalidRequestError, RequestError
from queue_api.wire.schemas import ErrorDetail, FinishReason, GenerationRequest, GenerationResult
from workers.leases import Lease, Leases
from workers.running.active import ActiveJob, ActiveRequest, Because
from workers.running.checkpoints import Checkpoints, Place
from workers.running.engine_loop import Addition, Completion, EngineLoop, Refusal
from workers.running.outcomes import CANCELLED, TIMEOUT, Outcome, time_limit
from workers.running.publisher import Publisher

__all__ = ["Ends", "Runner"]

logger = logging.getLogger(__name__)

CANCELED, DELETED = "canceled", ""
"""Status, as RQ writes it, of a job that nobody wants any more."""


class Ends(Protocol):
    """How jobs end that the scripts don't end: through RQ, in its thread."""

    def fail(self, job: ActiveJob, reason: str, *, may_retry: bool) -> None: ...

    def split(
        self, job: ActiveJob, run: str, requests: dict[int, tuple[object, str]], because: Because
    ) -> None: ...


class Runner:
    """Joins leases, engine and publisher."""

    def __init__(
        self,
        leases: Leases,
        publisher: Publisher,
        engine: EngineLoop,
        *,
        worker_name: str,
        checkpoints: Checkpoints,
        ends: Ends,
        capacity: int,
    ) -> None:
        """:param capacity: requests that it is to hold"""
        self._leases = leases
        self._publisher = publisher
        self._engine = engine
        self._worker_name = worker_name
        self._checkpoints = checkpoints
        self._ends = ends
        self._capacity = capacity
        self._loop = asyncio.get_running_loop()
        self.active: dict[str, ActiveJob] = {}
        """By execution id."""
        self._num_single = 0
        """Jobs of one request that are held."""
        self.is_suspended = False
        self.idle = asyncio.Event()
        """Set while no job is held."""
        self.idle.set()
        self._requests: dict[str, ActiveRequest] = {}
        self.freed = asyncio.Event()
        """Set when room may have come free."""
        self._saving: asyncio.Task[None] | None = None

    # --- begin ------------------------------------------------------------------------------

    @property
    def modest_room(self) -> int:
        """With no more than that, there is enough to do."""
        return self._capacity // 2

    @property
    def room(self) -> int:
        """For how many more requests; negative if the last job was larger than the room.

        Results that Redis doesn't take are held as well: else a worker would go on taking work,
        for which a full Redis needs no memory, until its own memory is full, too.
        """
        return self._capacity - len(self._requests) - self._publisher.num_stuck

    def hold(self, leases: Sequence[Lease]) -> list[ActiveJob]:
        """Remember claimed jobs, so that their leases are renewed."""
        jobs = [ActiveJob(lease, lease.enqueued_at, self._about(lease)) for lease in leases]
        self.active |= {job.lease.execution_id: job for job in jobs}
        self._num_single += sum(lease.size == 1 for lease in leases)
        self._engine.is_hasty = self._num_single > 0
        self.idle.clear()
        return jobs

    def _about(self, lease: Lease) -> dict[str, object]:
        engine = self._engine.engine
        about = {
            "model": engine.model_name,
            "worker": self._worker_name,
            "attempt": lease.attempt,
        }
        if engine.model_revision is not None:
            about["model_revision"] = engine.model_revision
        return about

    def refuse(self, active: ActiveRequest, error: ErrorDetail) -> None:
        """End a request that never began, and its job if it was the last."""
        self._end_with_error(active, error)
        self._finish_if_done(active.job)

    def start(self, job: ActiveJob, begun: Mapping[Place, list[int]]) -> None:
        """Give the engine what is left of a job.

        :param begun: tokens that earlier attempts have kept
        """
        additions = []
        actives = list(job.left.values())
        parsed = parse_items([active.item for active in actives])
        for active, request in zip(actives, parsed, strict=True):
            if isinstance(request, InvalidRequestError):
                self._end_with_error(active, ErrorDetail.of(request))
                continue
            active.request, active.item = request, None
            if self._set_timer(active, request):
                generated = begun.get(active.place, ())
                additions.append(self._begin(active, request, generated))
        if additions:
            self._engine.add(additions)
        if (timeout_s := job.lease.number("timeout", 0)) > 0:
            why = f"took longer than the job's timeout of {timeout_s} s"
            overtime = ErrorDetail(code=TIMEOUT, message=why)
            job.timer = self._loop.call_later(timeout_s, self._expire_all, job, overtime)
        self._finish_if_done(job)

    def _begin(
        self, active: ActiveRequest, request: GenerationRequest, generated: Sequence[int]
    ) -> Addition:
        self._requests[active.key] = active
        if generated:
            # the last token is never partial: the engine has to end the text itself
            generated = generated[: request.sampling.max_tokens - 1]
            logger.info("request %s goes on behind %d tokens", active.id, len(generated))
        self._checkpoints.begin(active.place, len(generated))
        return Addition(active.key, request, f"{active.place.owner}/{request.id}", generated)

    def _set_timer(self, active: ActiveRequest, request: GenerationRequest) -> bool:
        """False if its time is over already."""
        limit = time_limit(request)
        if limit is None:
            return True
        if limit.seconds <= 0:
            self._end_with_error(active, limit.error)
            return False
        active.timer = self._loop.call_later(limit.seconds, self._expire, active, limit.error)
        return True

    def _expire(self, active: ActiveRequest, error: ErrorDetail) -> None:
        """End a request whose time is over."""
        logger.warning("request %s: %s", active.id, error.message)
        self._withdraw(active)
        self._end_with_error(active, error)
        self._finish_if_done(active.job)

    def _expire_all(self, job: ActiveJob, error: ErrorDetail) -> None:
        """Let what is left of a job fail, for RQ to retry or not, as RQ does on a timeout."""
        if job.is_ending:
            return
        for active in list(job.left.values()):
            self._withdraw(active)
            job.failed[active.index] = (active, error)
        job.left.clear()
        self._finish_if_done(job)

    # --- complete ---------------------------------------------------------------------------

    def on_done(self, completions: Sequence[Completion]) -> None:
        """Take what the engine completed to the publisher."""
        for completion in completions:
            active = self._requests.pop(completion.key, None)
            if active is None or active.request is None:
                continue  # cancelled or lost meanwhile
            job = active.job
            active.stop_timer()
            if completion.error is not None and not isinstance(completion.error, RequestError):
                failure = ErrorDetail.of(completion.error)
                logger.warning("request %s failed: %s", active.id, failure.message)
                job.failed[active.index] = (active, failure)
                del job.left[active.index]
                self._finish_if_done(job)
                continue
            error = None if completion.error is None else ErrorDetail.of(completion.error)
            self._end(active, completion, error)
            self._finish_if_done(job)
        if not self._requests:
            self._publisher.hurry()
        self._publisher.nudge()
        if self.room > 0:
            self.freed.set()

    def on_progress(self, progress: Mapping[str, Sequence[int]]) -> None:
        """Keep partial texts, unless the last ones are still on their way."""
        if self._saving is None or self._saving.done():
            self._saving = asyncio.create_task(self._save(progress))

    async def _save(self, progress: Mapping[str, Sequence[int]], at_least: int = 0) -> None:
        places = {
            active.place: tokens
            for key, tokens in progress.items()
            if (active := self._requests.get(key)) is not None
        }
        try:
            await self._checkpoints.save(places, at_least=at_least)
        except (RedisError, OSError) as error:
            logger.warning("partial texts couldn't be saved: %s", error)

    async def save_progress(self) -> None:
        """Keep all partial texts as they are now."""
        await self._save(await self._engine.progress(), at_least=1)

    def _forget_partial(self, places: Sequence[Place]) -> None:
        """Delete partial texts once the results that replace them are written."""
        if keys := self._checkpoints.forgetting(places):
            self._publisher.delete_after_results(keys)

    def _end_with_error(
        self, active: ActiveRequest, error: ErrorDetail, *, cancelled: bool = False
    ) -> None:
        reason = FinishReason.CANCELLED if cancelled else FinishReason.ERROR
        self._end(active, Refusal(active.key, None, finish_reason=reason), error)

    def _end(
        self, active: ActiveRequest, completion: Completion, error: ErrorDetail | None
    ) -> None:
        job = active.job
        job.left.pop(active.index, None)
        job.answered.add(active.index)
        self._forget_partial([active.place])
        outcome = Outcome(
            job.run,
            active.index,
            active.id,
            completion,
            error,
            active.request,
            job.enqueued_at,
            job.about,
        )
        if job.run is None:
            job.results.append(GenerationResult.model_validate(outcome.fields()))
        else:
            self._publisher.add_result(job.run, outcome)

    def _finish_if_done(self, job: ActiveJob) -> None:
        if job.left or job.is_ending:
            return
        if job.failed:
            self._fail_some(job)
        else:
            self.finish(job)

    def finish(self, job: ActiveJob) -> None:
        """End a job with success."""
        job.is_ending = True
        self._publisher.finish(job.lease, job.return_value(), job.run, sorted(job.answered))

    def ended(self, lease: Lease) -> None:
        """Let go of a job whose end is in Redis."""
        job = self.active.pop(lease.execution_id, None)
        if job is not None:
            job.stop_timer()
            self._num_single -= lease.size == 1
            self._engine.is_hasty = self._num_single > 0
            self._checkpoints.forgetting(active.place for active in job.left.values())
        self.freed.set()
        if not self.active:
            self.idle.set()

    # --- end early --------------------------------------------------------------------------

    def fail(self, job: ActiveJob, reason: str, *, may_retry: bool) -> None:
        """End a job as failed, or have it tried again if it may and has retries left."""
        logger.warning("job %s failed: %s", job.lease.job_id, reason)
        job.is_ending = True
        self._withdraw_all(job)
        self._ends.fail(job, reason, may_retry=may_retry)

    def _fail_some(self, job: ActiveJob) -> None:
        """End a job that has results for all but some requests, which failed.

        What failed is tried again on its own. What has no retry left ends in the dead letter,
        alone, and its run is told.
        """
        lease, run = job.lease, job.run
        has_retries = lease.number("retries_left", 0) > 0
        requests = job.take_failed()
        reason = next(why.message for _, why in job.failed.values())
        if run is not None and not has_retries:
            for active, why in list(job.failed.values()):
                self._end_with_error(active, why)
        if run is None or job.size == 1:
            self.fail(job, reason, may_retry=True)
            return
        job.is_ending = True
        because = Because.FAILED if has_retries else Because.DEAD
        self._ends.split(job, run, requests, because)

    def split_suspects(self, job: ActiveJob, run: str) -> None:
        """Give each request of a chunk that a worker died of a job of its own."""
        job.is_ending = True
        self._ends.split(job, run, job.take_left(), Because.SUSPECT)

    def cancel(self, job: ActiveJob) -> None:
        """End what is left of a job with `cancelled` results."""
        self._withdraw_all(job)
        self._cancel_requests(job)
        self._finish_if_done(job)

    def drop(self, job: ActiveJob, indexes: Collection[int]) -> None:
        """Leave out requests that have their results from elsewhere."""
        for index in [index for index in job.left if index in indexes]:
            self._withdraw(job.left.pop(index))
        self._finish_if_done(job)

    def stop(self, job: ActiveJob) -> bool:
        """End a job with `cancelled` results, but leave its end in RQ to the caller."""
        if job.is_ending:
            return False
        job.is_ending = True
        self._withdraw_all(job)
        self._cancel_requests(job)
        return True

    def release(self, job: ActiveJob) -> None:
        """Give a job back to its queue; what it has results for isn't done again."""
        if not job.is_ending:
            job.is_ending = True
            self._withdraw_all(job)
            self._publisher.release(job.lease)

    async def abandon(self) -> None:
        """Let the leases of everything that isn't ended run out now."""
        jobs = [job for job in self.active.values() if not job.is_ending]
        await self._leases.abandon([job.lease for job in jobs])
        for job in jobs:
            job.is_ending = True
            self.ended(job.lease)

    def lose(self, execution_id: str, status: str) -> None:
        """Stop working on a job whose lease is gone."""
        job = self.active.get(execution_id)
        if job is None or job.is_ending:
            return
        logger.warning("job %s isn't ours any more: %s", job.lease.job_id, status or "deleted")
        job.is_ending = True
        self._withdraw_all(job)
        if status in (CANCELED, DELETED):
            self._cancel_requests(job)
        self.ended(job.lease)

    def _withdraw_all(self, job: ActiveJob) -> None:
        for active in job.left.values():
            self._withdraw(active)

    def _withdraw(self, active: ActiveRequest) -> None:
        active.stop_timer()
        if self._requests.pop(active.key, None) is not None:
            self._engine.cancel(active.key)
            self.freed.set()

    def _cancel_requests(self, job: ActiveJob) -> None:
        for active in list(job.left.values()):
            self._end_with_error(active, CANCELLED, cancelled=True)
