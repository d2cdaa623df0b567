"""Every request ends with exactly one result, whoever dies when."""

from __future__ import annotations

import asyncio
import re
import signal

import pytest
from kits.worker_kit import (
    QUEUE,
    SERVE,
    WorkerProcess,
    completed,
    num_done,
    results,
    status,
    submit,
    until,
    written,
)
from rq import Queue
from rq.job import Job

from queue_api.connection.settings import QueueSettings
from queue_api.store.enqueue import JobTemplate
from queue_api.store.jobs import request_json
from queue_api.store.keys import RunKeys
from queue_api.store.scripts import load_script
from queue_api.wire.schemas import FinishReason, GenerationRequest
from workers.claim.doorbell import Doorbell

pytestmark = pytest.mark.servers

SLOW = "echo:tokens=200,step_s=0.01"
"""Two seconds a request."""


def held_by(worker: str) -> str:
    """The set of what RQ knows a worker to run."""
    return f"rq:worker:{worker}:executions"


def test_a_run_gets_one_result_per_request(connection, start_worker):
    start_worker()
    jobs = submit(connection, "run", [f"word{i} and more" for i in range(100)])
    for i, result in enumerate(completed(connection, "run", 100)):
        assert (result.id, result.text) == (f"id-{i}", f"word{i} and")
        assert (result.model, result.attempt, result.ok) == ("echo:tokens=2", 1, True)
        parts = result.timings
        total_s = parts.queue_s + parts.prefill_s + parts.decode_s + parts.publish_s
        assert parts.total_s == pytest.approx(total_s)
    until(lambda: {status(connection, job) for job in jobs} == {"finished"})


def test_a_killed_workers_jobs_are_finished_by_the_other(connection, start_worker):
    model = "echo:tokens=5,step_s=0.1"
    victim = start_worker(model, lease_s=1, max_num_seqs=8, name="victim")
    start_worker(model, lease_s=1, max_num_seqs=8)
    submit(connection, "run", [f"w{i} x" for i in range(200)])
    until(lambda: num_done(connection, "run") > 20 and connection.scard(held_by("victim")))
    victim.send(signal.SIGKILL)
    found = completed(connection, "run", 200)
    assert len({result.worker for result in found}) == 2
    assert max(result.attempt for result in found) == 2
    assert [result.text for result in found] == [f"w{i} x w{i} x w{i}" for i in range(200)]


def test_drain_finishes_what_it_holds(connection, start_worker):
    worker = start_worker("echo:tokens=20,step_s=0.02")
    jobs = submit(connection, "run", ["a b"] * 16)
    until(lambda: {status(connection, job) for job in jobs} == {"started"})
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    assert num_done(connection, "run") == 16
    assert {status(connection, job) for job in jobs} == {"finished"}


def test_a_worker_s_log_ends_with_its_prefix_hit_rate(connection, start_worker):
    worker = start_worker("demo")
    submit(connection, "run", [" ".join(["two and two make four"] * 4)] * 4, max_tokens=4)
    results = completed(connection, "run", 4)
    assert all(result.ok for result in results), results[0]
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    (rate,) = re.findall(r"prompt tokens, (.*)% of them from the prefix", worker.log.read_text())
    assert 50 < float(rate) < 75  # three of four, all but their last token


def test_a_drain_amid_a_long_step_ends_well(server, connection, tmp_path):
    # the step goes on while the worker gives up asking for the texts so far, and ends soon after
    script = f"import workers.service; workers.service.GOODBYE_S = 3.0\n{SERVE}"
    model = "echo:tokens=2,step_s=5"
    worker = WorkerProcess(server.url, tmp_path / "log", model, script, drain_grace_s=0)
    job_ids = submit(connection, "run", ["a b", "c d"], chunk_size=1)
    until(lambda: status(connection, job_ids[0]) == "started")
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    assert "Exception" not in worker.said()
    assert connection.lrange("rq:queue:batchmill", 0, -1) == [b"run-0", b"run-1"]


def test_drain_gives_the_rest_back_without_spending_a_retry(connection, start_worker):
    worker = start_worker(SLOW, drain_grace_s=0, capacity=8)
    jobs = submit(connection, "run", ["a b"] * 24)
    until(lambda: status(connection, jobs[0]) == "started")
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    assert connection.lrange(f"rq:queue:{QUEUE}", 0, -1) == [job.encode() for job in jobs]
    assert Job.fetch(jobs[0], connection, serializer="json").retries_left == 3
    start_worker()
    assert {result.attempt for result in completed(connection, "run", 24)} == {1}


def test_whoever_waits_for_work_is_told_that_nobody_listens_any_more():
    async def main():
        doorbell = Doorbell(None, ["rq:queue:batchmill"], 1.0)  # listening there fails, oddly
        with pytest.raises(AttributeError):
            await asyncio.wait_for(doorbell.wait(), 20)
        await doorbell.close()

    asyncio.run(main())


def test_a_second_signal_ends_the_grace(connection, start_worker):
    worker = start_worker(SLOW, drain_grace_s=600)
    jobs = submit(connection, "run", ["a b"] * 8)
    until(lambda: status(connection, jobs[0]) == "started")
    worker.send(signal.SIGINT)
    until(lambda: "draining" in worker.said())
    worker.send(signal.SIGINT)
    assert worker.wait() == 0
    assert status(connection, jobs[0]) == "queued"


def test_a_restarted_redis_finds_workers_that_went_on(connection, server, start_worker):
    start_worker("echo:tokens=5,step_s=0.02", max_num_seqs=8)
    submit(connection, "run", [f"w{i} x" for i in range(200)])
    written(connection)
    until(lambda: num_done(connection, "run") > 20)
    server.restart(kill=True)
    found = completed(connection, "run", 200)
    assert {result.ok for result in found} == {True}


def test_a_chunk_run_again_leaves_out_what_is_done(connection, start_worker):
    submit(connection, "run", ["a b", "c d", "e f"])
    connection.setbit(RunKeys.of("run").done, 1, 1)
    connection.hincrby("rq:job:run-0", "claims", 1)
    start_worker()
    until(lambda: status(connection, "run-0") == "finished")
    assert num_done(connection, "run") == 2


def test_a_failed_engine_gives_its_work_back(connection, start_worker):
    worker = start_worker("echo:marked=poison,on_marked=raise")
    jobs = submit(connection, "run", ["fine", "poison"])
    assert worker.wait() == 1
    assert status(connection, jobs[0]) == "queued"
    assert "poison" in worker.said()


def test_a_bad_request_is_an_error_result_and_hurts_no_other(connection, start_worker):
    template = JobTemplate(connection, QUEUE, QueueSettings())
    items = [[0, {"id": "good", "prompt": "a b"}], [1, {"id": "bad", "promt": "a b"}]]
    items += [[2, {"id": "long", "prompt": "a " * 5000}], [3, 17]]
    connection.hset(RunKeys.of("run").hash, mapping={"queue": QUEUE, "total": 4})
    job = template.queue.enqueue("batchmill.generate", run="run", requests=items)
    start_worker()
    good, bad, long, odd = completed(connection, "run", 4)
    assert good.ok and good.id == "good"
    assert (bad.id, bad.error.code) == ("bad", "invalid_request")
    assert "promt" in bad.error.message
    assert (long.id, long.error.code) == ("long", "prompt_too_long")
    assert (odd.finish_reason, odd.id) == (FinishReason.ERROR, f"{job.id}-3")
    until(lambda: status(connection, job.id) == "finished")


@pytest.mark.parametrize(
    ("serializer", "function", "reason"),
    [
        ("json", "os.system", "isn't served"),
        ("pickle", "batchmill.generate", "isn't JSON"),
    ],
)
def test_a_job_that_cant_be_read_is_dead_lettered_alone(
    connection, start_worker, serializer, function, reason
):
    bad = Queue(QUEUE, connection=connection, serializer=serializer).enqueue(function, "true")
    good = Queue(QUEUE, connection=connection, serializer="json").enqueue(
        "batchmill.generate", "a b"
    )
    start_worker()
    until(lambda: status(connection, good.id) == "finished")
    until(lambda: connection.zscore(f"rq:failed:{QUEUE}", bad.id))
    assert reason in bad.latest_result().exc_string


def test_a_cancelled_job_ends_with_cancelled_results(connection, start_worker):
    start_worker(SLOW, lease_s=2)
    jobs = submit(connection, "run", ["a b"] * 8)
    until(lambda: status(connection, jobs[0]) == "started")
    Job.fetch(jobs[0], connection, serializer="json").cancel()
    found = completed(connection, "run", 8)
    assert {result.finish_reason for result in found} == {FinishReason.CANCELLED}


def test_a_cancelled_run_isnt_generated(connection, start_worker):
    jobs = submit(connection, "run", ["a b"] * 16)
    connection.hset(RunKeys.of("run").hash, "cancelled", 1)
    start_worker(SLOW)
    found = completed(connection, "run", 16)
    assert {result.finish_reason for result in found} == {FinishReason.CANCELLED}
    until(lambda: {status(connection, job) for job in jobs} == {"finished"})


def test_a_cancelled_request_leaves_its_chunk(connection, start_worker):
    start_worker("echo:tokens=10000,step_s=0.01")
    submit(connection, "run", ["a b", "c d"], max_tokens=10_000)
    until(lambda: status(connection, "run-0") == "started")
    # as a client does it: the result is given in the worker's stead
    for index in (0, 1):
        connection.setbit(RunKeys.of("run").done, index, 1)
    until(lambda: status(connection, "run-0") == "finished")
    assert num_done(connection, "run") == 0


def test_a_worker_stopped_past_its_lease_changes_nothing_when_it_goes_on(connection, start_worker):
    model = "echo:tokens=20,step_s=0.01"
    sleeper = start_worker(model, lease_s=1, name="sleeper")
    submit(connection, "run", ["a b"] * 32, retries=0)
    until(lambda: num_done(connection, "run") == 0 and status(connection, "run-0") == "started")
    sleeper.send(signal.SIGSTOP)
    start_worker(model, lease_s=1, name="heir")
    found = completed(connection, "run", 32)
    sleeper.send(signal.SIGCONT)
    until(lambda: "lease was lost" in sleeper.said() or "isn't ours any more" in sleeper.said())
    assert num_done(connection, "run") == 32
    assert "heir" in {result.worker for result in found}
    sleeper.send(signal.SIGTERM)
    assert sleeper.wait() == 0


def test_a_redis_out_of_memory_delays_but_loses_nothing(connection, start_worker):
    # so much that most is still to come when there is no more room, however late we are
    worker = start_worker("echo:tokens=5,step_s=0.1", max_num_seqs=8)
    submit(connection, "run", [f"w{i} x" for i in range(300)])
    until(lambda: num_done(connection, "run") > 0)
    connection.config_set("maxmemory", "1mb")
    until(lambda: "takes no writes" in worker.said() or "couldn't be renewed" in worker.said())
    connection.config_set("maxmemory", "0")
    assert {result.ok for result in completed(connection, "run", 300)} == {True}
    assert worker.process.poll() is None


def test_an_outage_longer_than_the_lease_costs_nobody_a_death(connection, server, start_worker):
    settings = {"lease_s": 2, "max_num_seqs": 16}
    worker = start_worker("echo:tokens=40,step_s=0.1", **settings)
    start_worker("echo:tokens=40,step_s=0.1", **settings)
    submit(connection, "run", [f"w{i} x" for i in range(32)])
    until(lambda: status(connection, "run-3") == "started")
    server.stop()
    until(lambda: worker.said().count("leases couldn't be renewed") > 6)
    server.start()
    found = completed(connection, "run", 32)
    assert {(result.ok, result.attempt) for result in found} == {(True, 1)}


def test_a_result_that_redis_lost_is_made_again(connection, start_worker):
    """Acknowledged while its job still ran, then lost in a crash of Redis; the job wasn't."""
    start_worker("echo:tokens=100,step_s=0.01", max_num_seqs=1, capacity=1)
    template = JobTemplate(connection, QUEUE, QueueSettings())
    keys = RunKeys.of("run")
    connection.hset(keys.hash, mapping={"queue": QUEUE, "total": 2, "chunk_size": 2})
    requests = [
        GenerationRequest(id=f"id-{i}", prompt=f"w{i}", sampling={"max_tokens": n})
        for i, n in enumerate([1, 100])
    ]
    items = [(i, request_json(request)) for i, request in enumerate(requests)]
    call = template.call("run-0", "run", items)
    assert connection.register_script(load_script("enqueue"))(call.keys, call.args) == 1
    until(lambda: num_done(connection, "run") == 1)
    with connection.pipeline() as crash:
        crash.delete(keys.results, keys.done)
        crash.hset(keys.hash, "done", 0)
        crash.execute()
    assert [result.text.split()[0] for result in completed(connection, "run", 2)] == ["w0", "w1"]
    until(lambda: status(connection, "run-0") == "finished")
    assert connection.hget(keys.hash, "done") == b"2"


def test_one_result_that_redis_lost_among_many_is_made_again(connection, start_worker):
    start_worker("echo:tokens=300,step_s=0.01", max_num_seqs=1)
    template = JobTemplate(connection, QUEUE, QueueSettings())
    keys = RunKeys.of("run")
    connection.hset(keys.hash, mapping={"queue": QUEUE, "total": 40, "chunk_size": 40})
    requests = [
        GenerationRequest(id=f"id-{i}", prompt="w", sampling={"max_tokens": n})
        for i, n in enumerate([1] * 39 + [300])
    ]
    items = [(i, request_json(request)) for i, request in enumerate(requests)]
    call = template.call("run-0", "run", items)
    assert connection.register_script(load_script("enqueue"))(call.keys, call.args) == 1
    until(lambda: num_done(connection, "run") == 39)
    connection.setbit(keys.done, 33, 0)
    until(lambda: status(connection, "run-0") == "finished")
    assert sorted(result.index for result in results(connection, "run")) == sorted([*range(40), 33])
