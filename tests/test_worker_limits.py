"""What takes too long ends: a request by its own limits, a job by RQ's timeout."""

from __future__ import annotations

import time

import pytest
from kits.worker_kit import QUEUE, completed, status, submit, until
from rq import Queue, Retry
from rq.registry import FailedJobRegistry

from queue_api.store.jobs import GENERATE

ENDLESS = "echo:tokens=1000000,step_s=0.01"


@pytest.fixture
def queue(connection):
    return Queue(QUEUE, connection=connection, serializer="json")


def value(job):
    until(lambda: job.get_status() == "finished")
    return job.return_value()


def test_a_request_ends_with_its_timeout_and_others_go_on(connection, queue, start_worker):
    start_worker(ENDLESS)
    short = queue.enqueue(GENERATE, "a b", max_tokens=10**6, timeout_s=0.2)
    other = queue.enqueue(GENERATE, "a b", max_tokens=100)
    assert value(short)["error"]["code"] == "timeout"
    assert value(other)["finish_reason"] == "length"


def test_a_request_past_its_deadline_isnt_begun(queue, start_worker):
    start_worker(ENDLESS)
    late = queue.enqueue(GENERATE, "a b", deadline=time.time() - 1)
    soon = queue.enqueue(GENERATE, "a b", max_tokens=10**6, deadline=time.time() + 0.5)
    for job in (late, soon):
        assert value(job)["error"]["code"] == "deadline_exceeded"
    assert value(late)["completion_tokens"] == 0


def test_a_job_that_exceeds_rqs_timeout_is_retried_then_fails(connection, queue, start_worker):
    start_worker(ENDLESS)
    job = queue.enqueue(GENERATE, "a", max_tokens=10**6, job_timeout=1, retry=Retry(max=1))
    until(lambda: job.get_status() == "failed")
    assert "timeout of 1 s" in job.latest_result().exc_string
    assert connection.hget(job.key, "claims") == b"2"
    assert job.id in FailedJobRegistry(QUEUE, connection, serializer="json")


def test_a_run_is_told_of_what_timed_out(connection, start_worker):
    (job,) = submit(connection, "run", ["a b", "c d"], retries=0, max_tokens=10**6)
    connection.hset(f"rq:job:{job}", "timeout", 1)
    start_worker(ENDLESS)
    found = completed(connection, "run", 2)
    assert {result.error.code for result in found} == {"timeout"}
    until(lambda: status(connection, job) == "finished")
