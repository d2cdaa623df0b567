"""A server that stands still, or has become a replica: what workers make of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from kits.faults import no_replicas
from kits.worker_kit import (
    QUEUE,
    SERVE,
    WorkerProcess,
    completed,
    num_done,
    status,
    submit,
    until,
    workers,
)
from rq import Queue

from queue_api.connection.child_process import child_environment, python_module
from queue_api.connection.connect import connect
from queue_api.connection.embedded import EmbeddedRedis
from queue_api.store.jobs import GENERATE

pytestmark = pytest.mark.servers
HASTY = "import workers.patience as p\np.REPLICA_PATIENCE_S = 1\n" + SERVE


def test_a_server_that_stood_still_past_the_leases_costs_nobody_a_death(
    connection, server, start_worker
):
    """It finds the requests of all that waited when it goes on, those for lapsed leases first."""
    settings = {"lease_s": 4, "max_num_seqs": 16}
    worker = start_worker("echo:tokens=80,step_s=0.1", **settings)
    start_worker("echo:tokens=80,step_s=0.1", **settings)
    submit(connection, "run", [f"w{i} x" for i in range(32)])
    until(lambda: status(connection, "run-3") == "started")
    os.kill(server.pid, signal.SIGSTOP)
    # a second's timeout and a second's pause each: longer than a lease
    until(lambda: worker.said().count("leases couldn't be renewed") >= 3)
    os.kill(server.pid, signal.SIGCONT)
    found = completed(connection, "run", 32)
    assert {(result.ok, result.attempt) for result in found} == {(True, 1)}
    assert "abandoned jobs" not in worker.said()


def test_a_worker_follows_its_address_to_another_server(connection, server, tmp_path: Path):
    """As when a name leads to the new primary, and the old one goes on as its replica."""
    address = tmp_path / "redis.sock"
    address.symlink_to(server.url.removeprefix("unix://"))
    worker = WorkerProcess(f"unix://{address}", tmp_path / "worker.log", lease_s=4)
    try:
        until(lambda: workers(connection))
        submit(connection, "run", ["a b"] * 4)
        completed(connection, "run", 4)
        with EmbeddedRedis() as other:
            elsewhere = connect(other.url)
            address.unlink()
            address.symlink_to(other.url.removeprefix("unix://"))
            submit(elsewhere, "other", ["a b"] * 4)
            assert num_done(elsewhere, "other") == 0
            connection.replicaof("127.0.0.1", "1")
            completed(elsewhere, "other", 4)
            until(lambda: workers(elsewhere))
            worker.send(signal.SIGTERM)
            assert worker.wait() == 0
            elsewhere.close()
    finally:
        worker.kill()
        connection.replicaof("NO", "ONE")


def test_an_address_that_leads_to_a_replica_for_long_ends_the_worker(
    connection, server, tmp_path: Path
):
    worker = WorkerProcess(server.url, tmp_path / "worker.log", script=HASTY)
    try:
        until(lambda: workers(connection))
        connection.replicaof("127.0.0.1", "1")
        assert worker.wait() == 1
        assert "read-only replica" in worker.said() and "primary's address" in worker.said()
    finally:
        worker.kill()
        connection.replicaof("NO", "ONE")


def test_a_failure_that_rq_couldn_t_write_down_is_written_later(connection, server, start_worker):
    """RQ's handler logs what keeps it from that, and goes on as if it had."""
    worker = start_worker("echo:tokens=10000,step_s=0.01")
    queue = Queue(QUEUE, connection=connection, serializer="json")
    job = queue.enqueue(GENERATE, "a b", max_tokens=10_000, job_timeout=1)
    until(lambda: job.get_status() == "started")
    with no_replicas(server, connection):
        until(lambda: worker.said().count("failed to persist failure") >= 2)
    until(lambda: job.get_status() == "failed")
    assert "timeout of 1 s" in job.latest_result().exc_string
    assert connection.zscore(f"rq:failed:{QUEUE}", job.id)
    assert connection.hget(job.key, "deaths") is None
    after = queue.enqueue(GENERATE, "a b", max_tokens=2)
    until(lambda: after.get_status() == "finished")


def test_a_run_whose_worker_dies_while_redis_is_away_goes_on(tmp_path: Path):
    rows = [json.dumps({"prompt": f"row {i}"}) for i in range(400)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    answers, words = tmp_path / "out.jsonl", tmp_path / "words"
    with EmbeddedRedis() as own, words.open("w") as stderr:
        files = [str(tmp_path / "in.jsonl"), "-o", str(answers)]
        options = ["--model", "echo:tokens=8,step_s=0.05"]
        run = subprocess.Popen(
            python_module("batchmill", "run", *files, *options),
            env=child_environment({"BATCHMILL_REDIS_URL": own.url, "BATCHMILL_LEASE_S": "2"}),
            stderr=stderr,
        )
        try:
            with connect(own.url) as client:
                until(lambda: answers.exists() and answers.read_bytes().count(b"\n") > 20)
                (worker,) = workers(client)
            own.stop()
            os.kill(worker.pid, signal.SIGKILL)
            until(lambda: "ended with code 2" in words.read_text())
            own.start()
            assert run.wait(60) == 0, words.read_text()
        finally:
            run.kill()
    assert len(answers.read_text().splitlines()) == 400
