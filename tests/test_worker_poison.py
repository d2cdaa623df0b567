"""A request that can't be served ends alone, with a reason, and its neighbours finish."""

from __future__ import annotations

import asyncio
import signal
import time

from kits.worker_kit import QUEUE, completed, num_done, results, status, submit, until
from rq import Queue, Retry
from rq.job import Job
from rq.registry import FailedJobRegistry, ScheduledJobRegistry

from queue_api.client.client import Client
from queue_api.store.jobs import GENERATE, chunk_job_id, single_job_id

FAILING = "echo:marked=poison,on_marked=error"
BREAKING = "echo:marked=poison,on_marked=raise"
ABORTING = "echo:tokens=2,marked=poison,on_marked=abort,step_s=0.002"


def with_poison(total: int, at: int) -> list[str]:
    return ["poison" if i == at else f"word{i}" for i in range(total)]


def serve_until_done(connection, start_worker, total, model, **settings) -> list[int]:
    """Start a worker after each that dies; returns how they died."""
    codes = []
    while num_done(connection, "run") < total:
        process = start_worker(model, **settings).process
        until(lambda p=process: p.poll() is not None or num_done(connection, "run") == total)
        if process.poll() is not None:
            codes.append(process.returncode)
        assert len(codes) < 6
    return codes


def dead_letter(connection) -> list[str]:
    return FailedJobRegistry(QUEUE, connection, serializer="json").get_job_ids()


def test_a_request_that_fails_is_retried_alone_and_dead_lettered_alone(connection, start_worker):
    start_worker(FAILING)
    submit(connection, "run", with_poison(16, at=5), chunk_size=8, retries=2)
    found = completed(connection, "run", 16)
    culprit = found.pop(5)
    assert {result.ok for result in found} == {True}
    assert (culprit.error.code, culprit.attempt) == ("internal_error", 3)
    assert "poison" in culprit.error.message
    single = single_job_id("run", 5)
    until(lambda: dead_letter(connection) == [single])
    assert "poison" in Job.fetch(single, connection, serializer="json").latest_result().exc_string
    assert status(connection, chunk_job_id("run", 0)) == "finished"


def test_a_single_whose_key_is_taken_costs_no_worker(connection, settings, start_worker):
    connection.set("rq:job:run-i2", "somebody's")
    prompts = ["poison" if i in (2, 5) else f"word{i}" for i in range(8)]
    worker = start_worker(FAILING)
    submit(connection, "run", prompts, chunk_size=8, retries=2)
    until(lambda: num_done(connection, "run") == 7)
    until(lambda: status(connection, chunk_job_id("run", 0)) == "finished")
    found = {result.index: result for result in results(connection, "run")}
    assert sorted(found) == [0, 1, 3, 4, 5, 6, 7]
    assert [i for i, result in found.items() if not result.ok] == [5]
    assert worker.process.poll() is None
    assert "CRITICAL" not in worker.said()
    assert connection.get("rq:job:run-i2") == b"somebody's"

    async def read() -> dict[int, str | None]:
        async with Client(settings=settings) as client:
            told = client.run("run").results()
            return {r.index: r.error and r.error.code async for r in told}

    assert asyncio.run(asyncio.wait_for(read(), 60))[2] == "job_lost"


def test_without_retries_the_request_is_dead_lettered_at_once(connection, start_worker):
    start_worker(FAILING)
    submit(connection, "run", with_poison(4, at=2), retries=0)
    assert [result.ok for result in completed(connection, "run", 4)] == [True, True, False, True]
    until(lambda: dead_letter(connection) == [single_job_id("run", 2)])


def test_retry_intervals_are_kept(connection, start_worker):
    start_worker(FAILING)
    queue = Queue(QUEUE, connection=connection, serializer="json")
    job = queue.enqueue(GENERATE, prompt="poison", retry=Retry(max=2, interval=[60, 60]))
    registry = ScheduledJobRegistry(QUEUE, connection, serializer="json")
    until(lambda: job.id in registry.get_job_ids())  # RQ sets the status before it schedules
    assert job.get_status() == "scheduled"
    assert registry.get_scheduled_time(job).timestamp() > time.time() + 30


def test_requeued_from_the_dead_letter_a_job_runs_again(connection, start_worker):
    start_worker(FAILING)
    queue = Queue(QUEUE, connection=connection, serializer="json")
    job = queue.enqueue(GENERATE, prompt="poison", retry=Retry(max=1))
    until(lambda: dead_letter(connection) == [job.id])
    claims = int(connection.hget(job.key, "claims"))
    job.requeue()
    until(lambda: int(connection.hget(job.key, "claims")) > claims)
    until(lambda: dead_letter(connection) == [job.id])


def test_a_request_that_kills_its_worker_is_quarantined(connection, start_worker):
    """The figures of docs/reliability.md: 3 deaths, 1,999 answers, one dead letter."""
    submit(connection, "run", with_poison(2000, at=1234), chunk_size=32)
    codes = serve_until_done(connection, start_worker, 2000, ABORTING, lease_s=1)
    assert codes == [-signal.SIGABRT] * 3
    found = completed(connection, "run", 2000)
    assert [result.index for result in found if not result.ok] == [1234]
    assert [result.text for result in found if result.ok] == [
        f"word{i} word{i}" for i in range(2000) if i != 1234
    ]
    assert found[1234].error.code == "quarantined"
    assert "3 workers died" in found[1234].error.message
    single = single_job_id("run", 1234)
    until(lambda: dead_letter(connection) == [single])
    cause = Job.fetch(single, connection, serializer="json").latest_result().exc_string
    assert "3 workers died" in cause


def test_a_request_that_breaks_the_engine_is_quarantined(connection, start_worker):
    submit(connection, "run", with_poison(20, at=3), chunk_size=4, retries=0)
    codes = serve_until_done(connection, start_worker, 20, BREAKING, max_num_seqs=4)
    # the last one reports the quarantine itself, and may still be on its way out
    assert codes in ([1, 1], [1, 1, 1])
    found = completed(connection, "run", 20)
    assert [result.error.code for result in found if not result.ok] == ["quarantined"]


def test_a_quarantined_request_gets_its_metadata_back(connection, settings, start_worker):
    async def submit_one() -> None:
        async with Client(settings=settings) as client:
            await client.submit([{"prompt": "poison", "metadata": {"note": [1]}}], "run")

    asyncio.run(submit_one())
    serve_until_done(connection, start_worker, 1, BREAKING)
    (result,) = completed(connection, "run", 1)
    assert result.error.code == "quarantined"
    assert result.metadata == {"note": [1]}
