"""Our scripts write what RQ's own classes write: the alarm for when RQ's layout moves."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import redis
from rq import Queue
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job
from rq.registry import FinishedJobRegistry, StartedJobRegistry
from rq.results import Result
from rq.utils import now
from rq.worker import SimpleWorker

from queue_api.connection.connect import connect_async
from queue_api.store.jobs import GENERATE
from queue_api.store.scripts import Scripts
from workers.leases import Lease, Leases
from workers.scripts import worker_scripts

pytestmark = pytest.mark.servers

QUEUE = "layout"
VALUE = {"text": "hello"}
OURS = {"claims", "claimed_by", "released"}
"""Fields that we add to a job's hash."""


def stock_worker(connection: redis.Redis) -> SimpleWorker:
    queue = Queue(QUEUE, connection=connection, serializer="json")
    worker = SimpleWorker([queue], name="worker", connection=connection, serializer="json")
    worker.register_birth()
    return worker


def stock_start(connection: redis.Redis, worker: SimpleWorker) -> tuple[Job, Execution]:
    job, _ = worker.dequeue_job_and_maintain_ttl(1)
    execution = worker.prepare_execution(job)
    worker.prepare_job_execution(job, remove_from_intermediate_queue=True)
    return job, execution


def stock_finish(worker: SimpleWorker, job: Job, execution: Execution) -> None:
    job._result, job.ended_at = VALUE, now()
    queue = worker.queues[0]
    worker.handle_job_success(job, queue, queue.started_job_registry, execution)


def leased(
    url: str, worker: SimpleWorker, act: Callable[[Leases, Scripts], Coroutine[Any, Any, Any]]
) -> Any:
    async def run() -> Any:
        connection = connect_async(url)
        scripts = Scripts(connection, worker_scripts())
        leases = Leases(
            connection,
            scripts,
            worker_name=worker.name,
            worker_key=worker.key,
            executions_key=worker.executions_key,
            queues=[QUEUE],
            lease_s=30,
            alone_after=2,
            worker_ttl_s=120,
            result_ttl_s=500,
        )
        try:
            return await act(leases, scripts)
        finally:
            await connection.aclose()

    return asyncio.run(run())


def claim(url: str, worker: SimpleWorker) -> Lease:
    (lease,) = leased(url, worker, lambda leases, _: leases.claim(8)).leases
    return lease


def finish(url: str, worker: SimpleWorker, lease: Lease, value: bytes) -> int:
    call = lambda leases, scripts: scripts.call(leases.finishing(lease, b64encode(value)))  # noqa: E731
    return leased(url, worker, call)


def layout(connection: redis.Redis, job_id: str, execution_id: str) -> dict[str, Any]:
    """Every key with its type, whether it expires, and its members, ids made comparable."""

    def neutral(raw: bytes) -> str:
        return raw.decode().replace(job_id, "<job>").replace(execution_id, "<execution>")

    found: dict[str, Any] = {}
    for key in connection.scan_iter("*"):
        kind = connection.type(key).decode()
        members: Any = None
        if kind == "hash":
            members = {neutral(field) for field in connection.hkeys(key)} - OURS
        elif kind == "zset":
            members = {neutral(member) for member in connection.zrange(key, 0, -1)}
        elif kind == "set":
            members = {neutral(member) for member in connection.smembers(key)}
        elif kind == "stream":
            members = [{neutral(f) for f in fields} for _, fields in connection.xrange(key)]
        found[neutral(key)] = (kind, connection.ttl(key) > 0, members)
    found.pop("rq:clean_groups", None)  # a lock of RQ's maintenance
    return found


def enqueue(connection: redis.Redis, **options: Any) -> Job:
    queue = Queue(QUEUE, connection=connection, serializer="json")
    return queue.enqueue(GENERATE, prompt="a", **options)


def test_a_claimed_job_looks_as_if_rq_had_started_it(connection, server):
    enqueue(connection, job_id="one")
    worker = stock_worker(connection)
    job, execution = stock_start(connection, worker)
    theirs = layout(connection, job.id, execution.id)
    connection.flushall()

    enqueue(connection, job_id="one")
    worker = stock_worker(connection)
    lease = claim(server.url, worker)
    assert layout(connection, lease.job_id, lease.execution_id) == theirs
    assert [e.id for e in worker.get_current_executions(refresh=True)] == [lease.execution_id]
    fetched = Execution.fetch(lease.execution_id, lease.job_id, connection)
    assert fetched.worker_name == worker.name
    assert ExecutionRegistry(lease.job_id, connection).get_execution_ids() == [lease.execution_id]
    registry = StartedJobRegistry(QUEUE, connection, serializer="json")
    assert registry.get_job_and_execution_ids() == [(lease.job_id, lease.execution_id)]


@pytest.mark.parametrize("result_ttl", [None, 60, -1, 0])
def test_a_finished_job_looks_as_if_rq_had_finished_it(connection, server, result_ttl):
    enqueue(connection, job_id="one", result_ttl=result_ttl)
    worker = stock_worker(connection)
    job, execution = stock_start(connection, worker)
    stock_finish(worker, job, execution)
    theirs = layout(connection, job.id, execution.id)
    connection.flushall()

    enqueue(connection, job_id="one", result_ttl=result_ttl)
    worker = stock_worker(connection)
    lease = claim(server.url, worker)
    assert finish(server.url, worker, lease, b'{"text": "hello"}') == 1
    ours = layout(connection, lease.job_id, lease.execution_id)
    ours.pop("rq:executions:<job>", None)
    theirs.pop("rq:executions:<job>", None)  # RQ leaves it empty in one case, we in none
    assert ours == theirs
    if result_ttl != 0:
        job = Job.fetch("one", connection, serializer="json")
        assert job.return_value() == VALUE
        (result,) = job.results()
        assert (result.type, result.execution_id) == (Result.Type.SUCCESSFUL, lease.execution_id)
        assert result.worker_name == worker.name
        assert "one" in FinishedJobRegistry(QUEUE, connection, serializer="json")


def test_whoever_lost_the_lease_changes_nothing(connection, server):
    enqueue(connection, job_id="one")
    worker = stock_worker(connection)
    lease = claim(server.url, worker)
    Job.fetch("one", connection, serializer="json").cancel()
    assert finish(server.url, worker, lease, b"1") == 0
    release = lambda leases, scripts: scripts.call(leases.releasing(lease))  # noqa: E731
    assert leased(server.url, worker, release) == 0
    assert Job.fetch("one", connection, serializer="json").is_canceled
    beat = leased(server.url, worker, lambda leases, _: leases.renew([lease], "busy"))
    assert beat.lost == {lease.execution_id: "canceled"}
    assert not connection.exists(f"rq:execution:{lease.composite}")


def test_jobs_with_dependents_are_left_to_rq(connection, server):
    first = enqueue(connection, job_id="one")
    enqueue(connection, job_id="two", depends_on=first)
    worker = stock_worker(connection)
    lease = claim(server.url, worker)
    assert finish(server.url, worker, lease, b"1") == 2
    assert Job.fetch("one", connection, serializer="json").is_started


def test_a_claim_takes_no_more_requests_than_wanted(connection, server):
    for number in range(5):
        job = enqueue(connection, job_id=f"job{number}")
        connection.hset(job.key, "batch_size", 4)
    worker = stock_worker(connection)
    claimed = leased(server.url, worker, lambda leases, _: leases.claim(8))
    assert [lease.job_id for lease in claimed.leases] == ["job0", "job1"]


async def claimed(leases: Leases, wants: Sequence[tuple[int, int]]) -> list[list[str]]:
    """The jobs of claims that want so many requests, and call so many modest."""
    made = [await leases.claim(want, held=1, modest=modest) for want, modest in wants]
    return [[lease.job_id for lease in claim.leases] for claim in made]


def test_a_worker_keeps_to_its_lane_and_takes_another_s_only_for_want_of_work(connection, server):
    for number in range(8):
        job = enqueue(connection, job_id=f"job{number}")
        connection.hset(job.key, "lane", f"run/{number % 2}")
    worker = stock_worker(connection)
    take = lambda leases, _: claimed(leases, [(2, 1), (1, 1)])  # noqa: E731
    assert leased(server.url, worker, take) == [["job0", "job2"], ["job4"]]
    take = lambda leases, _: claimed(leases, [(3, 1), (2, 2), (1, 2), (1, 0), (9, 1)])  # noqa: E731
    assert leased(server.url, worker, take) == [
        ["job1", "job3", "job5"],
        ["job7"],
        [],  # what is left is the other's
        ["job6"],
        [],
    ]
    assert connection.llen(f"rq:queue:{QUEUE}") == 0


def test_another_run_has_lanes_of_its_own(connection, server):
    lanes = ["old/0", "new/0", "new/1", "new/0", "new/1", "new/0"]
    for number, lane in enumerate(lanes):
        connection.hset(enqueue(connection, job_id=f"job{number}").key, "lane", lane)

    take = lambda leases, _: claimed(leases, [(1, 0), (1, 1), (1, 0), (2, 2)])  # noqa: E731
    assert leased(server.url, stock_worker(connection), take) == [
        ["job0"],
        [],
        ["job1"],
        ["job3", "job5"],
    ]


def test_a_job_without_a_lane_comes_in_its_turn(connection, server):
    for number, lane in enumerate(["run/0", "run/1", None, "run/0"]):
        job = enqueue(connection, job_id=f"job{number}")
        if lane is not None:
            connection.hset(job.key, "lane", lane)
    connection.sadd("rq:job:job1x", "somebody's")
    connection.rpush(f"rq:queue:{QUEUE}", "job1x")

    async def claims(leases) -> list[str]:
        return [lease.job_id for _ in range(4) for lease in (await leases.claim(1)).leases]

    taken = leased(server.url, stock_worker(connection), lambda leases, _: claims(leases))
    assert taken == ["job0", "job3", "job1", "job2"]


def test_a_claim_whose_answer_was_lost_is_given_back(connection, server):
    enqueue(connection, job_id="known")
    enqueue(connection, job_id="unknown")
    worker = stock_worker(connection)
    claimed = leased(server.url, worker, lambda leases, _: leases.claim(8)).leases
    known = {claimed[0].execution_id}
    leased(server.url, worker, lambda leases, _: leases.release_unknown(known))
    assert connection.lrange(f"rq:queue:{QUEUE}", 0, -1) == [b"unknown"]
    assert connection.hget("rq:job:unknown", "status") == b"queued"
    assert connection.hget("rq:job:known", "status") == b"started"


def test_a_job_that_vanished_isnt_conjured_up(connection, server):
    enqueue(connection, job_id="one")
    worker = stock_worker(connection)
    lease = claim(server.url, worker)
    connection.delete("rq:job:one")
    assert finish(server.url, worker, lease, b"1") == 0
    beat = leased(server.url, worker, lambda leases, _: leases.renew([lease], "busy"))
    assert beat.lost == {lease.execution_id: ""}
    assert not connection.exists("rq:job:one")
    assert connection.zcard(f"rq:wip:{QUEUE}") == 0


BESIDE = ("rq:executions:one", "rq:results:one", f"rq:finished:{QUEUE}")
"""Keys of RQ's that stand beside a job's."""


@pytest.mark.parametrize("place", BESIDE)
@pytest.mark.parametrize("result_ttl", [60, -1, 0])
def test_a_key_of_another_type_beside_a_job_keeps_it_from_no_end(
    connection, server, place, result_ttl
):
    enqueue(connection, job_id="one", result_ttl=result_ttl)
    worker = stock_worker(connection)
    lease = claim(server.url, worker)
    connection.delete(place)
    connection.set(place, "somebody's")
    beat = leased(server.url, worker, lambda leases, _: leases.renew([lease], "busy"))
    assert beat.lost == {}
    assert finish(server.url, worker, lease, b"1") == 1
    status = connection.hget("rq:job:one", "status")
    assert status == (b"finished" if result_ttl else None)
    assert connection.zcard(f"rq:wip:{QUEUE}") == 0
    # as it was, and for as long as it was meant to be
    assert (connection.get(place), connection.ttl(place)) == (b"somebody's", -1)


def test_a_key_of_another_type_beside_a_job_lets_it_be_given_back(connection, server):
    enqueue(connection, job_id="one")
    worker = stock_worker(connection)
    lease = claim(server.url, worker)
    connection.delete("rq:executions:one")
    connection.set("rq:executions:one", "somebody's")
    release = lambda leases, scripts: scripts.call(leases.releasing(lease))  # noqa: E731
    assert leased(server.url, worker, release) == 1
    assert connection.lrange(f"rq:queue:{QUEUE}", 0, -1) == [b"one"]
    assert Job.fetch("one", connection, serializer="json").is_queued
    assert connection.get("rq:executions:one") == b"somebody's"


def test_what_is_no_job_any_more_is_neither_given_back_nor_touched(connection, server):
    enqueue(connection, job_id="one")
    worker = stock_worker(connection)
    lease = claim(server.url, worker)
    connection.set("rq:job:one", "somebody's")
    release = lambda leases, scripts: scripts.call(leases.releasing(lease))  # noqa: E731
    assert leased(server.url, worker, release) == 0
    assert connection.llen(f"rq:queue:{QUEUE}") == 0
    assert connection.zcard(f"rq:wip:{QUEUE}") == 0
    assert connection.get("rq:job:one") == b"somebody's"
