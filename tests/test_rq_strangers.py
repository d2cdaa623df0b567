"""A stock RQ worker on our queue: it can't run our jobs, so those it takes are given to ours."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import redis
from kits.worker_kit import until, workers

from queue_api.client.client import Client
from queue_api.connection.child_process import child_environment
from queue_api.connection.settings import QueueSettings
from queue_api.wire.schemas import GenerationResult

IMPORTABLE = "import sys, types\nsys.modules['batchmill'].generate = lambda **_: 'not ours'\n"
STOCK = """
from redis import Redis
from rq import Queue, SimpleWorker
connection = Redis.from_url(sys.argv[1])
queue = Queue("batchmill", connection=connection, serializer=sys.argv[2])
SimpleWorker([queue], connection=connection, serializer=sys.argv[2]).work()
"""
START = {
    "that expects pickles": ("pickle", "import sys\n"),
    "that finds no such function": ("json", "import sys\n"),
    "that finds one": ("json", "import batchmill\n" + IMPORTABLE),
}

Start = Callable[[str], "subprocess.Popen[bytes]"]


@pytest.fixture
def start_stock(server, connection) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def start(kind: str) -> subprocess.Popen[bytes]:
        serializer, first = START[kind]
        known = len(workers(connection))
        command = [sys.executable, "-P", "-c", first + STOCK, server.url, serializer]
        started.append(
            subprocess.Popen(command, env=child_environment(), stderr=subprocess.DEVNULL)
        )
        until(lambda: len(workers(connection)) > known)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


async def read(settings: QueueSettings, run: str) -> list[GenerationResult]:
    """As somebody who didn't submit it, and hasn't its requests."""
    async with Client(settings=settings) as client:
        return [result async for result in client.run(run).results()]


@pytest.mark.parametrize("kind", START)
@pytest.mark.parametrize("retries", [0, 2])
def test_what_it_takes_comes_to_ours(
    server, connection, settings, start_worker, start_stock, kind, retries
):
    settings = settings.model_copy(update={"chunk_size": 4, "retries": retries})

    async def main() -> list[GenerationResult]:
        async with Client(settings=settings) as client:
            await client.submit([f"w{i} x" for i in range(80)], "run")
        ended = "rq:finished:batchmill" if kind == "that finds one" else "rq:failed:batchmill"
        await asyncio.to_thread(until, lambda: connection.zcard(ended) >= 5)
        worker = await asyncio.to_thread(start_worker)
        await asyncio.to_thread(until, lambda: "isn't batchmill's" in worker.said())
        return await read(settings, "run")

    start_stock(kind)
    found = asyncio.run(asyncio.wait_for(main(), 60))
    assert sorted(result.index for result in found) == list(range(80))
    assert {(result.ok, result.attempt) for result in found} == {(True, 1)}


def num_looks(connection: redis.Redis) -> int:
    """How often a job was looked for on a list."""
    return int(connection.info("commandstats").get("cmdstat_lpos", {}).get("calls", 0))


def test_what_it_took_waits_for_one_of_ours(
    server, connection, settings, start_worker, start_stock
):
    stock = start_stock("that finds no such function")

    async def main() -> GenerationResult:
        async with Client(settings=settings) as client:
            asking = asyncio.create_task(client.generate("hello you", max_tokens=2))
            # nor is it taken for lost while it does
            await asyncio.to_thread(until, lambda: connection.llen("batchmill:strays:batchmill"))
            swept = num_looks(connection)

            await asyncio.to_thread(until, lambda: num_looks(connection) > swept + 5)
            stock.kill()
            await asyncio.to_thread(start_worker)
            return await asking

    result = asyncio.run(asyncio.wait_for(main(), 60))
    assert (result.text, result.attempt) == ("hello you", 1)


def test_a_stray_that_is_cancelled_isn_t_run(
    server, connection, settings, start_worker, start_stock
):
    stock = start_stock("that finds no such function")

    async def main() -> list[str]:
        async with Client(settings=settings) as client:
            run = await client.submit(["hello you"], "run")
            reading = asyncio.create_task(read(settings, "run"))
            await asyncio.to_thread(until, lambda: connection.llen("batchmill:strays:batchmill"))
            stock.kill()
            assert await run.cancel() == 1
            await asyncio.to_thread(start_worker)
            after = await client.generate("after you", max_tokens=2)
            return [*(result.finish_reason for result in await reading), after.text]

    assert asyncio.run(asyncio.wait_for(main(), 60)) == ["cancelled", "after you"]
    assert connection.llen("batchmill:strays:batchmill") == 0
