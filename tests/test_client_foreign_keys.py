"""Somebody's keys of other types where a producer's are: each costs its own job, if anything."""

from __future__ import annotations

import asyncio

import pytest
import redis
from kits.client_kit import Answerer, rq_job, rq_queue

from queue_api.client.client import Client
from queue_api.connection.settings import QueueSettings
from queue_api.store.reconcile import Reconciler
from queue_api.wire.errors import RedisServerError
from queue_api.wire.schemas import GenerationResult

pytestmark = pytest.mark.servers

PROMPTS = [f"prompt {i}" for i in range(10)]
JOB = "rq:job:r-1"  # of two requests, 2 and 3


async def read(client: Client, run: str) -> dict[int, GenerationResult]:
    return {result.index: result async for result in client.run(run).results()}


def test_a_batch_loses_the_one_job_whose_key_is_taken(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    connection.set(JOB, "somebody's")

    async def main() -> dict[int, GenerationResult]:
        async with Client(settings=settings) as client:
            requests = [{"id": f"id {i}", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
            await client.submit(requests, "r", chunk_size=2)
            async with answerer.answering():
                return await read(client, "r")

    found = asyncio.run(asyncio.wait_for(main(), 60))
    assert sorted(found) == list(range(10))
    assert [i for i in range(10) if not found[i].ok] == [2, 3]
    for index in (2, 3):
        error = found[index].error
        assert error is not None
        assert (found[index].id, error.code) == (f"id {index}", "job_key_taken")
        assert JOB in error.message
    assert connection.get(JOB) == b"somebody's"


def test_calls_of_the_same_moment_lose_the_one_whose_key_is_taken(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    async def main() -> list[GenerationResult]:
        async with Client(settings=settings) as client, answerer.answering():
            await client.generate("first")
            (first,) = connection.keys("rq:job:*-0")
            connection.set(first.removesuffix(b"-0") + b"-2", "somebody's")
            return await asyncio.gather(*(client.generate(f"call {i}") for i in range(1, 5)))

    results = asyncio.run(asyncio.wait_for(main(), 60))
    codes = [result.error and result.error.code for result in results]
    assert codes == [None, "job_key_taken", None, None]


def test_a_job_whose_key_is_taken_while_it_waits_is_told_of_alone(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    async def main() -> dict[int, GenerationResult]:
        async with Client(settings=settings) as client:
            await client.submit(iter(PROMPTS), "r", chunk_size=2)
            connection.lrem("rq:queue:batchmill", 1, "r-1")
            connection.delete(JOB)
            connection.set(JOB, "somebody's")
            rq_job(connection, "r-2").cancel()
            await Reconciler(client.store, "r").sweep()
            async with answerer.answering():
                return await read(client, "r")

    found = asyncio.run(asyncio.wait_for(main(), 60))
    codes = {i: error.code for i, r in found.items() if (error := r.error)}
    assert codes == {2: "job_lost", 3: "job_lost", 4: "cancelled", 5: "cancelled"}
    assert connection.get(JOB) == b"somebody's"


@pytest.mark.parametrize("place", [JOB, "rq:canceled:batchmill", "rq:failed:batchmill"])
def test_a_cancel_takes_back_all_other_jobs(
    settings: QueueSettings, connection: redis.Redis, place: str
) -> None:
    async def main() -> int:
        async with Client(settings=settings) as client:
            run = await client.submit(iter(PROMPTS), "r", chunk_size=2)
            connection.delete(place)
            connection.set(place, "somebody's")
            return await run.cancel()

    assert asyncio.run(main()) == 10
    assert rq_queue(connection).job_ids == (["r-1"] if place == JOB else [])
    others = [f"r-{i}" for i in range(5) if place != JOB or i != 1]
    assert all(rq_job(connection, job_id).is_canceled for job_id in others)
    assert connection.get(place) == b"somebody's"


def test_a_job_that_rq_cant_cancel_keeps_no_other_from_it(
    settings: QueueSettings, connection: redis.Redis
) -> None:
    async def main() -> int:
        async with Client(settings=settings) as client:
            run = await client.submit(iter(PROMPTS), "r", chunk_size=2)
            connection.hset("rq:job:r-0", "rate_limit_key", "k")  # left to RQ
            connection.set("rq:canceled:batchmill", "somebody's")
            return await run.cancel()

    assert asyncio.run(main()) == 10
    assert all(rq_job(connection, f"r-{i}").is_canceled for i in range(1, 5))


def test_registries_of_another_type_keep_no_job_from_its_queue(
    settings: QueueSettings, connection: redis.Redis, answerer: Answerer
) -> None:
    connection.set("rq:failed:batchmill", "somebody's")

    async def main() -> dict[int, GenerationResult]:
        async with Client(settings=settings) as client:
            await client.submit(PROMPTS, "r", chunk_size=2)
            async with answerer.answering():
                return await read(client, "r")

    found = asyncio.run(asyncio.wait_for(main(), 60))
    assert {result.ok for result in found.values()} == {True}


def test_a_queue_that_is_no_list_is_told_before_any_job_seems_to_wait_on_it(
    settings: QueueSettings, connection: redis.Redis
) -> None:
    connection.set("rq:queue:batchmill", "somebody's")

    async def main() -> None:
        async with Client(settings=settings) as client:
            with pytest.raises(RedisServerError, match="WRONGTYPE"):
                await client.submit(PROMPTS, "r", chunk_size=2)

    asyncio.run(main())
    assert connection.keys("rq:job:*") == []
