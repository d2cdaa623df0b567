"""RQ's own API and tools, used on a live worker, tell the truth and have their effect."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest
from kits.worker_kit import QUEUE, completed, num_done, status, submit, until, workers
from rq import Queue, Repeat
from rq.command import (
    send_shutdown_command,
    send_stop_execution_command,
    send_stop_job_command,
)
from rq.exceptions import DuplicateJobError
from rq.group import Group
from rq.job import Job
from rq.rate_limit import RateLimit
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.results import Result
from rq.suspension import resume, suspend

from queue_api.store.jobs import GENERATE
from queue_api.wire.schemas import FinishReason

pytestmark = pytest.mark.servers

SLOW = "echo:tokens=100000,step_s=0.01"


@pytest.fixture
def queue(connection):
    return Queue(QUEUE, connection=connection, serializer="json")


def rq_info(url: str) -> str:
    command = [sys.executable, "-m", "rq.cli", "info", "--raw", "--url", url]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def finished(job: Job) -> Job:
    until(lambda: job.get_status() == "finished")
    return job


def test_rq_info_and_fetch_see_what_runs(connection, server, queue, start_worker):
    start_worker(SLOW, name="milly")
    running = queue.enqueue(GENERATE, prompt="a b", max_tokens=100_000)
    until(lambda: running.get_status() == "started")
    (worker,) = workers(connection)
    assert (worker.name, worker.get_state(), worker.pid > 0) == ("milly", "busy", True)
    assert [e.job_id for e in worker.get_current_executions()] == [running.id]
    assert worker.get_current_job_id() == running.id
    fetched = Job.fetch(running.id, connection, serializer="json")
    assert (fetched.worker_name, fetched.func_name) == ("milly", GENERATE)
    assert [e.worker_name for e in fetched.get_executions()] == ["milly"]
    assert running.id in StartedJobRegistry(QUEUE, connection, serializer="json")
    shown = rq_info(server.url)
    assert f"queue {QUEUE} 0" in shown
    assert "worker milly" in shown and "busy" in shown


def test_a_stock_job_returns_its_result(queue, start_worker):
    start_worker()
    by_name = queue.enqueue(GENERATE, prompt="one two three", max_tokens=2, metadata={"row": 7})
    by_place = queue.enqueue(GENERATE, "four five", sampling={"max_tokens": 1})
    value = finished(by_name).return_value()
    assert (value["id"], value["text"], value["metadata"]) == (by_name.id, "one two", {"row": 7})
    assert value["finish_reason"] == "length"
    assert finished(by_place).return_value()["text"] == "four"
    assert by_name.id in FinishedJobRegistry(QUEUE, queue.connection, serializer="json")


def test_a_stock_job_with_a_bad_request_returns_an_error_result(queue, start_worker):
    start_worker()
    for job in (queue.enqueue(GENERATE, prompt=""), queue.enqueue(GENERATE, promt="a")):
        value = finished(job).return_value()
        assert (value["finish_reason"], value["error"]["code"]) == ("error", "invalid_request")


@pytest.mark.parametrize("by_execution", [False, True])
def test_stop_commands_stop_the_job_and_tell_its_run(connection, start_worker, by_execution):
    start_worker(SLOW)
    first, second = submit(connection, "run", ["a b"] * 4, chunk_size=2, max_tokens=100_000)
    until(lambda: status(connection, second) == "started")
    if by_execution:
        (execution,) = Job.fetch(first, connection, serializer="json").get_executions()
        send_stop_execution_command(connection, first, execution.id)
    else:
        send_stop_job_command(connection, first, serializer="json")
    until(lambda: status(connection, first) == "stopped")
    assert first in FailedJobRegistry(QUEUE, connection, serializer="json")
    assert num_done(connection, "run") == 2
    assert status(connection, second) == "started"


def test_cancel_before_and_while_running(connection, queue, start_worker):
    queued = queue.enqueue(GENERATE, prompt="never")
    queued.cancel()
    start_worker(SLOW)
    running = queue.enqueue(GENERATE, prompt="a", max_tokens=100_000)
    until(lambda: running.get_status() == "started")
    running.cancel()
    after = queue.enqueue(GENERATE, prompt="a", max_tokens=1)
    finished(after)
    until(lambda: not workers(connection)[0].get_current_executions(refresh=True))
    assert queued.get_status() == running.get_status() == "canceled"


def test_the_shutdown_command_drains(connection, queue, start_worker):
    worker = start_worker("echo:tokens=50,step_s=0.01", name="milly")
    job = queue.enqueue(GENERATE, prompt="a b")
    until(lambda: job.get_status() == "started")
    send_shutdown_command(connection, "milly")
    assert worker.wait() == 0
    assert job.get_status() == "finished"
    assert workers(connection) == []


def test_suspended_workers_take_nothing(connection, queue, start_worker):
    start_worker()
    suspend(connection)
    job = queue.enqueue(GENERATE, prompt="a b")
    until(lambda: workers(connection)[0].get_state() == "suspended")
    assert job.get_status() == "queued"
    resume(connection)
    finished(job)


def test_dependents_run_after_what_they_depend_on(queue, start_worker):
    first = queue.enqueue(GENERATE, prompt="first")
    second = queue.enqueue(GENERATE, prompt="second", depends_on=first)
    third = queue.enqueue(GENERATE, prompt="third", depends_on=[first, second])
    assert third.get_status() == "deferred"
    start_worker()
    finished(third)
    assert first.latest_result().created_at <= second.latest_result().created_at


def test_groups_know_their_jobs(connection, queue, start_worker):
    datas = [Queue.prepare_data(GENERATE, kwargs={"prompt": f"job {i}"}) for i in range(3)]
    group = Group.create(connection)
    jobs = group.enqueue_many(queue, datas)
    start_worker()
    for job in jobs:
        finished(job)
    found = Group.fetch(group.name, connection)
    assert connection.scard(found.key) == 3


def test_unique_ids_are_refused_while_they_live(queue, start_worker):
    queue.enqueue(GENERATE, prompt="a", job_id="only", unique=True)
    with pytest.raises(DuplicateJobError):
        queue.enqueue(GENERATE, prompt="a", job_id="only", unique=True)
    start_worker()
    finished(queue.fetch_job("only"))


def test_scheduled_and_repeated_jobs_run(queue, start_worker):
    start_worker()
    later = queue.enqueue_in(timedelta(seconds=1), GENERATE, prompt="later")
    twice = queue.enqueue(GENERATE, prompt="again", repeat=Repeat(times=1, interval=1))
    finished(later)
    until(lambda: Result.count(twice) == 2)


def test_queues_are_served_in_order(connection, start_worker):
    names = ["high", "low"]
    for name in reversed(names):
        submit(connection, name, ["a b"], queue=name)
    start_worker("echo:step_s=0.05", queues="high,low", capacity=1)
    (high,) = completed(connection, "high", 1)
    (low,) = completed(connection, "low", 1)
    assert high.timings.total_s <= low.timings.total_s
    assert FinishReason.LENGTH == high.finish_reason == low.finish_reason


def test_rate_limited_jobs_take_turns(queue, start_worker):
    start_worker()
    limit = RateLimit(key="one-at-a-time", concurrency=1)
    jobs = [queue.enqueue(GENERATE, prompt=f"job {i}", rate_limit=limit) for i in range(4)]
    assert {job.get_status() for job in jobs[1:]} <= {
        "rate_limited",
        "queued",
        "started",
        "finished",
    }
    for job in jobs:
        finished(job)


def test_a_busy_queue_doesnt_starve_the_next(connection, start_worker):
    submit(connection, "high", ["a b"] * 400, queue="high", chunk_size=1)
    submit(connection, "low", ["a b"] * 4, queue="low", chunk_size=1)
    start_worker("echo:tokens=1", queues="high,low", capacity=1)
    until(lambda: num_done(connection, "low") == 4)
    assert num_done(connection, "high") < 400
