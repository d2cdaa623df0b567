"""Sentinel addresses: read, followed to the primary, and followed again when it dies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from kits.sentinel_kit import SentinelGroup
from kits.worker_kit import WorkerProcess, completed, num_done, until, workers

from queue_api.client.client import Client
from queue_api.connection.address import safe_url
from queue_api.connection.connect import check_server, connect, connect_async
from queue_api.connection.failures import friendly
from queue_api.connection.sentinel import SentinelAddress
from queue_api.connection.settings import QueueSettings
from queue_api.wire.errors import ConfigurationError, RedisUnavailableError
from queue_api.wire.schemas import ErrorDetail, GenerationResult

pytestmark = pytest.mark.servers


@pytest.fixture
def group(tmp_path: Path) -> Iterator[SentinelGroup]:
    with SentinelGroup(tmp_path) as running:
        yield running


def test_an_address_of_sentinels_is_read() -> None:
    url = "redis+sentinel://user:p%40ss@one:1,[::1]:2,three/orders/5?sentinel_password=s&db_x=1"
    address = SentinelAddress.parse(url)
    assert address.sentinels == (("one", 1), ("::1", 2), ("three", 26379))
    assert address.service == "orders"
    servers = {"username": "user", "password": "p@ss", "db": 5, "db_x": "1"}
    assert address.server_options == servers
    assert address.sentinel_options == {"password": "s"}
    assert safe_url(url).count("***") == 2 and "p%40ss" not in safe_url(url)


def test_a_bare_address_of_sentinels_has_the_usual_service() -> None:
    address = SentinelAddress.parse("redis+sentinel://one")
    assert (address.sentinels, address.service) == ((("one", 26379),), "mymaster")
    assert address.server_options == {} and not address.is_tls


def test_tls_is_for_servers_and_sentinels() -> None:
    address = SentinelAddress.parse("rediss+sentinel://one/s/0?ssl_ca_certs=/etc/ca.pem")
    assert address.is_tls
    assert address.sentinel_options == {"ssl": True, "ssl_ca_certs": "/etc/ca.pem"}
    assert address.server_options == {"ssl_ca_certs": "/etc/ca.pem", "db": 0}


@pytest.mark.parametrize(
    "url",
    ["redis+sentinel://", "redis+sentinel://h:port/s", "redis+sentinel://h/s/x", "redis+sentinel:"],
)
def test_an_address_of_sentinels_that_cant_be_read_is_told(url: str) -> None:
    for open_it in (connect, connect_async):
        with pytest.raises(ConfigurationError, match="isn't a Redis URL"):
            open_it(url)


def test_sentinels_that_dont_answer_are_told_without_the_password() -> None:
    url = "redis+sentinel://:s3cret@127.0.0.1:1/mymaster"
    with pytest.raises(redis.ConnectionError) as lost:
        connect(url).ping()
    told = friendly(lost.value, url)
    assert isinstance(told, RedisUnavailableError)
    assert "mymaster" in str(told) and "s3cret" not in str(told)


def test_clients_find_the_primary_and_the_next_one(group: SentinelGroup) -> None:
    """With one pool each, as connections break and Sentinel changes its mind."""
    sync, first = connect(group.url), group.primary
    assert check_server(sync).persistence.startswith("AOF on")

    async def main() -> None:
        client = connect_async(group.url)
        await client.set("key", "kept")
        replica = connect(f"redis://127.0.0.1:{group.servers[1]}")
        await asyncio.to_thread(until, lambda: replica.get("key") == b"kept")
        replica.close()
        group.kill(first)
        await asyncio.to_thread(until, lambda: group.primary != first)
        await asyncio.to_thread(until, lambda: group.info(group.primary).get("role") == "master")
        for _ in range(2):
            assert await _patiently(client) == b"kept"
        assert await client.set("key", "new")
        await client.aclose()

    asyncio.run(main())
    assert sync.get("key") == b"new"
    sync.close()


async def _patiently(client: redis.asyncio.Redis) -> bytes:
    while True:
        try:
            return await client.get("key")
        except redis.ConnectionError:
            await asyncio.sleep(0.05)


@pytest.mark.slow
def test_who_waits_on_a_primary_that_steps_down_waits_on(group: SentinelGroup) -> None:
    settings = QueueSettings(redis_url=group.url)
    sync = connect(group.url)

    async def main() -> list[str]:
        async with Client(settings=settings) as client:
            await client.submit(["hello"], "run")
            reading = asyncio.create_task(_texts(client))
            await asyncio.to_thread(until, lambda: _is_anyone_blocked(sync))
            await asyncio.to_thread(group.switch)
            result = GenerationResult.failed("0", ErrorDetail(code="x", message="x"), run="run")
            await client.store.emit("run", [result.model_copy(update={"index": 0, "text": "bye"})])
            return await reading

    assert asyncio.run(asyncio.wait_for(main(), 60)) == ["bye"]
    sync.close()


async def _texts(client: Client) -> list[str]:
    return [result.text async for result in client.run("run").results()]


def _is_anyone_blocked(connection: redis.Redis) -> bool:
    return int(connection.info("clients")["blocked_clients"]) > 0


def test_a_wait_that_a_new_role_ends_counts_as_a_lost_connection(group: SentinelGroup) -> None:
    sync, primary = connect(group.url), connect(f"redis://127.0.0.1:{group.primary}")
    waiting = sync.connection_pool.get_connection()
    waiting.send_command("BLPOP", "nothing", 0)
    until(lambda: _is_anyone_blocked(primary))
    primary.replicaof("127.0.0.1", "1")
    with pytest.raises(redis.ConnectionError, match="UNBLOCKED"):
        waiting.read_response()
    sync.connection_pool.release(waiting)
    sync.close()
    primary.close()


def test_a_primary_without_enough_replicas_counts_as_away(group: SentinelGroup) -> None:
    sync = connect(group.url)
    sync.config_set("min-replicas-to-write", 2)
    with pytest.raises(redis.ConnectionError, match="NOREPLICAS"):
        sync.set("key", "value")
    with pytest.raises(redis.ConnectionError, match="NOREPLICAS"):
        sync.eval("return redis.call('SET', KEYS[1], 'value')", 1, "key")
    sync.config_set("min-replicas-to-write", 1)

    def is_written() -> bool:  # on a busy machine the replica's last word may be too old as well
        with suppress(redis.ConnectionError):
            return bool(sync.set("key", "value"))
        return False

    until(is_written)
    sync.close()


def test_a_run_outlives_its_primary(group: SentinelGroup, tmp_path: Path) -> None:
    total, first = 200, group.primary
    prompts = [f"number{i}" for i in range(total)]
    settings = QueueSettings(redis_url=group.url, chunk_size=4)
    model = "echo:tokens=10,step_s=0.01,max_num_seqs=8"
    worker = WorkerProcess(group.url, tmp_path / "worker.log", model, lease_s=2, max_num_seqs=8)
    sync = connect(group.url)

    async def read(client: Client) -> list[GenerationResult]:
        return [result async for result in client.run("run").results()]

    async def main() -> list[GenerationResult]:
        async with Client(settings=settings) as client:
            await client.submit(prompts, "run")
            reading = asyncio.create_task(read(client))
            await asyncio.to_thread(until, lambda: num_done(sync, "run") > total // 8)
            assert num_done(sync, "run") < total
            await asyncio.to_thread(group.kill, first)
            await asyncio.to_thread(until, lambda: group.primary != first)
            # what the dead server hadn't yet told its replica comes back with this
            await client.submit(prompts, "run")
            return await reading

    try:
        until(lambda: workers(sync) or worker.process.poll() is not None)
        told = asyncio.run(asyncio.wait_for(main(), 60))
        assert worker.process.poll() is None
        assert sorted(result.index for result in told) == list(range(total))
        kept = completed(sync, "run", total)
        assert [result.text for result in kept] == [" ".join([text] * 10) for text in prompts]
    finally:
        worker.kill()
        sync.close()
