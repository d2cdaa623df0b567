"""A Redis whose memory is full takes no results: what there is is kept, and no more is begun."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import redis
from kits.client_kit import Answerer
from kits.faults import out_of_memory
from kits.servers import KINDS, server_of
from kits.worker_kit import WorkerProcess, completed, num_done, submit, until

from queue_api.client.client import Client
from queue_api.connection.embedded import EmbeddedRedis
from queue_api.connection.settings import QueueSettings
from queue_api.store.keys import RunKeys
from queue_api.wire.errors import RedisServerError

CAPACITY, CHUNK = 16, 8
HELD = "rq:wip:batchmill"


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(binary=server_of(request.param)) as running:
        yield running


def refusals(connection: redis.Redis) -> int:
    """How often the server has refused something; 6.2 doesn't count what scripts are refused."""
    return sum(int(stats["count"]) for stats in connection.info("errorstats").values())


def calls(connection: redis.Redis) -> int:
    """How many scripts it was sent."""
    return int(connection.info("commandstats")["cmdstat_evalsha"]["calls"])


def test_a_worker_keeps_its_results_and_takes_no_more_than_it_may_hold(
    server, connection, start_worker
):
    worker = start_worker(
        "echo:tokens=10,step_s=0.02", max_num_seqs=8, capacity=CAPACITY, lease_s=2
    )
    total = 240
    submit(connection, "run", [f"w{i} x" for i in range(total)], chunk_size=CHUNK)
    until(lambda: num_done(connection, "run") > 20)
    with out_of_memory(server, connection):
        said = "takes no writes", "no claim"
        refused = lambda: sum(map(worker.said().count, said))  # noqa: E731
        until(lambda: refused() >= 2)
        before, held = calls(connection), connection.zrange(HELD, 0, -1)
        # twice the lease
        until(lambda: refused() >= 12)
        assert calls(connection) - before < 300
        leases = connection.zrange(HELD, 0, -1, withscores=True)
        assert {job for job, _ in leases} <= set(held)  # one that has its results may end
        # with what was just done and on its way when there was no more room
        assert len(leases) * CHUNK <= 2 * CAPACITY
        assert all(end > connection.time()[0] for _, end in leases)
    found = completed(connection, "run", total)
    assert {(result.ok, result.attempt) for result in found} == {(True, 1)}
    assert "lost results" not in worker.said() and "CRITICAL" not in worker.said()


def test_a_worker_that_starts_waits_for_room(server, connection, tmp_path):
    submit(connection, "run", ["a b"] * 4)
    with out_of_memory(server, connection):
        worker = WorkerProcess(server.url, tmp_path / "worker.log")
        until(lambda: "Redis is away" in worker.said() or worker.process.poll() is not None)
    try:
        completed(connection, "run", 4)
        worker.process.terminate()
        assert worker.wait() == 0
    finally:
        worker.kill()


def test_a_waiting_call_waits_on(server, connection):
    # it isn't patience with commands that lets it
    settings = QueueSettings(redis_url=server.url, reconcile_s=0.05, reconnect_s=0.5)

    async def main() -> str:
        async with Client(settings=settings) as client:
            asking = asyncio.create_task(client.generate("hello"))
            await asyncio.to_thread(until, lambda: connection.llen("rq:queue:batchmill"))
            before = refusals(connection)
            with out_of_memory(server, connection):
                await asyncio.to_thread(until, lambda: refusals(connection) > before + 20)
                assert not asking.done()
            Answerer(connection).answer()
            return (await asking).text

    assert asyncio.run(asyncio.wait_for(main(), 60)) == "answer to hello"


def test_nothing_is_enqueued_beyond_its_memory(server, connection):
    settings = QueueSettings(redis_url=server.url, reconnect_s=0)

    async def main() -> None:
        async with Client(settings=settings) as client:
            await client.submit(["a"], "run", queue="other")
            call = client.store.template("batchmill").call("run-1", "run", [(1, b"{}")])
            with out_of_memory(server, connection):
                with pytest.raises(RedisServerError, match="out of memory") as refused:
                    await client.store.enqueue([call])
                assert refused.value.may_pass
            assert connection.llen("rq:queue:batchmill") == 0
            assert await client.store.enqueue([call]) == [1]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_results_are_read_and_trimmed_while_it_is_full(server, connection):
    settings = QueueSettings(redis_url=server.url, reconcile_s=0.05, reconnect_s=0.5)

    async def main() -> None:
        async with Client(settings=settings) as client:
            for run in ("waits", "run"):
                await client.submit(["a", "b"], run, queue=run)
            Answerer(connection).answer(queue="run")
            # its reader is blocked, and can't be told of the other run
            waiting = asyncio.create_task(anext(client.run("waits").results()))
            await asyncio.to_thread(until, lambda: connection.info("clients")["blocked_clients"])
            with out_of_memory(server, connection):
                texts = [result.text async for result in client.run("run").results()]
                assert texts == ["answer to a", "answer to b"]
                (last,) = connection.xrevrange(RunKeys.of("run").results, count=1)
                await client.store.trim("run", last[0].decode())
                assert connection.xlen(RunKeys.of("run").results) == 0
            Answerer(connection).answer(queue="waits")
            assert (await waiting).text == "answer to a"

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_client_closes_without_waiting_for_room(server, connection):
    settings = QueueSettings(redis_url=server.url, reconnect_s=300)

    async def main() -> None:
        async with Client(settings=settings) as client:
            asking = asyncio.create_task(client.generate("hello"))
            await asyncio.to_thread(until, lambda: connection.llen("rq:queue:batchmill"))
            connection.config_set("maxmemory", 1)
        await asyncio.gather(asking, return_exceptions=True)

    try:
        asyncio.run(asyncio.wait_for(main(), 60))
    finally:
        connection.config_set("maxmemory", 0)
